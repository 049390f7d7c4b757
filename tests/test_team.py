"""Several ranks prune as one process does, to the byte; and when one is lost, the others say so and are resumed."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

import faults
import tiny
from llmprune.errors import RankError
from llmprune.team.launch import launch, patience
from llmprune.team.team import Team, deal, in_turn
from llmprune.team.watch import Watch
from ranks import Job, Ranks, command, measure_all, prune_all, prune_all_apart, tell_sharing, two_hosts

IDS = tiny.ids(5, 16).tolist()
FAMILIES = ("llama", "gemma2", "gpt2", "qwen3-moe")
RECIPES: dict[str, dict[str, Any]] = {
    "wanda": {"method": "wanda", "calibration": IDS},
    "sparsegpt": {"method": "sparsegpt", "calibration": IDS},
    "balanced": {"preset": "balanced", "calibration": IDS},
}
TUNED: dict[str, Any] = {"method": "wanda", "tune_epochs": 2}
# What else has ways of its own: methods, orders, ends of the model, budgets, uneven shares, more ranks than batches,
# tuning, gradients, several results of one pass and one after another.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "2:4, fast": ("llama", {"preset": "fast", "pattern": "2:4", "calibration": IDS}),
    "true sequential": ("llama", {"true_sequential": True, "calibration": IDS}),
    "true sequential, experts": ("qwen3-moe", {"true_sequential": True, "calibration": IDS}),
    "one sequence, in order": ("llama", {"preset": "fast", "calibration": IDS[:1]}),
    "three sequences, experts": ("qwen3-moe", {"calibration": IDS[:3], "method": "ria"}),
    "batches of two": ("llama", {"calibration": IDS, "batch_size": 2}),
    "head": ("llama", {"calibration": IDS, "include": "lm_head.weight", "method": "obd"}),
    "no calibration": ("llama", {"method": "magnitude", "comparison_group": "model", "include": "*"}),
    "moments": ("llama", {"method": "dsnot", "calibration": IDS}),
    "exchanges": ("llama", {"method": "sparseswaps", "calibration": IDS, "dtype": "bfloat16"}),
    "best": ("llama", {"preset": "best", "tune_epochs": 2, "calibration": IDS}),
    "tuned experts": ("qwen3-moe", {**TUNED, "calibration": IDS, "dtype": "bfloat16"}),
    "tuned, two sequences": ("llama", {**TUNED, "calibration": IDS[:2]}),
    "by outliers": ("gpt2", {"method": "wanda", "allocation": "owl", "calibration": IDS}),
    "gradients": ("llama", {"method": "taylor", "calibration": IDS, "include": "lm_head.weight"}),
    "gradients, experts": ("qwen3-moe", {"method": "taylor", "calibration": IDS[:3]}),
    "several": ("gpt2", {"pattern": ["50%", "60%"], "allocation": "fisher", "calibration": IDS}),
    "several, apart": ("llama", {"preset": "balanced", "pattern": ["50%", "60%", "2:4"], "calibration": IDS}),
    "several, experts": ("qwen3-moe", {"pattern": ["50%", "2:4"], "method": "wanda", "calibration": IDS[:3]}),
}
CASES = {f"{family}, {name}": (family, recipe) for family in FAMILIES for name, recipe in RECIPES.items()} | MORE
AS_TWO = ("2:4, fast", "true sequential", "true sequential, experts", "batches of two", "head", "moments", "exchanges")
CHOSEN = {2: list(CASES), 4: [name for name in CASES if name not in AS_TWO]}  # four do all that is theirs alone


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a tiny checkpoint of each family."""
    folder = tmp_path_factory.mktemp("sources")
    return {family: tiny.save(tiny.model(family), folder / family) for family in FAMILIES}


def jobs(sources: dict[str, Path], out: Path, names: Iterable[str] = CASES) -> list[Job]:
    return [((sources[CASES[name][0]], out / name), CASES[name][1]) for name in names]


@pytest.fixture(scope="module")
def alone(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of what one process makes of all cases."""
    out = tmp_path_factory.mktemp("alone")
    ranks = Ranks(1, out / "said", prune_all, jobs(sources, out))
    assert ranks.codes() == [0], ranks.said(0)
    return out


def contents(out: Path) -> dict[str, Any]:
    """Return what is in the folders of all results of a job."""
    folders = [report.parent for report in out.rglob("llmprune.json")]
    assert folders, out
    return {str(folder.relative_to(out)): faults.content(folder) for folder in folders}


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_prune_as_one_process_does(size: int, sources: dict[str, Path], alone: Path, tmp_path: Path) -> None:
    ranks = Ranks(size, tmp_path / "said", prune_all, jobs(sources, tmp_path, CHOSEN[size]))
    assert ranks.codes() == [0] * size, [ranks.said(rank) for rank in range(size)]
    for name in CHOSEN[size]:
        assert contents(tmp_path / name) == contents(alone / name), name


@pytest.mark.skipif(sys.platform != "linux", reason="memory is shared through /proc")
@pytest.mark.parametrize("said_of_machine", ["2", "1"])
def test_ranks_of_one_machine_share_memory_whatever_the_launcher_says(said_of_machine: str, tmp_path: Path) -> None:
    ranks = Ranks(2, tmp_path / "said", tell_sharing, tmp_path / "told", LOCAL_WORLD_SIZE=said_of_machine)
    assert ranks.codes() == [0, 0], [ranks.said(rank) for rank in range(2)]
    assert json.loads((tmp_path / "told").read_text()) is True


def test_ranks_measure_as_one_process_does(sources: dict[str, Path], tmp_path: Path) -> None:
    figures = []
    for size in (1, 2):
        told = tmp_path / f"told-{size}"
        ranks = Ranks(size, tmp_path / f"said-{size}", measure_all, sources["llama"], tmp_path / str(size), IDS, told)
        assert ranks.codes() == [0] * size, [ranks.said(rank) for rank in range(size)]
        varying = ("seconds", "out", "model")
        figures.append([{k: v for k, v in row.items() if k not in varying} for row in json.loads(told.read_text())])
        assert len(json.loads((tmp_path / str(size) / "wanda-50%" / "llmprune.json").read_text())["evaluations"]) == 1
        assert (tmp_path / str(size) / "apart" / "wanda-50%" / "llmprune.json").exists()
    assert figures[0] == figures[1]


def test_what_several_ranks_cannot_do_is_refused_in_one_line(sources: dict[str, Path], tmp_path: Path) -> None:
    ranks = Ranks(2, tmp_path / "said", command, ["inspect", sources["llama"]])
    assert ranks.codes() == [2, 2]
    assert "inspect is the work of one process: start it without torchrun" in last_words(ranks, 0)


def test_an_environment_that_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch() == (0, 1, 1)
    for rank, size in (("2", "2"), ("-1", "2"), ("one", "2")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(RankError, match="torchrun"):
            launch()
    for text in ("soon", "0", "inf"):
        monkeypatch.setenv("LLMPRUNE_RANK_TIMEOUT", text)
        with pytest.raises(RankError, match="LLMPRUNE_RANK_TIMEOUT must be"):
            patience()


def test_work_is_dealt_out_evenly_and_shares_are_put_together_again() -> None:
    load = [0.0, 1.0]
    assert deal([1.0, 5.0, 2.0, 3.0], load) == [0, 0, 1, 1]
    assert load == [6.0, 6.0]
    assert deal([], [0.0]) == []
    for count in range(6):
        items = list(range(count))
        teams = [of_three(rank) for rank in range(3)]
        assert in_turn([team.share(items) for team in teams]) == items
        for team in teams:
            mine = team.share(items)
            assert [team.number(place) for place in range(len(mine))] == mine
            assert [item for item in items if team.owner(item) == team.rank] == mine
            assert [team.place(item) for item in items if item in mine] == list(range(len(mine)))
            assert all(team.place(item) is None for item in items if item not in mine)


def of_three(rank: int) -> Team:
    team = Team()
    team.rank, team.size = rank, 3
    return team


def test_a_store_that_does_not_answer_tells_nothing_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("llmprune.team.watch.time", SimpleNamespace(monotonic=lambda: now[0]))
    store = HashStore()
    store.set("rank/0", json.dumps([1, None]))
    watch = Watch(store, 1, 2, patience=10)
    watch.leave()
    watch._hear()
    now[0] = 0.6
    watch._hear()
    now[0] = 10.3
    assert watch.lost() is None
    now[0] = 10.7
    assert watch.lost() == "rank 0 cannot be reached from rank 1 in the start"
    watch._hear()
    assert watch.lost() == "rank 0 was lost in the start, without a sign of life for 11 s"


PRUNED_AT = 3  # the load of a block with which it is pruned: sparsity is allocated from a forward and a backward
_KEPT = r"the allocation of sparsity and 1 block kept .*--resume"
STRUCK = {
    "dies": (1, rf"rank 1 was lost in model\.layers\.1, without a sign of life for \d+ s; {_KEPT}"),
    "hangs": (1, rf"rank 1 was lost in model\.layers\.1, without a sign of life for \d+ s; {_KEPT}"),
    "error": (1, rf"rank 1 stopped in model\.layers\.1: a disk is gone; {_KEPT}"),
    "first dies": (0, r"rank 0 (was lost|cannot be reached from rank 1) in the allocation of sparsity"),
}


@pytest.mark.parametrize("how", STRUCK)
def test_a_rank_that_is_lost_is_named(how: str, sources: dict[str, Path], alone: Path, tmp_path: Path) -> None:
    victim, says = STRUCK[how]
    strike = {"rank": victim, "stage": "model.layers.1", "load": 1 if victim == 0 else PRUNED_AT, "how": how}
    ranks = struck(2, sources["llama"], tmp_path, strike)
    assert ranks.code(1 - victim) == 2, ranks.said(1 - victim)
    ranks.processes[victim].kill()
    assert re.search(f"rank {1 - victim}: {says}", last_words(ranks, 1 - victim))
    if how == "dies":
        goes_on_with_any_number(sources["llama"], alone / "best", tmp_path)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces need root and iproute2")
def test_two_hosts_prune_as_one_process_does_and_stop_when_the_link_is_cut(
    sources: dict[str, Path], alone: Path, tmp_path: Path
) -> None:
    names = [f"{family}, {name}" for family in FAMILIES for name in RECIPES]
    wanted = jobs(sources, tmp_path, names)
    with two_hosts() as hosts:
        ranks = Ranks(2, tmp_path / "said", prune_all_apart, wanted, **hosts)
        assert ranks.codes() == [0, 0], [ranks.said(rank) for rank in range(2)]
        strike = {"rank": 1, "stage": "model.layers.1", "load": PRUNED_AT, "how": "is cut off"}
        ranks = struck(2, sources["llama"], tmp_path, strike, **hosts)
        assert ranks.codes() == [2, 2], [ranks.said(rank) for rank in range(2)]
    for name in names:
        assert contents(tmp_path / name) == contents(alone / name), name
    assert "rank 0: rank 1 was lost in model.layers.1" in last_words(ranks, 0)
    assert "rank 1: rank 0 cannot be reached from rank 1 in model.layers.1" in last_words(ranks, 1)
    goes_on_with_any_number(sources["llama"], alone / "best", tmp_path)


def struck(size: int, source: Path, folder: Path, strike: dict[str, Any] | None, **how: Any) -> Ranks:
    """Start the best preset on the command line, with something that befalls a rank."""
    return Ranks(size, folder / "struck", command, task(source, folder), strike, LLMPRUNE_RANK_TIMEOUT="10", **how)


def task(source: Path, folder: Path, out: str = "struck-out") -> list[str | Path]:
    tokens = folder / "tokens.jsonl"
    tokens.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in IDS))
    return ["prune", source, folder / out, "--preset", "best", "--tune-epochs", "2", "--calibration", tokens]


def last_words(ranks: Ranks, rank: int) -> str:
    (line,) = [line for line in ranks.said(rank).splitlines() if line.startswith("llmprune: ")]
    return line


def goes_on_with_any_number(source: Path, whole: Path, folder: Path) -> None:
    """Check that one rank, and two, end what a struck run has begun in the same bytes."""
    resumed = {}
    for size in (1, 2):
        again = f"again-{size}"
        shutil.copytree(folder / "struck-out.partial", folder / f"{again}.partial")
        resumed[again] = Ranks(size, folder / f"said-{size}", command, [*task(source, folder, again), "--resume"])
    for again, ranks in resumed.items():
        assert set(ranks.codes()) == {0}, ranks.said(0)
        assert weights(folder / again) == weights(whole)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
