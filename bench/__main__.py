"""Run every figure, one process each, so that none inherits another's memory."""

from __future__ import annotations

import subprocess
import sys

FIGURES = (
    "parity", "exactness", "latency", "open", "swap", "unfused", "file_size", "memory", "codebook",
    "executorch",
)  # fmt: skip


def main(names: list[str]) -> int:
    """Run the named figures, or all; returns how many failed."""
    failed = 0
    for name in names or FIGURES:
        print(f"\n## {name}\n", flush=True)
        done = subprocess.run([sys.executable, "-m", f"bench.{name}"], check=False)
        failed += done.returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
