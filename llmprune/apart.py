"""Prune a model on disk into one folder, or into several one after another, each as a run of its own would to the byte.

Where blocks see what the pruned ones before them put out, no two results can share a pass. They share what comes before:
the model is opened and every plan checked once, the calibration tokens are drawn once, and one pass through the dense
model shares out their sparsities. Memory is that of one run. What they share is timed with the first that needs it.
"""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path

from llmprune.branch import Branch
from llmprune.checkpoint import Sink
from llmprune.errors import saying_what_is_kept
from llmprune.locate import require_own_name
from llmprune.model.memory import out_of_memory_in
from llmprune.opening import Opened, Output, open_model
from llmprune.options import current
from llmprune.recipe import Recipe
from llmprune.report import Report
from llmprune.reverse import ReverseRun
from llmprune.run import Run
from llmprune.statistics import Gradient
from llmprune.storing import Beside, OnDisk, fingerprint, require_alike
from llmprune.team.team import Team


def prune_apart(model: str | Path, recipes: Mapping[Path, Recipe], output: Output, team: Team) -> dict[Path, Report]:
    """Prune a model into one folder after another, once all that can be checked has been for all of them.

    Args:
        recipes: for each output folder; they differ in their pattern, and in what a preset has for it.

    Raises:
        LlmpruneError: as `llmprune.prune`.
        Interrupted: the run was stopped, and a result or a block is kept.
    """
    for out in recipes:
        require_own_name(out)
    widest = max(recipes.values(), key=lambda recipe: recipe.calibrates)
    opened, done = open_model(model, recipes, widest, output, team), dict[Path, Report]()
    kept = saying_what_is_kept(lambda: _kept(done) if len(done) < len(recipes) else "")
    with kept, current(opened.host.device):
        for out, recipe in recipes.items():
            done[out] = _prune(opened, out, recipe, output, team)
    return done


def _prune(opened: Opened, out: Path, recipe: Recipe, output: Output, team: Team) -> Report:
    """Prune into a folder; the model is opened anew, as it was before the result that came first."""
    source, host, plan = opened.source, opened.host, opened.plans[out]
    tokens = opened.tokens if recipe.calibrates else None
    report = Report.begin(opened.name, recipe.to_json(), host, plan, tokens)
    report.notes.extend(host.notes())
    decisive = fingerprint(source, report, output.compressed)
    require_alike(team, decisive)
    sink = Sink(source, out, decisive, output.resume, output.compressed)
    with sink if team.leads else nullcontext():  # the lock, and all that is written, is the first rank's
        sink.done = team.tell(sink.done)
        with report.clock.phase("load"), out_of_memory_in("what surrounds the blocks"):
            host.open(opened.home)
        if team.leads:
            with report.clock.phase("copy"):
                sink.copy_source()
        store = (OnDisk if team.leads else Beside)(host, sink, report)
        branch = Branch(recipe, plan, report, store, host.weight, team=team)
        run_of(recipe).of(branch, host, tokens, opened.home, opened.chooser).prune()
        if team.leads:
            sink.commit(report.to_json())
    report.out = out
    return report


def run_of(recipe: Recipe) -> type[Run]:
    """Return the kind of run that brings what the recipe's methods need."""
    return ReverseRun if recipe.needs is Gradient else Run


def _kept(done: Iterable[Path]) -> str:
    """Return what a run that is stopped leaves, in words; nothing where no result is complete."""
    names = ", ".join(out.name for out in done)
    return names and f"{names} complete, and what is done of the next is kept: run the same with --resume to continue"
