"""Sensitivity and sweep: each figure is that of a model pruned by hand, and a stopped run goes on."""

import errno
import importlib
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch

import llmprune
import tiny
from llmprune import cli, runs
from llmprune.branch import Branch
from llmprune.checkpoint import Source
from llmprune.checkpoint.compressed import compress
from llmprune.errors import CheckpointError, DataError, Interrupted, PatternError, RecipeError
from llmprune.report import SiteReport
from llmprune.storing import OnDisk
from llmprune_eval import sensitivity as room
from llmprune_eval import table

DATA = [row.tolist() for row in tiny.ids(5, 20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.model("llama"), tmp_path_factory.mktemp("models") / "llama")


def by_hand(folder: Path, tmp_path: Path, share: float, keep: str, **options: Any) -> Any:
    """Prune the sites whose names match `keep` only, and measure."""
    made = tiny.load(folder)
    names = [name for name, module in made.named_modules() if isinstance(module, torch.nn.Linear)]
    others = [f"{name}.weight" for name in names if keep not in f"{name}." and name != "lm_head"]
    llmprune.prune(made, pattern=share, exclude=others, **options)
    return llmprune.evaluate(made, DATA[:3], dense=folder)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_each_cell_is_that_of_a_model_pruned_by_hand(folder: Path, tmp_path: Path, method: str) -> None:
    calibration = tiny.ids(4, 16, seed=5)
    options: dict[str, Any] = {"method": method, "calibration": calibration}
    found = llmprune.sensitivity(folder, sparsities=(0.5,), data=DATA, windows=3, **options)
    assert len(found.cells) == tiny.BLOCKS + 7
    cells = {(cell.axis, cell.part): cell for cell in found.cells}
    for key, keep in ((("block", "1"), "layers.1."), (("kind", "up_proj"), ".up_proj.")):
        expected = by_hand(folder, tmp_path, 0.5, keep, **options)
        assert cells[key].perplexity == pytest.approx(expected.perplexity, rel=1e-6)
        assert cells[key].kl_divergence == pytest.approx(expected.kl_divergence, rel=1e-4)
    assert found.dense == pytest.approx(llmprune.evaluate(folder, DATA[:3]).perplexity, rel=1e-6)


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Return a list that grows by the method of every run of `prune` under that name."""
    methods: list[str] = []
    real = llmprune.prune

    def prune(*arguments: Any, **options: Any) -> Any:
        methods.append(options["method"])
        return real(*arguments, **options)

    monkeypatch.setattr(name, prune)
    return methods


def test_a_stopped_run_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"sparsities": (0.3, 0.6), "data": DATA}
    whole = llmprune.sensitivity(folder, tmp_path / "whole", **options)
    journal = (tmp_path / "whole" / room.JOURNAL).read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / room.JOURNAL).write_text("".join(journal[:9]) + journal[9][:30], "utf-8")
    pruned = counted(monkeypatch, "llmprune_eval.sensitivity.prune")
    assert llmprune.sensitivity(folder, tmp_path / "stopped", **options) == whole
    assert len(pruned) == len(whole.cells) - 8
    pruned.clear()
    assert llmprune.sensitivity(folder, tmp_path / "stopped", **options) == whole and pruned == []
    with pytest.raises(RecipeError, match=r"other settings: method \(magnitude, now random\); choose another folder"):
        llmprune.sensitivity(folder, tmp_path / "stopped", **options | {"method": "random"})


@pytest.mark.parametrize(
    ("line", "fault"),
    [("{", "it is no JSON"), ("[]", "it must be an object"), ('{"axis": "block"}', "part is missing")],
)
def test_a_journal_that_is_damaged_is_refused(folder: Path, tmp_path: Path, line: str, fault: str) -> None:
    llmprune.sensitivity(folder, tmp_path, sparsities=(0.5,), data=DATA)
    journal = (tmp_path / room.JOURNAL).read_text("utf-8").splitlines()
    (tmp_path / room.JOURNAL).write_text("\n".join([*journal[:2], line, *journal[3:], ""]), "utf-8")
    with pytest.raises(CheckpointError, match=rf"sensitivity\.jsonl is damaged in line 3: {fault}.*; delete it to"):
        llmprune.sensitivity(folder, tmp_path, sparsities=(0.5,), data=DATA)


def test_results_do_not_go_into_a_folder_that_is_a_model_or_named_as_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(folder.iterdir())
    for out, cause in (
        (folder, "is a model folder: choose another"),
        (Path("demo"), "would be mistaken for the shipped"),
    ):
        for run in (
            lambda out: llmprune.sweep(folder, out, **SWEEP),
            lambda out: llmprune.sensitivity(folder, out, data=DATA),
            lambda out: llmprune.prune(folder, out, method="magnitude", pattern=["50%", "2:4"]),
        ):
            with pytest.raises(CheckpointError, match=cause):
                run(out)
    assert sorted(folder.iterdir()) == before and not (tmp_path / "demo").exists()


def stopping(monkeypatch: pytest.MonkeyPatch, name: str, after: int) -> None:
    """Have Ctrl-C come when a function is called once more than `after` times."""
    module, _, attribute = name.rpartition(".")
    real, calls = getattr(importlib.import_module(module), attribute), list[int]()

    def called(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt(signal.SIGTERM)
        return real(*arguments, **options)

    monkeypatch.setattr(name, called)


@pytest.mark.parametrize(("after", "words"), [(0, "0 figures"), (1, "1 figure"), (3, "3 figures")])
def test_a_stopped_run_says_what_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, words: str
) -> None:
    stopping(monkeypatch, "llmprune_eval.sensitivity.prune", after)
    with pytest.raises(Interrupted) as stopped:
        llmprune.sensitivity(folder, tmp_path / "out", sparsities=(0.5,), data=DATA)
    kept = f"{words} kept in {tmp_path / 'out'}: run the same command again to go on"
    assert stopped.value.args == (kept, signal.SIGTERM)
    assert len((tmp_path / "out" / room.JOURNAL).read_text("utf-8").splitlines()) == 1 + after
    with pytest.raises(KeyboardInterrupt) as without_a_folder:
        llmprune.sensitivity(folder, sparsities=(0.5,), data=DATA)
    assert not isinstance(without_a_folder.value, Interrupted)


@pytest.mark.parametrize("name", [room.RESULT, room.JOURNAL])
def test_what_is_there_stays_whole_where_the_disk_is_full(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    llmprune.sensitivity(folder, tmp_path / "out", sparsities=(0.5,), data=DATA)
    if name == room.JOURNAL:
        with (tmp_path / "out" / name).open("a", encoding="utf-8") as file:
            file.write('{"half a')  # so that a run that goes on writes it anew
    before = {path.name: path.read_text("utf-8") for path in (tmp_path / "out").iterdir()}
    write, met = Path.write_text, list[str]()

    def half(path: Path, text: str, *rest: str) -> int:
        if path.name not in (name, f"{name}.new"):
            return write(path, text, *rest)
        met.append(path.name)
        write(path, text[: len(text) // 2], *rest)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        llmprune.sensitivity(folder, tmp_path / "out", sparsities=(0.5,), data=DATA)
    assert met and {path.name: path.read_text("utf-8") for path in (tmp_path / "out").iterdir()} == before


def test_sensitivity_as_text_as_json_and_as_a_page(folder: Path, tmp_path: Path) -> None:
    found = llmprune.sensitivity(folder, tmp_path / "out", sparsities=(0.5, 0.8), data=DATA)
    lines = str(found).splitlines()
    assert len(lines) == 2 + tiny.BLOCKS + 7 and lines[1].split()[-2:] == ["50%", "80%"]
    assert json.loads((tmp_path / "out" / room.RESULT).read_text("utf-8")) == json.loads(json.dumps(found.to_json()))
    page = (tmp_path / "out" / room.PAGE).read_text("utf-8")
    assert page.count("<svg") == 2 and page.count("<circle") == len(found.cells)


def test_sparsities_may_be_percentages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = list[Any]()
    monkeypatch.setattr(room, "sensitivity", lambda model, sparsities: asked.append(sparsities))
    for text in ("0.3,0.5", "30%, 50%", "30%,0.5"):
        cli.cli.main(["sensitivity", "demo", "--sparsities", text], standalone_mode=False)
    assert asked == [(0.3, 0.5)] * 3
    for text in ("half", "50%%", "%", "0.5,"):
        with pytest.raises(click.BadParameter, match=r"must read like 0\.3,0\.5 or 30%,50%"):
            cli.cli.main(["sensitivity", "demo", "--sparsities", text], standalone_mode=False)


def test_fused_experts_are_kinds_and_are_put_back(tmp_path: Path) -> None:
    folder = tiny.save(tiny.model("qwen3-moe"), tmp_path / "moe")
    found = llmprune.sensitivity(folder, sparsities=(0.5,), data=DATA)
    kinds = found.parts("kind")
    assert {"q_proj", "gate_up_proj", "down_proj"} <= kinds.keys()
    assert all(cells[0].kl_divergence > 0 for cells in kinds.values())
    again = llmprune.sensitivity(folder, sparsities=(0.5,), data=DATA)
    assert again == found  # every cell starts from the dense weights, in whatever order


@pytest.mark.parametrize("sparsities", [(), (0.0,), (1.0,), (0.5, 2.0)])
def test_shares_out_of_range_are_refused(folder: Path, sparsities: tuple[float, ...]) -> None:
    with pytest.raises(RecipeError, match="strictly between 0 and 1"):
        llmprune.sensitivity(folder, sparsities=sparsities, data=DATA)


@pytest.mark.parametrize("inside", ["", "below/it"])
def test_a_file_in_the_place_of_the_folder_is_named_before_work(inside: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for measure in (
        lambda: llmprune.sensitivity("no/model", file / inside),
        lambda: llmprune.sweep("no/model", file / inside, methods=["random"], patterns=["50%"]),
    ):
        with pytest.raises(CheckpointError, match=f"{file} is a file, and a folder is needed there"):
            measure()


SWEEP: dict[str, Any] = {
    "methods": ["magnitude", "wanda"], "patterns": ["50%", "2:4", "70%"], "data": DATA, "calibration": tiny.ids(4, 16),
    "speed": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def swept(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    out = tmp_path_factory.mktemp("sweep")
    return llmprune.sweep(folder, out, **SWEEP), out


def test_a_sweep_has_a_row_for_each_method_and_pattern(swept: tuple[Any, Path], folder: Path) -> None:
    found, out = swept
    assert [(row.method, row.pattern) for row in found.rows] == [
        (method, pattern) for method in SWEEP["methods"] for pattern in SWEEP["patterns"]
    ]
    for row in found.rows:
        again = llmprune.evaluate(row.out, DATA, dense=folder)
        assert (row.perplexity, row.kl_divergence) == (again.perplexity, again.kl_divergence)
        assert row.left == pytest.approx(1 - llmprune.inspect(row.out).sparsity(sites_only=False), abs=1e-4)
        assert row.size < found.dense_size and row.decode is None
        assert runs.read_run(row.out)["one_pass"] == SWEEP["patterns"]
    assert (
        found.one_pass and "one calibration pass" in str(found) and "each row of token ids is one window" in str(found)
    )
    assert json.loads((out / "sweep.json").read_text("utf-8")) == json.loads(json.dumps(found.to_json()))


def test_the_size_is_that_of_the_compressed_tensors(swept: tuple[Any, Path], tmp_path: Path) -> None:
    row = swept[0].rows[1]
    compress(Path(row.out), tmp_path / "small")
    assert row.size == sum(entry.size for entry in Source.open(tmp_path / "small").entries.values())
    assert runs.read_run(row.out)["size"] == {"dense_bytes": swept[0].dense_size, "compressed_bytes": row.size}


def test_the_best_rows_are_those_that_no_other_beats(swept: tuple[Any, Path]) -> None:
    rows = swept[0].rows
    row = table.Row("wanda", "50%", 0.5, 90, 20.0, 0.1, 0.9, 0.1, 1.0, "out", decode=95.0)
    slow, fast, small = row, replace(row, decode=101.0), replace(row, size=110, decode=None)
    marked = table.mark_best([slow, fast, small], dense=10.0, size=100, decode=100.0)
    assert [(row.smallest, row.fastest) for row in marked] == [(True, False), (True, True), (False, False)]
    for row in rows:
        beaten = any(other.size <= row.size and other.perplexity < row.perplexity for other in rows)
        assert row.smallest is not beaten and row.fastest is False
    assert any(row.smallest for row in rows) and str(swept[0]).count("  size") >= 2


def test_the_page_of_a_sweep_has_every_row(swept: tuple[Any, Path]) -> None:
    page = (swept[1] / "sweep.html").read_text("utf-8")
    assert page.count("<svg") == 1 and page.count("<circle") == len(swept[0].rows) + 1
    assert all(f"<td>{row.perplexity:.2f}</td>" in page for row in swept[0].rows)


def test_a_sweep_measures_how_fast_each_decodes(folder: Path, tmp_path: Path) -> None:
    found = llmprune.sweep(
        folder, tmp_path, **SWEEP | {"speed": True, "methods": ["magnitude"], "patterns": ["50%", "2:4"]}
    )
    for row in found.rows:
        saved = runs.read_run(row.out)["speed"]
        ran = saved["sparse"] or saved["dense"]  # on a busy machine dense may have measured faster in every layer
        assert row.layers == ("sparse" if saved["sparse"] else "dense") and saved["device"] == "cpu"
        assert row.decode is not None and row.decode == ran["decode"]["median"] > 0
        rivals = [(found.dense_decode, found.dense), *((other.decode, other.perplexity) for other in found.rows)]
        faster = any((decode or 0) >= row.decode and perplexity < row.perplexity for decode, perplexity in rivals)
        assert row.fastest is not faster
    assert found.dense_decode and "tokens/s: decoding on the CPU" in str(found)
    page = (tmp_path / "sweep.html").read_text("utf-8")
    assert page.count("<svg") == 2 and "Perplexity against decoding speed" in page


def test_separate_runs_are_those_of_prune(folder: Path, tmp_path: Path) -> None:
    one = SWEEP | {"methods": ["wanda"], "patterns": ["2:4"]}
    found = llmprune.sweep(folder, tmp_path / "out", separate=True, **one)
    assert not found.one_pass and "pass of its own" in str(found)
    llmprune.prune(folder, tmp_path / "alone", method="wanda", pattern="2:4", calibration=SWEEP["calibration"])
    alone, swept_one = tiny.tensors(tmp_path / "alone"), tiny.tensors(tmp_path / "out" / "wanda-2of4")
    assert all(tiny.same_bytes(alone[name], swept_one[name]) for name in alone)
    assert llmprune.sweep(folder, tmp_path / "out", separate=True, **one).rows == found.rows
    with pytest.raises(RecipeError, match=r"sweep\.json is of other settings: separate"):
        llmprune.sweep(folder, tmp_path / "out", **one)
    (tmp_path / "out" / "sweep.json").unlink()
    with pytest.raises(RecipeError, match="is of another recipe"):
        llmprune.sweep(folder, tmp_path / "out", **one)


def test_a_sweep_goes_on_where_it_was(
    swept: tuple[Any, Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(swept[1], tmp_path / "sweep"))
    shutil.rmtree(out / "wanda-2of4")
    solved = list[str]()
    solve_site = Branch.solve_site

    def counted_solve(branch: Branch, site: Any, *rest: Any) -> SiteReport:
        solved.append(str(branch.recipe.pattern))
        return solve_site(branch, site, *rest)

    monkeypatch.setattr(Branch, "solve_site", counted_solve)
    found = llmprune.sweep(folder, out, **SWEEP)
    assert solved == ["2:4"] * tiny.BLOCKS * 7
    assert [row.perplexity for row in found.rows] == [row.perplexity for row in swept[0].rows]
    (out / "sweep.json").unlink()
    with pytest.raises(RecipeError, match="is of another recipe"):
        llmprune.sweep(folder, out, **SWEEP | {"seed": 7})


def test_a_narrower_sweep_keeps_the_rows_of_earlier_ones(swept: tuple[Any, Path], folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(swept[1], tmp_path / "sweep"))
    before = (out / "sweep.json").read_bytes()
    for change in ({"seed": 7}, {"data": DATA[:3]}, {"windows": 2}, {"separate": True}):
        with pytest.raises(RecipeError, match=r"sweep\.json is of other settings: .*now.*; choose another folder"):
            llmprune.sweep(folder, out, **SWEEP | {"methods": ["random"], "patterns": ["2:4"]} | change)
        assert (out / "sweep.json").read_bytes() == before and not (out / "random-2of4").exists()
    found = llmprune.sweep(folder, out, **SWEEP | {"methods": ["random", "wanda"], "patterns": ["2:4"]})
    rows = [(row.method, row.pattern, row.perplexity) for row in found.rows]
    assert rows[:-1] == [(row.method, row.pattern, row.perplexity) for row in swept[0].rows]
    assert rows[-1][:2] == ("random", "2:4")
    assert json.loads((out / "sweep.json").read_text("utf-8")) == json.loads(json.dumps(found.to_json()))
    assert f"<td>{rows[0][2]:.2f}</td>" in (out / "sweep.html").read_text("utf-8")
    table = json.loads((out / "sweep.json").read_text("utf-8"))
    for damaged, fault in (
        ("{", "it is no JSON in UTF-8"),
        ("[]", "it must be an object"),
        ("{}", "settings is missing"),
        (json.dumps(table | {"rows": [{"method": "wanda"}]}), r"rows\[0\]\.pattern is missing"),
        (json.dumps(table | {"rows": [table["rows"][0] | {"size": "x"}]}), r"rows\[0\]\.size must be a whole number"),
    ):
        (out / "sweep.json").write_text(damaged, "utf-8")
        with pytest.raises(CheckpointError, match=rf"sweep\.json is damaged: {fault}.*; delete it, the pruned models"):
            llmprune.sweep(folder, out, **SWEEP)
    (out / "sweep.json").unlink()
    assert len(llmprune.sweep(folder, out, **SWEEP).rows) == len(swept[0].rows)


def test_a_sweep_that_was_stopped_within_its_pass_goes_on_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = SWEEP | {"methods": ["wanda"], "patterns": ["2:4"]}
    finish, stages = OnDisk._finish, list[str]()

    def stop(store: OnDisk, stage: Any) -> None:
        finish(store, stage)
        stages.append(stage.name)
        if len(stages) == 2:
            raise KeyboardInterrupt

    kept = f"what is done is kept in {tmp_path / 'out'}: run the same command again"
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=kept):
        patch.setattr(OnDisk, "_finish", stop)
        llmprune.sweep(folder, tmp_path / "out", **one)
    assert (tmp_path / "out" / "wanda-2of4.partial").exists()
    assert len(llmprune.sweep(folder, tmp_path / "out", **one).rows) == 1
    stopping(monkeypatch, "llmprune_eval.sweep.measure", 0)
    with pytest.raises(Interrupted, match=kept):
        llmprune.sweep(folder, tmp_path / "out", **one)
    with pytest.raises(KeyboardInterrupt) as before_work:
        llmprune.sweep(folder, tmp_path / "other", **one)
    assert not isinstance(before_work.value, Interrupted) and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"methods": []}, RecipeError, "at least one method and one pattern"),
        ({"methods": ["wand"]}, RecipeError, "unknown method 'wand'"),
        ({"patterns": ["50%", "4:2"]}, PatternError, "keeps N of every M"),
        ({"patterns": ["50%", "1:7"]}, PatternError, "not divisible by 7"),
        ({"data": "./none.txt"}, DataError, "none.txt"),
        ({"metod": "wanda"}, RecipeError, "unknown option 'metod'"),
        ({"true_sequential": True}, RecipeError, "a sweep: --separate"),
        ({"patterns": ["50%", "0.5"]}, RecipeError, "more than once"),
    ],
)
def test_a_wrong_sweep_is_refused_before_any_work(
    folder: Path, tmp_path: Path, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        llmprune.sweep(folder, tmp_path / "out", **SWEEP | change)
    assert not (tmp_path / "out").exists()
