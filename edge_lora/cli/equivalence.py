"""Do two adapters compute the same? The same prompts, in a live session, with one and the other."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_lora.adapter import Adapter
from edge_lora.errors import UnsupportedError

if TYPE_CHECKING:
    from edge_lora.runtime import Session

Arrays = Mapping[str, NDArray[np.generic]]
PROMPTS = ("The capital of France is", "Write the year 1987 as a Roman numeral:")
NEW_TOKENS = 32


def compare(
    bundle: Path,
    original: Adapter,
    converted: Adapter,
    prompts: Sequence[str],
    threads: int | None,
    onnx_adapter: Path | None = None,
) -> list[dict[str, Any]]:
    """Return how far the outputs are apart, one row for each way to run ``converted``.

    Args:
        bundle: Both fit it.
        original: The adapter before the conversion.
        converted: The one after it, as it was read back.
        prompts: For a causal language model with a tokenizer; others run the bundle's own canary.
        threads: Of the engine.
        onnx_adapter: If this was written, it also runs in a plain ONNX Runtime session.
    """
    from edge_lora.runtime import open_bundle

    with tempfile.TemporaryDirectory() as folder, open_bundle(bundle, threads=threads) as session:
        names = (f"{original.name}, original", f"{converted.name}, converted")
        for number, adapter in enumerate((original, converted)):
            session.load_adapter(adapter.save(Path(folder) / str(number)), names[number])
        ids = _prompt_ids(session, prompts)
        feeds = [_prompt_feeds(session, i) for i in ids] or [_canary(session)]
        base = [session.run(f) for f in feeds]
        expected, how = _outputs(session, names[0], feeds)
        found, _ = _outputs(session, names[1], feeds)
        row = {"target": f"edge-lora, {how}", **_differences(base, expected, found)}
        if ids:
            row |= _tokens(session, names, ids, how)
        rows = [row]
        if onnx_adapter is not None:
            plain = _plain_outputs(bundle, session, onnx_adapter, feeds)
            rows.append({"target": "onnxruntime", **_differences(base, expected, plain)})
    return rows


def _outputs(session: Session, name: str, feeds: Sequence[Arrays]) -> tuple[list[Arrays], str]:
    """Return the outputs with an active adapter, or where it cannot be active, unfused."""
    has_sites = session.header(name).has_bottleneck
    try:
        with session.using(name):
            return [session.run(dict(f)) for f in feeds], "sites fed" if has_sites else "fused"
    except UnsupportedError:
        return [session.run(dict(f), adapter=name) for f in feeds], "unfused"


def _plain_outputs(
    bundle: Path, session: Session, adapter: Path, feeds: Sequence[Arrays]
) -> list[Arrays]:
    import onnxruntime as ort

    loaded, options = ort.LoraAdapter(), ort.RunOptions()
    loaded.Load(str(adapter.absolute()))
    options.add_active_adapter(loaded)
    graph = str(bundle / "onnx" / "model.onnx")
    plain = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = list(session.outputs)
    return [dict(zip(names, plain.run(names, dict(f), options), strict=True)) for f in feeds]


def _differences(
    base: Sequence[Arrays], expected: Sequence[Arrays], found: Sequence[Arrays]
) -> dict[str, float]:
    """Return the largest difference over all runs and outputs, and the adapter's largest effect."""

    def largest(one: Sequence[Arrays], other: Sequence[Arrays]) -> float:
        pairs = [(x[name], y[name]) for x, y in zip(one, other, strict=True) for name in x]
        return max(
            float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()) for a, b in pairs
        )

    return {"largest_difference": largest(expected, found), "effect": largest(base, expected)}


def _tokens(
    session: Session, names: tuple[str, str], ids: Sequence[list[int]], how: str
) -> dict[str, Any]:
    """Compare what both adapters generate, greedily."""
    from edge_lora.runtime.generate import generate

    texts = []
    for name in names:
        if how == "unfused":
            texts.append(generate(session, ids, max_new_tokens=NEW_TOKENS, adapter=name).tokens)
            continue
        with session.using(name):
            texts.append(generate(session, ids, max_new_tokens=NEW_TOKENS).tokens)
    pairs = list(zip(*texts, strict=True))
    firsts = [first_difference(*pair) for pair in pairs]
    return {"same_texts": firsts.count(None), "texts": len(pairs), "first_differences": firsts}


def takes_text(bundle: Path) -> bool:
    """Whether prompts can be run in a bundle: a causal language model with its tokenizer."""
    from edge_lora.bundle import read_manifest

    has_tokenizer = (bundle / "tokenizer" / "tokenizer.json").is_file()
    return read_manifest(bundle).task == "causal-lm" and has_tokenizer


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Return the first position where two texts differ, in length too; None if nowhere.

    >>> first_difference([1, 2, 3], [1, 2])
    2
    """
    for position, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return position
    return None if len(one) == len(other) else min(len(one), len(other))


def _prompt_ids(session: Session, prompts: Sequence[str]) -> list[list[int]]:
    """Return the prompts' tokens; none where the base takes no text."""
    if not takes_text(session.folder):
        return []
    from edge_lora.runtime.text import tokenizer_of

    tokenizer = tokenizer_of(session.folder)
    return [list(tokenizer.encode(prompt).ids) for prompt in prompts or PROMPTS]


def _prompt_feeds(session: Session, ids: Sequence[int]) -> Arrays:
    """Return a prefill's inputs."""
    tokens = np.array([ids], np.int64)
    feeds: dict[str, NDArray[np.generic]] = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.arange(len(ids))[None],
    }
    for spec in session.inputs.values():
        if spec.name.startswith("past."):
            rest = [axis if isinstance(axis, int) else 0 for axis in spec.shape[1:]]
            feeds[spec.name] = np.zeros([1, *rest], spec.dtype)
    return feeds


def _canary(session: Session) -> Arrays:
    from edge_lora.runtime.canary import canary_feeds

    return canary_feeds(session.manifest)
