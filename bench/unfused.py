"""Unfused LoRA r16 on all linear layers, and idle slots, against the same base without slots."""

from __future__ import annotations

import sys

from bench.common import language_feeds, made_up_adapter, manifest_of, report, smollm2_bundle
from edge_lora.runtime import open_bundle
from edge_lora.runtime.bench.measure import interleave


def main(threads: int = 2, runs: int = 60) -> None:
    """Print decode and prefill medians of interleaved runs."""
    plain_folder, slots_folder = smollm2_bundle(), smollm2_bundle("inputs")
    manifest = manifest_of(slots_folder)
    rows = []
    with (
        open_bundle(plain_folder, threads=threads) as plain,
        open_bundle(slots_folder, threads=threads) as slots,
    ):
        slots.load_adapter(made_up_adapter(manifest, "lora16"), "lora")
        for phase, new, past in (("decode 1 after 64", 1, 64), ("prefill 64", 64, 0)):
            feeds = language_feeds(manifest, new, past)
            actions = {
                "base": lambda f=feeds: plain.run(f),
                "idle": lambda f=feeds: slots.run(f),
                "lora": lambda f=feeds: slots.run(f, adapter="lora"),
            }
            # Each is timed right after itself: two of them share weights, and so the caches.
            samples = interleave(actions, runs, before=actions)
            base = samples["base"].median
            rows.append(
                {
                    "phase": phase,
                    "base ms": base,
                    "idle slots / base": samples["idle"].median / base,
                    "LoRA r16 unfused / base": samples["lora"].median / base,
                }
            )
    report("unfused", rows, f"{threads} threads, {runs} interleaved runs, medians.")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
