"""The GPU benchmark runs, on a toy without a GPU, and its rows say what they measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bench_gpu

PHASES = ("load_s", "copy_s", "calibration_s", "grams_s", "solve_s", "write_s", "other_s")
Bench = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    def run(*options: str) -> list[dict[str, Any]]:
        monkeypatch.setattr("sys.argv", ["bench_gpu.py", "--tiny", "--work", str(tmp_path), *options])
        bench_gpu.main()
        assert list(tmp_path.iterdir()) == []
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_rows_tell_where_the_time_went(bench: Bench) -> None:
    rows = bench("--preset", "fast", "--pattern", "50%", "--pattern", "2:4")
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


def test_fewer_blocks_are_said_to_be_fewer(bench: Bench) -> None:
    (fewer, nothing) = (bench("--preset", "fast", *options)[0] for options in (("--layers", "1"), ("--budget", "0")))
    assert fewer["blocks"] == 2 and fewer["blocks_run"] == 1 and fewer["extrapolated"]
    assert fewer["whole_model_s"] == pytest.approx(2 * fewer["wall_s"], abs=0.01)
    assert nothing["blocks_run"] == 0 and "budget" in nothing["not_run"] and "wall_s" not in nothing
