"""Resident memory with ten adapters loaded, against the base plus their compiled patches."""

from __future__ import annotations

import gc

from bench.common import language_feeds, made_up_adapter, manifest_of, report, smollm2_bundle
from edge_lora.runtime import open_bundle
from edge_lora.runtime.bench.measure import resident_bytes


def main(count: int = 10) -> None:
    """Print one row per kind of adapter; memory is anonymous resident memory of this process."""
    folder = smollm2_bundle()
    manifest = manifest_of(folder)
    feeds = language_feeds(manifest, 1, 64)
    rows = []
    for kind in ("random1", "line1"):
        paths = [made_up_adapter(manifest, kind, seed) for seed in range(count)]
        gc.collect()
        with open_bundle(folder, threads=2) as session:
            session.run(feeds)
            base = resident_bytes()
            for i, path in enumerate(paths):
                session.load_adapter(path, str(i))
            for i in range(count):
                session.set_adapter(str(i))
                session.run(feeds)
            patches = session.patch_bytes
            gc.collect()
            now = resident_bytes()
            rows.append(
                {
                    "adapters": f"{count} x {kind}",
                    "base MiB": base / 2**20,
                    "patches MiB": patches / 2**20,
                    "resident MiB": now / 2**20,
                    "ratio to base + patches": now / (base + patches),
                }
            )
    report("memory", rows, "Anonymous resident memory; 1 % SHiRA adapters of SmolLM2-135M.")


if __name__ == "__main__":
    main()
