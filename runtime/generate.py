"""Text from a causal language model: prefill, then one token at a time over a key/value cache.

The cache belongs to the weights that filled it. Each step compares the session's ``state_id``; if
an adapter was switched in between, the cache is rebuilt from the tokens so far, or the step is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge_lora.bundle import TensorSpec
from edge_lora.errors import UnsupportedError
from edge_lora.runtime.rank_choice import Rank
from edge_lora.runtime.sampling import Sampler, greedy
from edge_lora.runtime.session import Session
from edge_lora.runtime.text import tokenizer_of

OnSwap = Literal["rebuild", "refuse"]
Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Generation:
    """What was generated for a batch of prompts.

    Attributes:
        tokens: New token ids per prompt, without the end token.
        prefill_ms: Time to the first token.
        decode_ms: Of every later step.
        rebuilds: How often an adapter switch made the cache be filled again.
    """

    tokens: list[list[int]]
    prefill_ms: float
    decode_ms: list[float]
    rebuilds: int


class Decoder:
    """A batch of sequences and the cache of their keys and values."""

    def __init__(
        self,
        session: Session,
        prompts: Sequence[Sequence[int]],
        adapter: str | None = None,
        on_swap: OnSwap = "rebuild",
        rank: Rank = None,
    ) -> None:
        """Start from ``prompts`` (token ids, any lengths; shorter ones are padded on the left)."""
        if session.manifest.task != "causal-lm":
            raise UnsupportedError(
                f"bundle '{session.folder}' is not a causal language model; use session.run()"
            )
        if not prompts or not all(prompts):
            raise UnsupportedError("a prompt is empty: give at least one token each")
        self._session, self._adapter, self._on_swap = session, adapter, on_swap
        self._rank = session.rank_of(adapter, rank)
        self._past = [s for s in session.inputs.values() if s.name.startswith("past.")]
        length = max(map(len, prompts))
        pad = np.zeros((len(prompts), length), np.int64)
        self.ids, self.mask = pad, pad.copy()  # (batch, total): tokens, 1 where a token is real
        for row, prompt in enumerate(prompts):
            self.ids[row, length - len(prompt) :] = prompt
            self.mask[row, length - len(prompt) :] = 1
        self.rebuilds = 0
        self._state = session.state_with(adapter, self._rank)
        self._cached = 0  # positions whose keys and values are in the cache
        self._cache: dict[str, object] = {}

    def step(self) -> NDArray[np.float32]:
        """Run what the cache does not hold yet; returns the last logits (batch, vocab)."""
        most = int(self._session.manifest.config.get("context_length") or self.ids.shape[1])
        if self.ids.shape[1] > most:
            raise UnsupportedError(f"{self.ids.shape[1]} tokens, the model takes at most {most}")
        with self._session.held() as engine:
            self._follow_swap()
            if not self._cached:
                self._cache = {s.name: engine.value(self._empty(s)) for s in self._past}
            fresh = np.ascontiguousarray(self.ids[:, self._cached :])
            positions = np.maximum(self.mask.cumsum(1) - 1, 0)[:, self._cached :]
            feeds = {
                "input_ids": engine.value(fresh),
                "attention_mask": engine.value(self.mask),
                "position_ids": engine.value(np.ascontiguousarray(positions)),
                **self._cache,
                **self._session.unfused_values(self._adapter, self._rank),
            }
            outputs = engine.run_values(feeds)
            self._cache = {s.name: outputs[s.name.replace("past.", "present.")] for s in self._past}
            self._cached = self.ids.shape[1]
            logits = engine.numpy(outputs["logits"])
        return np.asarray(logits[:, -1], np.float32)

    def append(self, tokens: Tokens) -> None:
        """Add one token (batch,) to every sequence."""
        self.ids = np.concatenate([self.ids, tokens[:, None]], axis=1)
        self.mask = np.concatenate([self.mask, np.ones_like(tokens)[:, None]], axis=1)

    def _follow_swap(self) -> None:
        state = self._session.state_with(self._adapter, self._rank)
        if state == self._state:
            return
        if self._on_swap == "refuse" and self._cached:
            raise UnsupportedError(
                "the adapter was switched while this text was being generated, so its key/value "
                "cache is of other weights; start again, or generate with on_swap='rebuild'"
            )
        self.rebuilds += self._cached > 0
        self._state, self._cached = state, 0

    def _empty(self, spec: TensorSpec) -> NDArray[np.generic]:
        rest = [d if isinstance(d, int) else 0 for d in spec.shape[1:]]
        return np.zeros([self.ids.shape[0], *rest], spec.dtype)


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    sample: Sampler = greedy,
    stop: Sequence[int] | None = None,
    adapter: str | None = None,
    rank: Rank = None,
    on_swap: OnSwap = "rebuild",
    on_tokens: Callable[[Tokens], None] | None = None,
) -> Generation:
    """Continue a batch of prompts.

    Args:
        session: Over a bundle with task "causal-lm".
        prompts: Token ids per prompt.
        max_new_tokens: Most tokens to add.
        sample: How to choose; ``greedy`` or ``nucleus(top_p, temperature, seed)``.
        stop: Token ids that end a sequence; default: the model's end tokens.
        adapter: An adapter to use unfused.
        rank: At which of its ranks, or "auto:12ms"; see ``Session.run``.
        on_swap: What to do when the fused adapter is switched meanwhile.
        on_tokens: Called with each step's tokens (batch,).
    """
    ends = set(session.manifest.config.get("eos_token_ids", []) if stop is None else stop)
    decoder = Decoder(session, prompts, adapter, on_swap, rank)
    done = np.zeros(len(prompts), bool)
    tokens: list[list[int]] = [[] for _ in prompts]
    times: list[float] = []
    for _ in range(max_new_tokens):
        start = perf_counter()
        chosen = sample(decoder.step())
        times.append((perf_counter() - start) * 1e3)
        done |= np.isin(chosen, list(ends))
        for row in np.flatnonzero(~done):
            tokens[row].append(int(chosen[row]))
        if on_tokens is not None:
            on_tokens(chosen)
        if done.all():
            break
        decoder.append(chosen)
    return Generation(tokens, times[0] if times else 0.0, times[1:], decoder.rebuilds)


def generate_text(
    session: Session,
    prompt: str,
    max_new_tokens: int,
    sample: Sampler,
    adapter: str | None = None,
    rank: Rank = None,
) -> str:
    """Continue one text; see ``generate``."""
    tokenizer = tokenizer_of(session.folder)
    prompts = [tokenizer.encode(prompt).ids]
    made = generate(
        session, prompts, max_new_tokens=max_new_tokens, sample=sample, adapter=adapter, rank=rank
    )
    return str(tokenizer.decode(made.tokens[0]))
