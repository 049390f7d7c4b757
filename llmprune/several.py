"""Several results of one model: from one pass through the dense model where they can share it, or one after another."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmprune import patterns
from llmprune.apart import prune_apart
from llmprune.branch import SOLVE
from llmprune.checkpoint.format import holds_compressed
from llmprune.determinism import repeatable
from llmprune.errors import RecipeError
from llmprune.locate import require_folder
from llmprune.opening import Output
from llmprune.options import host_by_default
from llmprune.recipe import Recipe
from llmprune.report import Report
from llmprune.runs import read_run
from llmprune.team.joining import joined
from llmprune.together import prune_together, why_apart, widest_of

_PLAIN = Output()


def prune_patterns(
    model: str | Path, out: Path, chosen: Sequence[str | float], output: Output, options: dict[str, Any]
) -> list[Report]:
    """Prune a model to several patterns, each into a folder below `out` that is named after it.

    Raises:
        LlmpruneError: as `prune_several`; a pattern is given twice.
    """
    require_folder(out)
    folders = [out / patterns.folder_name(patterns.parse(pattern)) for pattern in chosen]
    if not folders or len(set(folders)) < len(folders):
        raise RecipeError(f"patterns {', '.join(map(str, chosen))}: at least one is needed, and none twice")
    results = {folder: {"pattern": pattern} for folder, pattern in zip(folders, chosen, strict=True)}
    apart = any(why_apart(Recipe.of(options | result)) for result in results.values())
    return prune_several(model, results, apart, output, **options)


def prune_several(
    model: str | Path,
    results: Mapping[Path, Mapping[str, Any]],
    apart: bool = False,
    output: Output = _PLAIN,
    **options: Any,
) -> list[Report]:
    """Prune a model into several folders.

    Args:
        model: a folder, a Hub id, or `demo`.
        results: for each output folder its `method`, `pattern`, `method_options` and `comparison_group`, as far as
            they are not the same for all.
        apart: each in a calibration pass of its own, the same to the byte as a run of its own, rather than all in one
            pass through the dense model. They then differ in their patterns alone.
        output: as for `prune`; with `resume`, results that are complete are left as they are.
        options: the fields of `llmprune.Recipe` for all of them.

    Raises:
        LlmpruneError: as `prune`, before any work for any result that cannot be had.
        RecipeError: they cannot share a pass, and are to.
    """
    recipes = {out: Recipe.of({**options, **result}).for_model(model) for out, result in results.items()}
    if not apart:
        for recipe in recipes.values():
            require_shared_inputs(recipe)
    deterministic = any(recipe.deterministic for recipe in recipes.values())
    with joined() as team, repeatable(deterministic), host_by_default():
        complete = team.tell([out for out in recipes if output.resume and _is_complete(out)])
        done = {out: _finished(out, model, recipes[out], apart, output.compressed) for out in complete}
        missing = {out: recipe for out, recipe in recipes.items() if out not in done}
        if missing and apart:
            done |= prune_apart(model, missing, output, team)
        elif missing:
            done |= prune_together(model, missing, widest_of(recipes.values()), output, team)
    return [done[out] for out in recipes]


def require_shared_inputs(recipe: Recipe) -> None:
    """Raise RecipeError for what has each result see inputs of its own."""
    if why := why_apart(recipe):
        raise RecipeError(
            f"{why}, and results are to share one pass through the dense model: give each a pass of its own (a sweep: "
            "--separate)"
        )


def summary(reports: Sequence[Report]) -> str:
    """Return the results in a table, with what all of them have taken."""
    lines = [f"{reports[0].model}: {len(reports)} results {_origin(reports[0])}"]
    lines.append(f"  {'method':12} {'pattern':>8} {'zeros':>9} {'mean error':>11} {'solve':>9}  written to")
    for report in reports:
        error = sum(site.error for site in report.sites) / max(len(report.sites), 1)
        zeros = report.zeros / max(report.site_parameters, 1)
        name, pattern = report.recipe["method"], str(report.recipe["pattern"])
        seconds = report.clock.seconds.get(SOLVE, 0.0)
        lines.append(f"  {name:12} {pattern:>8} {zeros:>9.4%} {error:>11.4g} {seconds:>7.1f} s  {report.out}")
    peak = max(report.peak["host"] for report in reports)
    return "\n".join([*lines, _time(reports), f"  peak memory   {peak / 2**30:.2f} GiB"])


def _origin(report: Report) -> str:
    if report.calibration is None:
        return "without calibration"
    if report.one_pass is None:
        return "from a calibration pass each"
    return "from one calibration pass through the dense model"


def _time(reports: Sequence[Report]) -> str:
    """Return the time beside solving: of results that share a pass it is in the report of each, of others it adds up."""
    shared = reports[0].one_pass is not None
    total = Counter[str]()
    for report in reports[:1] if shared else reports:
        total.update(report.clock.seconds)
    total.pop(SOLVE, None)
    phases = ", ".join(f"{phase} {took:.1f} s" for phase, took in total.items())
    return f"  {'shared time' if shared else 'other time':11}   {phases}"


def _is_complete(out: Path) -> bool:
    return out.exists() and not out.with_name(out.name + ".partial").exists()


def _finished(out: Path, model: str | Path, recipe: Recipe, apart: bool, compressed: bool) -> Report:
    """Return the report of a result that is there.

    Raises:
        CheckpointError: it is no output of llmprune.
        RecipeError: it is of another recipe, of a pass of the other kind, or not compressed as the others will be.
    """
    report = Report.from_json(read_run(out), out)
    if holds_compressed(out) != compressed:
        found, way_out = ("not compressed", "leave out") if compressed else ("compressed", "give")
        raise RecipeError(f"{out} is {found}: {way_out} --compressed, choose another folder, or delete it")
    same = report.recipe == json.loads(json.dumps(recipe.to_json())) and report.model == str(model)
    if not same or (report.one_pass is None) != apart:
        raise RecipeError(f"{out} is of another recipe: choose another folder, or delete it")
    return report
