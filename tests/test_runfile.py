"""`llmprune.json` is checked in one place: a damaged one is one line for all that read it, and never a traceback."""

import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import pytest

import llmprune
import tiny
from llmprune import card, cli, privacy, runs
from llmprune.errors import CheckpointError
from llmprune.page import comparison, run
from llmprune.report import Report
from llmprune.structure import fault_in, fields_of

RATE = {"decode": {"median": 12.5}}
EVALUATION = {
    "data": "wikitext2", "perplexity": 12.5, "length": 512, "windows": 9, "dtype": "float32", "convention": "none",
    "dense_perplexity": 10.0, "kl_divergence": 0.125, "top1_agreement": 0.875,
}  # fmt: skip
ADDED = {
    "evaluations": [EVALUATION],
    "speed": {"dense": RATE, "sparse": RATE, "batch": 1, "device": "cpu",
              "hardware": {"machine": "x86_64", "threads": 4, "gpu": None}},
    "size": {"dense_bytes": 4_000_000, "compressed_bytes": 2_250_000},
}  # fmt: skip
OPEN = ("left_dense", "timings", "memory_bytes", "versions", "allocation")  # any names may stand in these
WRONG: list[Any] = [None, "x", -1, [], {}]


class Inner(TypedDict, total=False):
    some: tuple[int, int]


class Outer(TypedDict):
    names: list[str]
    shares: dict[str, float | None]
    inner: Inner


@dataclass(frozen=True)
class Row:
    name: str
    best: bool = False


WHOLE = {"names": ["a"], "shares": {"a": 1, "b": None}, "inner": {"some": [1, 2]}, "unknown": object()}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"inner": {}}, None),
        ({"names": "a"}, "names must be a list, not text"),
        ({"names": ["a", 1]}, "names[1] must be text, not a whole number"),
        ({"shares": {"a": True}}, "shares['a'] must be a number, not true or false"),
        ({"shares": {"a": float("inf")}}, "shares['a'] must be a number, not inf"),
        ({"inner": []}, "inner must be an object, not a list"),
        ({"inner": {"some": [1]}}, "inner.some must have 2 entries, not 1"),
        ({"inner": {"some": [1, -1]}}, "inner.some[1] must be a whole number, not one so large or below 0"),
        ({"inner": {"some": [1, 1.5]}}, "inner.some[1] must be a whole number, not 1.5"),
    ],
)
def test_the_first_fault_is_named_with_its_place(change: dict[str, Any], fault: str | None) -> None:
    assert fault_in(WHOLE | change, Outer) == fault


def test_fields_that_lack_are_named_unless_they_need_not_be_there() -> None:
    assert fault_in({"names": [], "shares": {}}, Outer) == "inner is missing"
    assert fault_in([{"name": "a"}, {"best": True}], list[Row]) == "[1].name is missing"
    assert fault_in([], Outer) == "it must be an object, not a list"
    assert Row(**fields_of(Row, {"name": "a", "later": 1})) == Row("a")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run with all that may stand in its report, short."""
    folder = tmp_path_factory.mktemp("models")
    dense = tiny.save(tiny.model("llama"), folder / "dense")
    options: dict[str, Any] = {"calibration": tiny.ids(), "batch_size": 1, "tune_epochs": 1, "allocation": "error"}
    llmprune.prune(dense, folder / "out", method="sparsegpt", pattern="50%", exclude="*.0.mlp.*", **options)
    whole = runs.read_run(folder / "out")
    recipe = whole["recipe"] | {"sparsities": {"*.1.*": "40%"}, "overrides": {"*.2.*": {"method": "wanda"}}}
    recipe = {name: recipe[name] for name in ("method", "pattern", "method_options", "sparsities", "overrides")}
    short: dict[str, Any] = {name: whole[name][:1] for name in ("sites", "tuning", "companions")}
    short |= {name: dict([*whole[name].items()][:1]) for name in OPEN}
    runs.update_run(folder / "out", recipe=recipe, notes=["a note"], one_pass=["50%"], **short, **ADDED)
    return folder / "out"


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of all that is nested in plain values, of lists only of their first entries."""
    entries = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*above, key)
        yield from places(entry, (*above, key))


def damaged(whole: dict[str, Any], place: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """Yield the run without what is at a place, and with something else there."""
    for wrong in [..., *WRONG]:
        run = copy.deepcopy(whole)
        holder: Any = run
        for key in place[:-1]:
            holder = holder[key]
        if wrong is ...:
            del holder[place[-1]]
        else:
            holder[place[-1]] = wrong
        yield run


def use(out: Path) -> None:
    """Read the file by all that read it, and write it anew."""
    found = runs.read_run(out)
    run.run_page(found, []).encode()
    comparison.comparison_page({"a": found}).encode()
    told = privacy.without_paths(found, privacy.private_names(found, None))
    card.card_text(out, told, "a/b", None, {"license": "mit"}).encode()
    str(Report.from_json(found, out))
    runs.add_evaluations(out, [EVALUATION | {"data": "ptb"}])


def test_whatever_field_is_damaged_the_file_is_named_or_of_use_all_the_same(out: Path) -> None:
    whole, refused = runs.read_run(out), 0
    use(out)
    for place in places(whole):
        for run_then in damaged(whole, place):
            (out / "llmprune.json").write_text(json.dumps(run_then), "utf-8")
            try:
                use(out)
            except CheckpointError as error:
                assert f"{out}/llmprune.json is damaged: " in str(error)
                assert str(error).endswith("; restore it, or prune the model again")
                refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"model": NaN}', "it is no JSON in UTF-8 (Out of range float values are not JSON compliant"),
        ('{"model": "\\ud800"}', "it is no JSON in UTF-8 ('utf-8' codec can't encode character"),
        ("", "it is no JSON in UTF-8 (Expecting value: line 1 column 1 (char 0))"),
        ("[" * 100_000, "it is no JSON in UTF-8 (maximum recursion depth exceeded"),
        ("[]", "it must be an object, not a list"),
        ("{}", "model is missing"),
    ],
)
@pytest.mark.parametrize(
    ("words", "way_out"),
    [
        (["report", "OUT"], "restore it, or prune the model again"),
        (["report", "OUT", "OUT", "--to", "page.html"], "restore it, or prune the model again"),
        (["push", "OUT", "a/b"], "restore it, or prune the model again"),
        (["bench", "OUT", "--save"], "restore it, or prune the model again"),
        (["inspect", "OUT"], "delete it to inspect the weights alone"),
    ],
)
def test_every_command_that_reads_a_damaged_file_says_so_in_one_line(
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    way_out: str,
    text: str,
    fault: str,
) -> None:
    monkeypatch.chdir(out.parent)
    (out / "llmprune.json").write_text(text, "utf-8")
    before = sorted(out.parent.rglob("*"))
    monkeypatch.setattr("sys.argv", ["llmprune", *(word.replace("OUT", "out") for word in words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.count("\n") == 1
    assert line.startswith(f"llmprune: out/llmprune.json is damaged: {fault}") and line.endswith(f"; {way_out}\n")
    assert sorted(out.parent.rglob("*")) == before


def test_a_result_with_a_damaged_file_is_not_taken_for_complete(finished: Path, tmp_path: Path) -> None:
    dense, both = finished.parent / "dense", tmp_path / "both"
    options: dict[str, Any] = {"method": "magnitude"}
    llmprune.prune(dense, both, pattern=["50%", "2:4"], **options)
    path = both / "2of4" / "llmprune.json"
    fields = json.loads(path.read_text("utf-8"))
    fields["sites"][0] |= {"later": 1}  # of a newer llmprune
    path.write_text(json.dumps(fields), "utf-8")
    assert len(llmprune.prune(dense, both, pattern=["50%", "2:4"], resume=True, **options)) == 2
    path.write_text(json.dumps(fields | {"sites": [{"name": "a"}]}), "utf-8")
    with pytest.raises(CheckpointError, match=r"2of4/llmprune\.json is damaged: sites\[0\]\.shape is missing; "):
        llmprune.prune(dense, both, pattern=["50%", "2:4"], resume=True, **options)


def test_a_file_that_leads_out_of_its_folder_is_refused(out: Path, tmp_path: Path) -> None:
    (out / "llmprune.json").rename(tmp_path / "elsewhere.json")
    (out / "llmprune.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match="is a link out of the model's folder"):
        runs.read_run(out)
