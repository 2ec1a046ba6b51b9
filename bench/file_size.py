"""Bytes per entry of a 1 % SHiRA file of SmolLM2-135M, against 2 of value and 1 of index."""

from __future__ import annotations

from bench.common import made_up_adapter, manifest_of, report, smollm2_bundle
from edge_lora import Adapter, Sparse


def main() -> None:
    """Print one row per kind of mask, and LoRA of the same base for scale."""
    manifest = manifest_of(smollm2_bundle())
    rows = []
    for kind in ("random1", "line1"):
        path = made_up_adapter(manifest, kind)
        forms = [form for delta in Adapter.load(path).deltas.values() for form in delta.forms]
        entries = sum(form.values.size for form in forms if isinstance(form, Sparse))
        size = path.stat().st_size
        rows.append(
            {
                "mask": kind,
                "entries": entries,
                "bytes": size,
                "bytes per entry": size / entries,
                "ratio to 3 bytes": size / entries / 3,
                "PEFT's file (12 bytes per entry)": 12 * entries,
            }
        )
    report("file_size", rows, "fp16 values, header and tensor table included.")


if __name__ == "__main__":
    main()
