"""Several results from one calibration pass: a block is loaded once, and solved for each from the same statistics.

The pass runs through the dense model, as no two results would hand the same activations to the blocks after. So a
result differs a little from that of a run of its own, whose blocks see what the pruned ones before them put out; every
result's `llmprune.json` says which it is. As blocks do not depend on each other then, memory is one dense block, its
statistics, and of each result the matrix (of fused experts: the stack of them) that is being solved; with several
ranks, of each result those matrices of a block that the rank solves.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from llmprune import methods
from llmprune.branch import Branch
from llmprune.branches import BesideBranch, Branches, OnBranch, Pass
from llmprune.checkpoint import Sink
from llmprune.model.memory import out_of_memory_in
from llmprune.opening import Opened, Output, open_model
from llmprune.options import current
from llmprune.portions import Loads
from llmprune.recipe import Recipe
from llmprune.report import Report
from llmprune.statistics import ColumnNorm, Gram
from llmprune.storing import fingerprint, require_alike
from llmprune.team.team import Team
from llmprune.thrift import Thrift

_OF_ONE_RESULT = {
    "true_sequential": False,
    "dense_target": 0.0,
    "tune_epochs": 0,
}  # what needs a pass for each, and its default
_NEEDS: list[Any] = [None, ColumnNorm, Gram]  # a later one serves methods that need an earlier one


def why_apart(recipe: Recipe) -> str | None:
    """Return why results of a recipe cannot share a pass, in words; None where they can."""
    for name, default in _OF_ONE_RESULT.items():
        if getattr(recipe, name) != default:
            return f"{name} has each result see what its own pruned matrices put out"
    if recipe.needs not in _NEEDS:
        return f"{methods.name_of(recipe.solver())} needs to know more than norms or the Gram of inputs"
    return None


def widest_of(recipes: Iterable[Recipe]) -> Recipe:
    """Return the recipe whose statistic serves all of them."""
    return max(recipes, key=lambda recipe: (_NEEDS.index(recipe.needs), recipe.calibrates))


def prune_together(
    model: str | Path, recipes: Mapping[Path, Recipe], widest: Recipe, output: Output, team: Team
) -> dict[Path, Report]:
    """Prune a model into several folders in one pass.

    Args:
        recipes: for each output folder.
        widest: the recipe whose statistic serves them all, see `widest_of`.

    Raises:
        LlmpruneError: as `llmprune.prune`, before any work for any result that cannot be had.
    """
    opened = open_model(model, recipes, widest, output, team)
    host, plans, tokens, home, chooser = opened.host, opened.plans, opened.tokens, opened.home, opened.chooser
    plan = next(iter(plans.values()))
    shared = Report.begin(opened.name, widest.to_json(), host, plan, tokens)
    reports = _begin_reports(opened, recipes)
    way = {"one_pass": methods.name_of(widest.solver())}  # blocks see the dense model's activations
    decisive = {out: fingerprint(opened.source, reports[out], output.compressed) | way for out in recipes}
    for of_one in decisive.values():
        require_alike(team, of_one)
    sinks = {out: Sink(opened.source, out, decisive[out], output.resume, output.compressed) for out in recipes}
    writing = _entered(list(sinks.values())) if team.leads else nullcontext()  # the first rank writes
    with writing, current(host.device):
        thrift, loads, branches = Thrift(), Loads(), list[Branch]()
        for out, recipe in recipes.items():
            sinks[out].done = team.tell(sinks[out].done)
            store = (OnBranch if team.leads else BesideBranch)(host, plans[out], sinks[out], reports[out], shared)
            weight, solved = store.weight, store.solved
            branches.append(Branch(recipe, plans[out], reports[out], store, weight, thrift, team, loads, solved))
        with shared.clock.phase("load"), out_of_memory_in("what surrounds the blocks"):
            host.open(home)
        if team.leads:
            with shared.clock.phase("copy"):
                for sink in sinks.values():
                    sink.copy_source()
        stores = Branches(host, [branch.store for branch in branches])
        Pass(host, plan, tokens, widest, home, shared, stores, tuple(branches), chooser, thrift, team).prune()
        for out, sink in reversed(sinks.items()):  # the first one last, as it tells what is kept
            if team.leads:
                sink.commit(reports[out].to_json())
            reports[out].out = out
    return reports


def _begin_reports(opened: Opened, recipes: Mapping[Path, Recipe]) -> dict[Path, Report]:
    """Return the reports of results that are about to be made."""
    reports = {}
    for out, recipe in recipes.items():
        report = Report.begin(opened.name, recipe.to_json(), opened.host, opened.plans[out], opened.tokens)
        report.one_pass = [
            r["pattern"] for r in (o.to_json() for o in recipes.values()) if r["method"] == report.recipe["method"]
        ]
        report.notes.extend(opened.host.notes())
        if opened.tokens:
            report.notes.append("one of several results of a calibration pass through the dense model")
        reports[out] = report
    return reports


@contextmanager
def _entered(sinks: Sequence[Sink]) -> Iterator[None]:
    """Enter all sinks; if an error ends the pass, the first one, which has the most, says that what is done is kept."""
    first, *others = sinks
    with ExitStack() as stack:
        for sink in others:
            stack.enter_context(_silent(sink))
        stack.enter_context(first)
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
