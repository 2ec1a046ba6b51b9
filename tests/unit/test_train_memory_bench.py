"""The training benchmark runs on a CPU with a tiny model and reports every contestant."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]
TINY = (
    "--hidden 32 --layers 1 --ff 48 --vocab 64 --heads 2 --kv-heads 1 --batch 1 --seq 8 "
    "--rank 2 --steps 1 --rounds 2 --device cpu"
)


def test_rows_have_equal_parameters(tmp_path):
    output = tmp_path / "rows.json"
    subprocess.run(
        [sys.executable, ROOT / "bench/train_memory.py", *TINY.split(), "--output", output],
        check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )  # fmt: skip
    rows = json.loads(output.read_text())
    assert len(rows) == 5
    assert {len(row["step_ms_rounds"]) for row in rows} == {2}
    for row in rows:
        assert row["trainable"] == pytest.approx(rows[0]["trainable"], rel=0.05)
        assert row["last_loss"] < row["first_loss"]
