"""Several results from one calibration pass: a block is loaded once, and solved for each from the same statistics.

The pass runs through the dense model, as no two results would hand the same activations to the blocks after. So a
result differs a little from that of a run of its own, whose blocks see what the pruned ones before them put out; every
result's `llmprune.json` says which it is. As blocks do not depend on each other then, memory is one dense block, its
statistics, and of each result the matrix (of fused experts: the stack of them) that is being solved; with several
ranks, of each result those matrices of a block that the rank solves.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from llmprune import methods, patterns
from llmprune.branches import SOLVE, BesideBranch, Branch, Branches, OnBranch, Pass
from llmprune.calibration import Tokens
from llmprune.checkpoint import Sink, Source
from llmprune.checkpoint.place import require_places
from llmprune.determinism import repeatable
from llmprune.errors import CheckpointError, RecipeError
from llmprune.locate import locate
from llmprune.model import Streamed, load_tokenizer
from llmprune.model.memory import home_device, out_of_memory_in
from llmprune.planning import Plan, draw_tokens, make_plan, warn_of_small_share
from llmprune.portions import Loads
from llmprune.recipe import Recipe
from llmprune.report import Report
from llmprune.run import Run
from llmprune.runs import read_run
from llmprune.statistics import ColumnNorm, Gram
from llmprune.storing import fingerprint, require_alike
from llmprune.team.joining import joined
from llmprune.team.team import Team
from llmprune.thrift import Thrift

_OF_ONE_RESULT = {
    "true_sequential": False,
    "dense_target": 0.0,
    "tune_epochs": 0,
}  # what needs a pass for each, and its default
_NEEDS: list[Any] = [None, ColumnNorm, Gram]  # a later one serves methods that need an earlier one


def prune_patterns(
    model: str | Path, out: Path, chosen: Sequence[str | float], overwrite: bool, resume: bool, options: dict[str, Any]
) -> list[Report]:
    """Prune a model to several patterns, each into a folder below `out` that is named after it.

    Raises:
        LlmpruneError: as `prune_together`; a pattern is given twice.
    """
    if (out / "config.json").exists():
        raise CheckpointError(f"output {out} is a model folder: choose another one for several results")
    folders = [out / patterns.folder_name(patterns.parse(pattern)) for pattern in chosen]
    if not folders or len(set(folders)) < len(folders):
        raise RecipeError(f"patterns {', '.join(map(str, chosen))}: at least one is needed, and none twice")
    results = {folder: {"pattern": pattern} for folder, pattern in zip(folders, chosen, strict=True)}
    return prune_together(model, results, overwrite=overwrite, resume=resume, **options)


def prune_together(
    model: str | Path,
    results: Mapping[Path, Mapping[str, Any]],
    *,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> list[Report]:
    """Prune a model into several folders in one calibration pass, with different methods or patterns.

    Args:
        model: a folder, a Hub id, or `demo`.
        results: for each output folder its `method`, `pattern`, `method_options` and `comparison_group`, as far as
            they are not the same for all.
        overwrite: as for `prune`.
        resume: continue an unfinished run; results that are complete are left as they are.
        options: the fields of `llmprune.Recipe` for all of them.

    Raises:
        LlmpruneError: as `prune`, before any work for any result that cannot be had.
        RecipeError: an option needs a pass for each result.
    """
    recipes = {out: Recipe.of({**options, **result}).for_model(model) for out, result in results.items()}
    for recipe in recipes.values():
        require_shared_inputs(recipe)
    widest = max(recipes.values(), key=lambda recipe: (_NEEDS.index(recipe.needs), recipe.calibrates))
    with joined() as team, repeatable(widest.deterministic):
        complete = team.tell([out for out in recipes if resume and _is_complete(out)])
        done = {out: _finished(out, model, recipes[out]) for out in complete}
        if missing := {out: recipe for out, recipe in recipes.items() if out not in done}:
            done |= _prune(model, missing, widest, overwrite, resume, team)
    return [done[out] for out in recipes]


def summary(reports: Sequence[Report]) -> str:
    """Return the results in a table, with what the pass has taken."""
    lines = [f"{reports[0].model}: {len(reports)} results from one calibration pass through the dense model"]
    lines.append(f"  {'method':12} {'pattern':>8} {'zeros':>9} {'mean error':>11} {'solve':>9}  written to")
    for report in reports:
        error = sum(site.error for site in report.sites) / max(len(report.sites), 1)
        zeros = report.zeros / max(report.site_parameters, 1)
        name, pattern = report.recipe["method"], str(report.recipe["pattern"])
        seconds = report.clock.seconds.get(SOLVE, 0.0)
        lines.append(f"  {name:12} {pattern:>8} {zeros:>9.4%} {error:>11.4g} {seconds:>7.1f} s  {report.out}")
    shared = (f"{phase} {took:.1f} s" for phase, took in reports[0].clock.seconds.items() if phase != SOLVE)
    peak = max(report.peak["host"] for report in reports)
    return "\n".join([*lines, f"  shared time   {', '.join(shared)}", f"  peak memory   {peak / 2**30:.2f} GiB"])


def require_shared_inputs(recipe: Recipe) -> None:
    """Raise RecipeError for what has each result see inputs of its own."""
    for name, default in _OF_ONE_RESULT.items():
        if getattr(recipe, name) != default:
            raise RecipeError(
                f"{name} has each result see what its own pruned matrices put out, and several results share one pass "
                "through the dense model: give one pattern at a time (a sweep: --separate), or leave it out (presets "
                "set it)"
            )
    if recipe.needs not in _NEEDS:
        raise RecipeError(
            f"{methods.name_of(recipe.solver())} needs to know more than norms or the Gram of inputs, and several "
            "results share these: give one pattern at a time (a sweep: --separate)"
        )


def _is_complete(out: Path) -> bool:
    return out.exists() and not out.with_name(out.name + ".partial").exists()


def _finished(out: Path, model: str | Path, recipe: Recipe) -> Report:
    """Return the report of a result that is there.

    Raises:
        RecipeError: it is of another recipe, or of a run of its own.
    """
    report = Report.from_json(read_run(out), out)
    same = report.recipe == json.loads(json.dumps(recipe.to_json())) and report.model == str(model)
    if not same or report.one_pass is None:
        raise RecipeError(f"{out} is of another recipe: choose another folder, or delete it")
    return report


def _prune(
    model: str | Path, recipes: Mapping[Path, Recipe], widest: Recipe, overwrite: bool, resume: bool, team: Team
) -> dict[Path, Report]:
    source = Source.open(locate(model, widest.revision))
    if team.leads:
        require_places(source, list(recipes), overwrite, resume)
    host = Streamed(source, widest.place(), widest.compute_dtype(), widest.trust_remote_code)
    plans = {out: make_plan(host, recipe) for out, recipe in recipes.items()}
    plan = next(iter(plans.values()))
    tokens = draw_tokens(host, widest, lambda: load_tokenizer(source.folder, widest.trust_remote_code))
    warn_of_small_share(plan, widest)
    shared = Report.begin(str(model), widest.to_json(), host, plan, tokens)
    home = home_device(widest.place(), team.share(tokens.rows) if tokens else [], host.config, host.dtype)
    reports = _begun(str(model), recipes, host, plans, tokens)
    decisive = {out: _decisive(source, reports[out], widest) for out in recipes}
    for of_one in decisive.values():
        require_alike(team, of_one)
    sinks = {out: Sink(source, out, decisive[out], resume) for out in recipes}
    with _opened(list(sinks.values())) if team.leads else nullcontext():  # the first rank writes
        branches, thrift, loads = list[Branch](), Thrift(), Loads()
        for out, recipe in recipes.items():
            sinks[out].done = team.tell(sinks[out].done)
            store = (OnBranch if team.leads else BesideBranch)(host, plans[out], sinks[out], reports[out], shared)
            run = Run(host, plans[out], tokens, recipe, home, reports[out], store, thrift, team=team)
            branches.append(Branch.of(run, store, loads))
        with shared.clock.phase("load"), out_of_memory_in("what surrounds the blocks"):
            host.open(home)
        if team.leads:
            with shared.clock.phase("copy"):
                for sink in sinks.values():
                    sink.copy_source()
        stores = Branches(host, [branch.store for branch in branches])
        Pass(host, plan, tokens, widest, home, shared, stores, thrift, tuple(branches), team=team).prune()
        for out, sink in sinks.items():
            if team.leads:
                sink.commit(reports[out].to_json())
            reports[out].out = out
    return reports


def _begun(
    model: str, recipes: Mapping[Path, Recipe], host: Streamed, plans: Mapping[Path, Plan], tokens: Tokens | None
) -> dict[Path, Report]:
    """Return the reports of results that are about to be made."""
    reports = {}
    for out, recipe in recipes.items():
        report = Report.begin(model, recipe.to_json(), host, plans[out], tokens)
        report.one_pass = [
            r["pattern"] for r in (o.to_json() for o in recipes.values()) if r["method"] == report.recipe["method"]
        ]
        report.notes.extend(host.notes())
        if tokens:
            report.notes.append("one of several results of a calibration pass through the dense model")
        reports[out] = report
    return reports


def _decisive(source: Source, report: Report, widest: Recipe) -> dict[str, Any]:
    """Return all that decides the bytes of a result; that its blocks saw the dense model's activations is part of it."""
    return fingerprint(source, report) | {"one_pass": methods.name_of(widest.solver())}


@contextmanager
def _opened(sinks: Sequence[Sink]) -> Iterator[None]:
    """Enter all sinks; if an error ends the pass, one of them says for all that what is done is kept."""
    with ExitStack() as stack:
        for sink in sinks[1:]:
            stack.enter_context(_silent(sink))
        stack.enter_context(sinks[0])
        yield


@contextmanager
def _silent(sink: Sink) -> Iterator[None]:
    """Enter a sink, and let an error pass as it is."""
    sink.__enter__()
    try:
        yield
    except BaseException as error:
        try:
            sink.__exit__(type(error), error, error.__traceback__)
        except type(error):
            pass
        raise
    sink.__exit__(None, None, None)
