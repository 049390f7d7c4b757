"""Prune a model with several methods to several patterns, and measure each: a table, and the best for their size."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch

from llmprune.checkpoint import Source
from llmprune.checkpoint.compressed import size_in_bytes
from llmprune.checkpoint.sink import difference
from llmprune.errors import CheckpointError, RecipeError, saying_what_is_kept
from llmprune.locate import locate, require_folder
from llmprune.model import Outline
from llmprune.model.streamed import stored_dtype
from llmprune.opening import Output
from llmprune.page import html
from llmprune.patterns import folder_name, parse
from llmprune.planning import make_plan
from llmprune.recipe import Recipe
from llmprune.runs import add_evaluations, add_speed, read_run, replace_text, update_run
from llmprune.several import prune_several, require_shared_inputs
from llmprune.sparse.bench import Benchmark, bench
from llmprune.structure import fault_in, fields_of
from llmprune.team.joining import joined
from llmprune_eval.pages import sweep_page
from llmprune_eval.perplexity import Evaluation, measure, read_text
from llmprune_eval.subjects import Place, Subject
from llmprune_eval.table import Row, Sweep, mark_best
from llmprune_eval.windows import Amount

RESULT, PAGE = "sweep.json", "sweep.html"
_SETTING: dict[str, Any] = {
    "prompt_tokens": 16,
    "new_tokens": 24,
    "rounds": 3,
    "device": "cpu",
}  # of the benchmark: fits into every context
_OF_ROW = ("method", "method_options", "pattern", "comparison_group")  # what differs between rows


class _Earlier(TypedDict):
    """What a sweep reads of an earlier one's table."""

    settings: dict[str, Any]
    dense_decode: float | None
    rows: list[Row]


def sweep(
    model: str | Path,
    out: str | Path,
    *,
    methods: Sequence[str],
    patterns: Sequence[str],
    data: Any = None,
    length: int | None = None,
    windows: int | None = None,
    streamed: bool | None = None,
    separate: bool = False,
    speed: bool = True,
    **options: Any,
) -> Sweep:
    """Prune a model by every method to every pattern from one calibration pass, and measure each.

    Args:
        out: a folder: every pruned model stays in one below it, and a sweep that was stopped goes on there,
            and one of other methods or patterns adds to the table.
        methods, patterns: as in `llmprune.Recipe`.
        data, length, windows, streamed: as in `llmprune.evaluate`.
        separate: give each a calibration pass of its own, in which its blocks see what its pruned ones put out. One
            pass for all goes through the dense model.
        speed: measure how fast each decodes, on the CPU, as `llmprune bench`; not where the model is streamed.
        options: the other fields of `llmprune.Recipe`, for all of them.

    Raises:
        LlmpruneError: one of its kinds.
    """
    recipes = _recipes(Path(out), methods, patterns)
    require_folder(Path(out))
    amount = Amount(length, windows, options.get("batch_size"))
    _require_feasible(model, [options | recipe for recipe in recipes.values()], separate)
    with saying_what_is_kept(lambda: _kept(Path(out))), joined() as team:
        if team.size > 1 and speed:
            raise RecipeError("several ranks at once measure no speed: --no-speed")
        trusted = bool(options.get("trust_remote_code", False))
        place = Place.of(options.get("device", "auto"), options.get("dtype", "auto"), streamed, trusted)
        text, dense = read_text(model, data), Subject(model, place, revision=options.get("revision"))
        base = measure(dense, text, None, amount)
        settings = _settings(model, base, separate, options | next(iter(recipes.values())))
        earlier = team.tell(_earlier(Path(out) / RESULT, settings) if team.leads else {})
        for at_once in [{folder: recipe} for folder, recipe in recipes.items()] if separate else [recipes]:
            prune_several(model, at_once, separate, Output(resume=True), **options)
        rows, dense_rates = list[Row](), list[float]()
        for folder in recipes:
            found = measure(Subject(folder, place), text, dense, amount)
            if team.leads:
                add_evaluations(folder, [found.to_json()])
            benchmark = bench(folder, **_SETTING, trust_remote_code=trusted) if speed and not dense.streamed else None
            rows += team.tell([_row(folder, found, benchmark, separate)] if team.leads else [])
            dense_rates += [benchmark.dense.decode.median] if benchmark else []
        result = _table(dense, base, rows, dense_rates, settings, earlier)
        if team.leads:
            replace_text(Path(out) / RESULT, json.dumps(result.to_json(), indent=2) + "\n")
            html.write(Path(out) / PAGE, sweep_page(result))
        return result


def _recipes(out: Path, methods: Sequence[str], patterns: Sequence[str]) -> dict[Path, dict[str, str]]:
    """Return the method and the pattern of each row, by the folder of its result."""
    if not methods or not patterns:
        raise RecipeError("a sweep needs at least one method and one pattern")
    recipes = {
        out / f"{method}-{folder_name(parse(pattern))}": {"method": method, "pattern": pattern}
        for method in methods for pattern in patterns
    }  # fmt: skip
    if len(recipes) < len(methods) * len(patterns):
        raise RecipeError(f"a method or a pattern is there more than once: {', '.join([*methods, *patterns])}")
    return recipes


def _table(
    dense: Subject,
    base: Evaluation,
    rows: Sequence[Row],
    dense_rates: Sequence[float],
    settings: dict[str, Any],
    earlier: dict[str, Any],
) -> Sweep:
    """Return the table of the rows, and of those of earlier sweeps that these do not replace.

    Args:
        dense, base: the dense model, and what was measured of it.
        dense_rates: tokens a second that it decoded beside each row; empty where speed was not measured.
        settings: as from `_settings`.
        earlier: the table of earlier sweeps, as from `_earlier`.
    """
    size = sum(entry.size for entry in dense.source.entries.values()) if dense.source else 0
    decode = statistics.median(dense_rates) if dense_rates else earlier.get("dense_decode")
    every = {(old["method"], old["pattern"]): Row(**fields_of(Row, old)) for old in earlier.get("rows", [])}
    every |= {(row.method, row.pattern): row for row in rows}
    marked = mark_best(list(every.values()), base.perplexity, size, decode)
    one_pass, measured = not settings["separate"], (base.data, base.convention, base.perplexity)
    return Sweep(settings["model"], *measured, size, decode, one_pass, marked, settings)


def _kept(out: Path) -> str:
    """Return what a sweep that is stopped leaves, in words; nothing where nothing is there."""
    there = out.is_dir() and any(out.iterdir())
    return f"what is done is kept in {out}: run the same command again to go on" if there else ""


def _settings(model: str | Path, base: Evaluation, separate: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Return what all rows of a table must have in common, so that they can be compared."""
    recipe = Recipe.of(options).for_model(model).to_json()
    common = {name: value for name, value in recipe.items() if name not in _OF_ROW}
    measured = {name: getattr(base, name) for name in ("data", "convention", "length", "windows", "tokens")}
    settings = {"model": str(model), "separate": separate, **measured, "dense": f"{base.perplexity:.4g}"}
    return dict(json.loads(json.dumps(settings | {"recipe": common})))


def _earlier(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the table that an earlier sweep has left, whose rows stay in it; empty where there is none.

    Raises:
        RecipeError: its rows cannot stand in one table with new ones.
        CheckpointError: it cannot be read.
    """
    if not path.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        fault = fault_in(found, _Earlier)
    except (ValueError, RecursionError) as error:
        fault = f"it is no JSON in UTF-8 ({error})"
    if fault is not None:
        raise CheckpointError(f"{path} is damaged: {fault}; delete it, the pruned models beside it stay")
    if cause := difference(found["settings"], settings):
        raise RecipeError(f"{path} is of other settings: {cause}; choose another folder for the sweep, or delete it")
    return found


def _require_feasible(model: str | Path, recipes: Sequence[dict[str, Any]], separate: bool) -> None:
    """Raise, before any work, what would stop one of the runs: a wrong option, a pattern that does not fit."""
    first = Recipe.of(recipes[0])
    source = Source.open(locate(model, first.revision))
    host = Outline(source.folder, source.config, torch.device("cpu"), stored_dtype(source), first.trust_remote_code)
    for recipe in map(Recipe.of, recipes):
        make_plan(host, recipe)
        if not separate:
            require_shared_inputs(recipe)


def _row(folder: Path, found: Evaluation, benchmark: Benchmark | None, separate: bool) -> Row:
    """Return the row of a result, whose size and speed its `llmprune.json` takes note of."""
    dense_bytes, size = size_in_bytes(folder)
    update_run(folder, size={"dense_bytes": dense_bytes, "compressed_bytes": size})
    if benchmark:
        add_speed(folder, benchmark.to_json())
    run = read_run(folder)
    errors, seconds = [site["error"] for site in run["sites"]], run["timings"]
    ran = (benchmark.sparse or benchmark.dense) if benchmark else None
    return Row(
        method=run["recipe"]["method"],
        pattern=run["recipe"]["pattern"],
        left=1.0 - run["sparsity"]["all_parameters"],
        size=size,
        perplexity=found.perplexity,
        kl_divergence=found.kl_divergence or 0.0,
        top1_agreement=found.top1_agreement or 0.0,
        output_error=sum(errors) / len(errors),
        seconds=sum(seconds.values()) if separate else seconds["solve"],
        out=str(folder),
        decode=ran.decode.median if ran else None,
        layers=("sparse" if benchmark.sparse else "dense") if benchmark else None,
    )
