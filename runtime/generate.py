"""Text from a causal language model: prefill, then one token at a time over a key/value cache.

The cache belongs to the weights that filled it. Each step compares the session's ``state_id``; if
an adapter was switched in between, the cache is rebuilt from the tokens so far, or the step is
refused. Where it lies is the graph's matter: see ``kv_growing`` and ``kv_static``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge_lora.errors import UnsupportedError
from edge_lora.runtime.kv_cache import cache_for
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
        prefill_ms: Time to the first token; of prompts that run one after another, the sum.
        decode_ms: Of every later step.
        rebuilds: How often the cache was lost, by an adapter switch or to another decoder of the
            same session, and had to be filled again.
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
        _require_tokens(prompts)
        self._session, self._adapter, self._on_swap = session, adapter, on_swap
        self._rank = session.rank_of(adapter, rank)
        self._cache = cache_for(session)
        if len(prompts) > 1 and not self._cache.batches:
            raise UnsupportedError(
                f"bundle '{session.folder}' runs one sequence at a time here, {len(prompts)} were "
                "given; use generate(), which runs them one after another"
            )
        length = max(map(len, prompts))
        pad = np.zeros((len(prompts), length), np.int64)
        self.ids, self.mask = pad, pad.copy()  # (batch, total): tokens, 1 where a token is real
        for row, prompt in enumerate(prompts):
            self.ids[row, length - len(prompt) :] = prompt
            self.mask[row, length - len(prompt) :] = 1
        self._most = _most_tokens(session, self._cache.length)
        self._state = session.state_with(adapter, self._rank)

    @property
    def rebuilds(self) -> int:
        """How often the cache had to be filled again."""
        return self._cache.rebuilds

    def step(self) -> NDArray[np.float32]:
        """Run what the cache does not hold yet; returns the last logits (batch, vocab)."""
        total = self.ids.shape[1]
        if self._most and total > self._most:
            raise UnsupportedError(f"{total} tokens, the model takes at most {self._most}")
        with self._session.held() as engine:
            self._follow_swap()
            if self._cache.filled == total:
                raise UnsupportedError("every token was run already; append() the next one first")
            adapter = self._session.unfused_values(self._adapter, self._rank)
            return self._cache.run(engine, self.ids, self.mask, adapter)

    def append(self, tokens: Tokens) -> None:
        """Add one token (batch,) to every sequence."""
        self.ids = np.concatenate([self.ids, tokens[:, None]], axis=1)
        self.mask = np.concatenate([self.mask, np.ones_like(tokens)[:, None]], axis=1)

    def _follow_swap(self) -> None:
        state = self._session.state_with(self._adapter, self._rank)
        if state == self._state:
            return
        if self._on_swap == "refuse" and self._cache.filled:
            raise UnsupportedError(
                "the adapter was switched while this text was being generated, so its key/value "
                "cache is of other weights; start again, or generate with on_swap='rebuild'"
            )
        self._cache.clear()
        self._state = state


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

    A graph with a cache of its own runs the prompts one after another, as batches of one.
    """
    _require_tokens(prompts)
    ends = set(session.manifest.config.get("eos_token_ids", []) if stop is None else stop)
    together = cache_for(session).batches
    batches = [list(prompts)] if together else [[prompt] for prompt in prompts]
    made = [
        _continue(
            Decoder(session, batch, adapter, on_swap, rank), ends, max_new_tokens, sample, on_tokens
        )
        for batch in batches
    ]
    return Generation(
        tokens=[row for part in made for row in part.tokens],
        prefill_ms=sum(part.prefill_ms for part in made),
        decode_ms=[ms for part in made for ms in part.decode_ms],
        rebuilds=sum(part.rebuilds for part in made),
    )


def _continue(
    decoder: Decoder,
    ends: set[int],
    max_new_tokens: int,
    sample: Sampler,
    on_tokens: Callable[[Tokens], None] | None,
) -> Generation:
    """Decode one batch until every sequence has ended."""
    done = np.zeros(len(decoder.ids), bool)
    tokens: list[list[int]] = [[] for _ in decoder.ids]
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


def _require_tokens(prompts: Sequence[Sequence[int]]) -> None:
    if not prompts or not all(prompts):
        raise UnsupportedError("a prompt is empty: give at least one token each")


def _most_tokens(session: Session, cache_length: int) -> int:
    """Return how many tokens the model and its cache take; 0: no limit is known."""
    limits = (int(session.manifest.config.get("context_length") or 0), cache_length)
    return min((limit for limit in limits if limit), default=0)
