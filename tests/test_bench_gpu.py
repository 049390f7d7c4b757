"""The GPU benchmark runs, on a toy without a GPU, and its rows say what they measured."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bench_gpu
import llmprune
from llmprune.errors import ResourceError

PHASES = ("load_s", "copy_s", "calibration_s", "grams_s", "solve_s", "write_s", "other_s")
Bench = Callable[..., list[dict[str, Any]]]


class OutOfResources(Exception):
    """As Triton raises, whose errors are of no kind of torch's."""


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
    assert nothing["blocks_run"] == 0 and nothing["not_run"] == "the budget is used up" and "wall_s" not in nothing


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        ResourceError("out of memory"),
        OSError("no room"),
        OutOfResources("out of resource: shared memory"),
    ],
)
def test_a_preset_that_fails_says_why_and_the_next_one_runs(
    bench: Bench, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = llmprune.prune

    def failing(*args: Any, **options: Any) -> Any:
        if options["preset"] == "balanced":
            raise error
        return prune(*args, **options)

    monkeypatch.setattr(llmprune, "prune", failing)
    failed, done = bench("--preset", "balanced", "--preset", "fast")
    assert failed["failed"] == f"{type(error).__name__}: {error}" and failed["blocks_run"] == 0
    assert "wall_s" not in failed and failed["versions"] and done["wall_s"] > 0 and done["blocks_run"] == 2


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer here")
def test_a_run_that_outlasts_the_budget_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*args: Any, **options: Any) -> None:
        while True:
            try:
                while True:  # not signal.pause(), which a signal that comes just before it does not end
                    pass
            except Exception:
                pytest.fail("what tries something and goes on would not end")

    monkeypatch.setattr(llmprune, "prune", endless)
    monkeypatch.setattr(bench_gpu.Bench, "_left", lambda runs: 0.01)
    bench_gpu.write_shards(tmp_path / "shards", bench_gpu.TINY, "cpu")
    tokens = bench_gpu.write_tokens(tmp_path / "tokens.jsonl", 2, 8)
    runs = bench_gpu.Bench(tmp_path, bench_gpu.TINY, 2, tokens, tokens, "cpu", 0.0)
    row = runs.row("fast", "50%")
    assert row["stopped"] and row["blocks_run"] == 0 and "wall_s" not in row
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer here")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_end_that_python_drops_is_tried_again() -> None:
    class Deaf:
        def __del__(self) -> None:
            while True:
                pass

    with pytest.raises(bench_gpu.OutOfTime), bench_gpu.at_most(0.2):
        Deaf()
        while True:
            pass


def test_a_sum_that_fails_does_not_end_the_timing_of_others() -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    watch = bench_gpu.Stopwatch()
    with pytest.raises(torch.OutOfMemoryError):
        watch.watched(fails)()
    for _ in range(2):
        watch.watched(lambda: None)()
    assert len(watch._spans) == 2


def test_a_machine_without_room_is_told_how_much_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1 << 30))
    with pytest.raises(SystemExit, match="30 GB are needed"):
        bench_gpu.work_folder(bench_gpu.SEVEN_B)
