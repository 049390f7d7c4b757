"""Results of a model on disk, one after another, each to the byte that of a run of its own; one is the plain case.

Where blocks see what the pruned ones before them put out, no two results can share a pass. They share what comes before:
the model is opened and every plan checked once, the calibration tokens are drawn once, and one pass through the dense
model shares out their sparsities. Memory is that of one run. What they share is timed with the first that needs it.
"""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from llmprune.budget import Chooser
from llmprune.calibration import Tokens
from llmprune.checkpoint import Sink, Source
from llmprune.checkpoint.compressed import least_sparsity
from llmprune.checkpoint.place import require_places
from llmprune.errors import RecipeError, saying_what_is_kept
from llmprune.locate import locate, require_own_name
from llmprune.model import Streamed, load_tokenizer
from llmprune.model.memory import home_device, out_of_memory_in
from llmprune.model.streamed import stored_dtype
from llmprune.planning import Plan, draw_tokens, make_plan, warn_of_small_share
from llmprune.recipe import Recipe
from llmprune.report import Report
from llmprune.reverse import ReverseRun
from llmprune.run import Run
from llmprune.statistics import Gradient
from llmprune.storing import Beside, OnDisk, fingerprint, require_alike
from llmprune.team.team import Team


@dataclass(frozen=True)
class Output:
    """What `prune` is told of its output folders."""

    overwrite: bool = False
    resume: bool = False
    compressed: bool = False


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
    first = max(recipes.values(), key=lambda recipe: recipe.calibrates)
    source = Source.open(locate(model, first.revision))
    if team.leads:
        require_places(source, list(recipes), output.overwrite, output.resume, output.compressed)
    host = Streamed(source, first.place(), first.compute_dtype(), first.trust_remote_code)
    plans = {out: make_plan(host, recipe) for out, recipe in recipes.items()}
    if output.compressed:
        for recipe in recipes.values():
            _require_zeros_enough(recipe, stored_dtype(source).itemsize)
    tokens = draw_tokens(host, first, lambda: load_tokenizer(source.folder, first.trust_remote_code))
    warn_of_small_share(next(iter(plans.values())), first)
    rows = team.share(tokens.rows) * (2 if first.dense_stream else 1) if tokens else []
    home = home_device(first.place(), rows, host.config, host.dtype)
    chooser = Chooser(team, host, tokens, home, list(recipes.values()))
    line, done = _Line(str(model), source, host, tokens, home, chooser, output, team), dict[Path, Report]()
    with saying_what_is_kept(lambda: _kept(done) if len(done) < len(recipes) else ""):
        for out, recipe in recipes.items():
            done[out] = line.prune(out, recipe, plans[out])
    return done


@dataclass(frozen=True)
class _Line:
    """What the results have in common."""

    model: str
    source: Source
    host: Streamed
    tokens: Tokens | None
    home: torch.device
    chooser: Chooser
    output: Output
    team: Team

    def prune(self, out: Path, recipe: Recipe, plan: Plan) -> Report:
        """Prune into a folder; the model is opened anew, as it was before the result that came first."""
        source, host, team, output = self.source, self.host, self.team, self.output
        tokens = self.tokens if recipe.calibrates else None
        report = Report.begin(self.model, recipe.to_json(), host, plan, tokens)
        report.notes.extend(host.notes())
        decisive = fingerprint(source, report) | ({"compressed": True} if output.compressed else {})
        require_alike(team, decisive)
        sink = Sink(source, out, decisive, output.resume, output.compressed)
        with sink if team.leads else nullcontext():  # the lock, and all that is written, is the first rank's
            sink.done = team.tell(sink.done)
            with report.clock.phase("load"), out_of_memory_in("what surrounds the blocks"):
                host.open(self.home)
            if team.leads:
                with report.clock.phase("copy"):
                    sink.copy_source()
            store, kind = (OnDisk if team.leads else Beside)(host, sink, report), run_of(recipe)
            kind(host, plan, tokens, recipe, self.home, report, store, team=team, chooser=self.chooser).prune()
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


def _require_zeros_enough(recipe: Recipe, size: int) -> None:
    """Refuse to compress what would not become smaller: a bit for each weight has to be saved first."""
    if recipe.target().sparsity <= least_sparsity(size):
        raise RecipeError(
            f"{recipe.pattern} leaves too few zeros for a compressed output to be smaller, which takes more than "
            f"{least_sparsity(size):.1%}: leave out --compressed"
        )
