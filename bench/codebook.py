"""Values of few bits: how fast they are decoded, and what loading an adapter of them takes.

Decoding runs on one core, over values that fit its caches and over many more. Loading (reading,
checking, compiling, proving) is timed in one process, fp32 and coded in turn, each with an empty
cache.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from bench.common import compiled, made_up_adapter, manifest_of, report, smollm2_bundle
from edge_lora import codebook
from edge_lora.codebook import Group
from edge_lora.runtime import open_bundle
from edge_lora.runtime.bench.measure import Samples, interleave

SMALL, LARGE = 1 << 13, 1 << 24  # values: 32 KiB and 64 MiB of fp32
GROUPS: tuple[Group, ...] = ("tensor", 576, 64)


def main(folder: str = "", threads: int = 2, runs: int = 15) -> None:
    """Print GB/s of fp32 output by bits and group, then the times of loading."""
    report("codebook", _decoding(), "fp32 output of one core.")
    bundle = Path(folder) if folder else smollm2_bundle()
    report("codebook_load", _loading(bundle, threads, runs), "Medians, interleaved, cold cache.")


def _decoding() -> list[dict[str, object]]:
    library = compiled("decode_loop", "bench/decode_loop.cc", "src/codebook.cc")
    library.el_bench_decode.restype = ctypes.c_double
    rng = np.random.default_rng(0)
    rows = []
    for bits in codebook.BITS:
        for group in GROUPS:
            row: dict[str, object] = {"bits": bits, "group": group}
            for name, count in (("32 KiB", SMALL), ("64 MiB", LARGE)):
                book = codebook.levels_of("gauss_l1", bits)
                size = codebook.group_size(group, (count,))
                stats = rng.random((codebook.group_count(group, (count,)), 2), np.float32)
                codes = rng.integers(0, 256, count * bits // 8, np.uint8)
                out = np.empty(count, np.float32)
                passes = max(1, (1 << 22) // count)
                arguments = (
                    ctypes.c_void_p(book.ctypes.data), ctypes.c_size_t(book.size),
                    ctypes.c_uint64(size), ctypes.c_void_p(stats.ctypes.data),
                    ctypes.c_void_p(codes.ctypes.data), ctypes.c_uint64(count), passes,
                    ctypes.c_void_p(out.ctypes.data),
                )  # fmt: skip
                times = [library.el_bench_decode(*arguments) for _ in range(9)]
                wanted = codebook.Coded(codes, stats, book, (count,), size).decode()
                assert out.tobytes() == wanted.tobytes()
                row[f"GB/s, {name}"] = out.nbytes * passes / Samples(tuple(times)).median / 1e6
            rows.append(row)
    return rows


def _loading(folder: Path, threads: int, runs: int) -> list[dict[str, object]]:
    manifest = manifest_of(folder)
    files = {kind: made_up_adapter(manifest, kind) for kind in ("lora16", "lora16-1bit")}
    with open_bundle(folder, threads=threads) as session, tempfile.TemporaryDirectory() as root:

        def empty_cache() -> None:
            os.environ["EDGE_LORA_CACHE"] = tempfile.mkdtemp(dir=root)
            for name in session.adapters:
                session.delete_adapter(name)

        actions = {
            kind: (lambda path=path, kind=kind: session.load_adapter(path, kind))
            for kind, path in files.items()
        }
        samples = interleave(actions, runs, before=dict.fromkeys(actions, empty_cache))
    base = samples["lora16"].median
    return [
        {
            "adapter": kind,
            "file, bytes": files[kind].stat().st_size,
            "load, ms": samples[kind].median,
            "ratio to fp32": samples[kind].median / base,
        }
        for kind in files
    ]


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:]))
