"""The GPU benchmark runs, on a toy without a GPU, and its rows say what they measured."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_gpu.py"
PHASES = ("load_s", "copy_s", "calibration_s", "grams_s", "solve_s", "write_s", "other_s")


def bench(work: Path, *options: str) -> list[dict[str, Any]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(SCRIPT), "--tiny", "--work", str(work), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_rows_tell_where_the_time_went(tmp_path: Path) -> None:
    rows = bench(tmp_path, "--preset", "fast", "--pattern", "50%", "--pattern", "2:4")
    assert [(row["preset"], row["pattern"], row["blocks_run"]) for row in rows] == [
        ("fast", "50%", 2),
        ("fast", "2:4", 2),
    ]
    for row in rows:
        assert sum(row[phase] for phase in PHASES) == pytest.approx(row["wall_s"], abs=0.01)
        assert all(row[phase] > 0 for phase in ("load_s", "calibration_s", "grams_s", "solve_s"))
        assert row["without_reading_s"] == pytest.approx(row["wall_s"] - row["load_s"] - row["copy_s"], abs=0.01)
        assert row["sparsity"] == 0.5 and row["most_runs"] == 1 and not row["extrapolated"]
        assert row["versions"]["torch"] and "gpu" in row["hardware"] and row["peak_host_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_fewer_blocks_are_said_to_be_fewer(tmp_path: Path) -> None:
    (fewer, nothing) = (
        bench(tmp_path, "--preset", "fast", *options)[0] for options in (("--layers", "1"), ("--budget", "0"))
    )
    assert fewer["blocks"] == 2 and fewer["blocks_run"] == 1 and fewer["extrapolated"]
    assert fewer["whole_model_s"] == pytest.approx(2 * fewer["wall_s"], abs=0.01)
    assert nothing["blocks_run"] == 0 and "budget" in nothing["not_run"] and "wall_s" not in nothing
