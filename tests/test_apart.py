"""Results one after another: each is that of a run of its own, what they share is paid for once, and they go on."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import faults
import llmprune
import tiny
from llmprune import calibration, several
from llmprune.budget.dense import DensePass
from llmprune.checkpoint import Sink
from llmprune.errors import CheckpointError, Interrupted, PatternError, RecipeError
from llmprune.model import Streamed
from llmprune.model.gradients import Tape

IDS = tiny.ids(4, 16)
PATTERNS = ["50%", "60%", "2:4"]
NAMES = ["50%", "60%", "2of4"]
BALANCED: dict[str, Any] = {"preset": "balanced", "calibration": IDS}

# What results do not share, beside `balanced` below: presets, orders, tuning, other statistics, gradients; with what a model has to be opened
# anew for: heads and embeddings that are pruned and tied, weights that are wider than stored, norms that were tuned.
CASES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "best, in bfloat16": ("llama", torch.bfloat16, {"preset": "best", "tune_epochs": 2, "dtype": "float32"}),
    "fast, head and embedding tied": ("gemma2", torch.float32, {"preset": "fast", "include": "lm_head.weight"}),
    "balanced, transposed": ("gpt2", torch.float32, {"preset": "balanced"}),
    "fast, experts": ("qwen3-moe", torch.float32, {"preset": "fast"}),
    "tuned": ("opt", torch.float32, {"method": "wanda", "tune_epochs": 2}),
    "embedding": (
        "llama-tied",
        torch.float32,
        {"true_sequential": True, "include": "*embed_tokens*", "overrides": {"*embed*": {"method": "magnitude"}}},
    ),
    "moments, owl": ("llama", torch.float32, {"method": "dsnot", "allocation": "owl", "pattern": ["50%", "60%"]}),
    "gradients": ("llama", torch.float32, {"method": "taylor"}),
}


def names_of(patterns: list[str]) -> list[str]:
    return [name for pattern, name in zip(PATTERNS, NAMES, strict=True) if pattern in patterns]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.model("llama"), tmp_path_factory.mktemp("apart") / "llama")


@pytest.fixture(scope="module")
def alone(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What runs of their own make of `balanced`, by the names of the results."""
    out, found = tmp_path_factory.mktemp("alone"), {}
    for pattern, name in zip(PATTERNS, NAMES, strict=True):
        llmprune.prune(llama, out / name, pattern=pattern, **BALANCED)
        found[name] = faults.content(out / name)
    return found


@pytest.mark.parametrize("name", CASES)
def test_each_result_is_that_of_a_run_of_its_own(name: str, tmp_path: Path) -> None:
    family, dtype, case = CASES[name]
    options = {"pattern": ["60%", "2:4"], "calibration": IDS, **case}
    source = tiny.save(tiny.model(family, dtype), tmp_path / "source")
    reports: Any = llmprune.prune(source, tmp_path / "out", **options)
    assert [report.out.name for report in reports] == names_of(options["pattern"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names_of(options["pattern"]))
    contents = []
    for pattern, report in zip(options["pattern"], reports, strict=True):
        llmprune.prune(source, tmp_path / "alone" / report.out.name, **options | {"pattern": pattern})
        contents.append(faults.content(tmp_path / "alone" / report.out.name))
        assert faults.content(report.out) == contents[-1]
        assert report.one_pass is None and llmprune.inspect(report.out).verified
    assert all(a != b for a, b in pairwise(contents))


def counted(patch: pytest.MonkeyPatch, owner: Any, name: str, seen: list[str]) -> None:
    plain = getattr(owner, name)

    def count(*arguments: Any, **options: Any) -> Any:
        seen.append(name)
        return plain(*arguments, **options)

    patch.setattr(owner, name, count)


def test_what_results_share_is_had_once(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[str]()
    counted(monkeypatch, Streamed, "__init__", seen)
    counted(monkeypatch, DensePass, "costs", seen)
    counted(monkeypatch, Tape, "backward", seen)
    counted(monkeypatch, calibration, "sample", seen)
    reports = llmprune.prune(llama, tmp_path / "out", pattern=PATTERNS, **BALANCED)
    assert seen == ["__init__", "sample", "costs", "backward"]
    assert [report.allocation is None for report in reports] == [False, False, True]  # a preset is each pattern's own
    assert reports[0].clock.seconds["allocation"] > reports[1].clock.seconds["allocation"]


@pytest.mark.parametrize("way", ["owl", "error", "fisher"])
def test_results_of_one_pass_share_out_sparsities_in_one_too(
    way: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"method": "sparsegpt", "allocation": way, "calibration": IDS}
    alone = [llmprune.prune(llama, tmp_path / name, pattern=name, **options) for name in ("50%", "60%")]
    seen = list[str]()
    counted(monkeypatch, DensePass, "costs", seen)
    reports = llmprune.prune(llama, tmp_path / "out", pattern=["50%", "60%"], **options)
    assert seen == ["costs"] and all(report.one_pass for report in reports)
    assert [report.allocation for report in reports] == [report.allocation for report in alone]
    assert reports[0].allocation != reports[1].allocation


@pytest.mark.parametrize("after", [1, 4, 6, 10])  # records: of the first two results an allocation and three blocks
def test_what_is_complete_is_left_and_the_rest_goes_on(
    after: int, llama: Path, alone: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    run: dict[str, Any] = {"pattern": PATTERNS, **BALANCED}
    finish, left, out = Sink.finish, iter(range(after)), tmp_path / "out"

    def finish_or_stop(sink: Sink, stage: str, record: dict[str, Any]) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        finish(sink, stage, record)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted, match="--resume") as stopped:
        patch.setattr(Sink, "finish", finish_or_stop)
        llmprune.prune(llama, out, **run)
    complete = [name for name in NAMES if (out / name).exists()]
    per_result = tiny.BLOCKS + 1
    assert len(complete) == after // per_result
    assert str(stopped.value).startswith(", ".join(complete) + " complete, and") == bool(complete)
    before = {name: (out / name).stat().st_ino for name in complete}
    with pytest.raises(CheckpointError, match="--resume"):
        llmprune.prune(llama, out, **run)
    reports: Any = llmprune.prune(llama, out, resume=True, **run)
    assert [report.out.name for report in reports] == NAMES
    assert {name: faults.content(out / name) for name in NAMES} == alone
    assert sorted(path.name for path in out.iterdir()) == sorted(NAMES)
    assert {name: (out / name).stat().st_ino for name in complete} == before


def test_a_result_of_a_run_of_its_own_is_one_of_several(
    llama: Path, alone: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    llmprune.prune(llama, tmp_path / "out" / "60%", pattern="60%", **BALANCED)
    llmprune.prune(llama, tmp_path / "out", pattern=PATTERNS, resume=True, **BALANCED)
    assert {name: faults.content(tmp_path / "out" / name) for name in NAMES} == alone
    with pytest.raises(RecipeError, match="60% is of another recipe"):
        llmprune.prune(llama, tmp_path / "out", pattern=["60%", "70%"], resume=True, calibration=IDS)
    assert not (tmp_path / "out" / "70%").exists()


def test_all_places_are_checked_before_any_work_and_can_be_overwritten(
    llama: Path, alone: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    llmprune.prune(llama, out / "2of4", pattern="2:4", method="magnitude")
    with pytest.raises(CheckpointError, match="2of4 exists: choose another folder"):
        llmprune.prune(llama, out, pattern=PATTERNS, **BALANCED)
    assert [path.name for path in out.iterdir()] == ["2of4"]
    llmprune.prune(llama, out, pattern=PATTERNS, overwrite=True, **BALANCED)
    assert {name: faults.content(out / name) for name in NAMES} == alone


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"pattern": ["50%", "1:7"]}, PatternError, "not divisible by 7"),
        ({"allocation": "fisher"}, RecipeError, "2:4 is the same everywhere"),
        ({"tune_rate": -1}, RecipeError, "tune_rate must be"),
        ({"compressed": True, "pattern": ["50%", "2%"]}, RecipeError, "2% leaves too few zeros"),
    ],
)
def test_what_cannot_be_had_for_one_is_refused_before_any_work(
    llama: Path, tmp_path: Path, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        llmprune.prune(llama, tmp_path / "out", **{"pattern": PATTERNS, **BALANCED} | change)
    assert not (tmp_path / "out").exists()


def test_the_summary_says_that_each_had_a_pass_and_adds_up_their_time(llama: Path, tmp_path: Path) -> None:
    reports = llmprune.prune(llama, tmp_path / "out", pattern=["50%", "60%"], **BALANCED)
    text = several.summary(reports)
    assert "2 results from a calibration pass each" in text and "dense model" not in text
    total = sum(report.clock.seconds["statistics"] for report in reports)
    told = re.search(r"other time .*statistics ([\d.]+) s", text)
    assert told and float(told[1]) == pytest.approx(total, abs=0.051)
    assert not any("one of several" in note for report in reports for note in report.notes)
