"""Batches for causal language models from pairs of prompt and completion."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from edge_lora.errors import EdgeLoraError, list_all

Pair = tuple[str, str]
"""(prompt, completion)."""

IGNORED = -100
"""Label of a token that does not count, as torch's cross entropy defines it."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used."""

    eos_token_id: int | None
    pad_token_id: int | None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return token ids."""


def read_pairs(path: str | Path) -> list[Pair]:
    """Read a JSONL file with one ``{"prompt": …, "completion": …}`` a line, or nothing.

    Raises:
        EdgeLoraError: Lists every bad line by number.
    """
    pairs: list[Pair] = []
    problems: list[str] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            pairs.append(_pair_of(json.loads(line)))
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: {error.msg} at column {error.colno}")
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if not pairs and not problems:
        problems.append("no lines: want one JSON object a line")
    if problems:
        raise EdgeLoraError(
            f"{list_all(f'data {str(path)!r} cannot be used', problems)}\n"
            'Each line is {"prompt": "…", "completion": "…"}'
        )
    return pairs


def _pair_of(record: Any) -> Pair:  # noqa: ANN401  (whatever the JSON holds)
    if not isinstance(record, dict):
        raise ValueError(f"is a {type(record).__name__}, want an object")
    for key in ("prompt", "completion"):
        if not isinstance(record.get(key), str):
            raise ValueError(f"{key!r} is {record.get(key)!r}, want a string")
    if not record["completion"]:
        raise ValueError("'completion' is empty")
    return record["prompt"], record["completion"]


def split_pairs(
    pairs: Sequence[Pair], share: float, seed: int = 0
) -> tuple[list[Pair], list[Pair]]:
    """Return (training, validation) pairs, split at random with ``share`` of them to validate on.

    >>> training, validation = split_pairs([("a", "b")] * 10, 0.2)
    >>> len(training), len(validation)
    (8, 2)
    """
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    held_out = set(order[: round(share * len(pairs))])
    training = [pair for i, pair in enumerate(pairs) if i not in held_out]
    return training, [pairs[i] for i in sorted(held_out)]


class TextBatches:
    """Padded batches of tokenised pairs, shuffled anew and reproducibly each epoch.

    A batch holds ``input_ids``, ``attention_mask`` and ``labels``, int64 (batch, length). Labels
    are ``IGNORED`` on the prompt and the padding, so only the completion and the closing
    end-of-text token are learned. Prompt and completion are tokenised apart, as they are at
    inference.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        tokenizer: Tokenizer,
        batch_size: int = 8,
        max_tokens: int = 512,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        """Tokenise ``pairs``; refuses, by index, those longer than ``max_tokens``."""
        encoded = [_encode(pair, tokenizer) for pair in pairs]
        problems = [
            f"pair {i}: {len(ids)} tokens"
            for i, (ids, _) in enumerate(encoded)
            if len(ids) > max_tokens
        ]
        if not encoded:
            problems.append("no pairs")
        if problems:
            title = f"pairs do not fit max_tokens={max_tokens}"
            raise EdgeLoraError(f"{list_all(title, problems)}\nShorten them or raise max_tokens")
        self._encoded = encoded
        pad = tokenizer.pad_token_id
        self._pad_id = pad if pad is not None else (tokenizer.eos_token_id or 0)
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches in an epoch; the last may be smaller."""
        return -(-len(self._encoded) // self._batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Iterate over the batches of one epoch."""
        order = list(range(len(self._encoded)))
        if self._shuffle:
            random.Random(f"{self._seed}/{self._epoch}").shuffle(order)
        for start in range(0, len(order), self._batch_size):
            yield self._pad([self._encoded[i] for i in order[start : start + self._batch_size]])

    def _pad(self, rows: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
        length = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), length), self._pad_id)
        labels = torch.full((len(rows), length), IGNORED)
        attention_mask = torch.zeros((len(rows), length), dtype=torch.int64)
        for i, (ids, prompt_length) in enumerate(rows):
            row = torch.tensor(ids)
            input_ids[i, : len(ids)] = row
            attention_mask[i, : len(ids)] = 1
            labels[i, prompt_length : len(ids)] = row[prompt_length:]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _encode(pair: Pair, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Return the token ids of a pair and how many of them are the prompt."""
    prompt = tokenizer.encode(pair[0])
    completion = tokenizer.encode(pair[1], add_special_tokens=False)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return prompt + completion + end, len(prompt)
