"""The line of a run: the stages of a model, one after another, are loaded, measured, solved, stored and run on."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch

from llmprune import kernels
from llmprune.budget import Choice, choose
from llmprune.calibration import Tokens, batches
from llmprune.errors import RecipeError, ResourceError
from llmprune.methods.magnitude import Magnitude
from llmprune.model import Lanes
from llmprune.model.collect import Collector
from llmprune.model.groups import Group
from llmprune.model.memory import (
    batch_size,
    fits_side_by_side,
    make_room,
    out_of_memory_in,
    statistics_budget,
)
from llmprune.model.sharing import SharedCollector
from llmprune.model.sites import Site, Stage
from llmprune.patterns import Pattern
from llmprune.planning import Host, Plan
from llmprune.portions import Portions
from llmprune.progress import Progress
from llmprune.recipe import Recipe
from llmprune.report import Report, SiteReport
from llmprune.solving import prune_matrix
from llmprune.statistics import CrossGram
from llmprune.storing import Store
from llmprune.team.team import Team
from llmprune.thrift import SolvingError, Thrift
from llmprune.tuning import sequences_at_once, tunable, tune

_AUTOCAST_TOKENS = 2048  # in a forward on a CPU: weights are rounded once for each

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """All that a run needs.

    Attributes:
        host: the model.
        plan: the stages and their sites.
        tokens: the calibration tokens; None where the method needs none.
        recipe: what the user asked for.
        home: device on which hidden states wait between stages.
        report: filled on the way.
        store: takes pruned stages, and knows those of an earlier run that was interrupted.
        thrift: what is given up where memory runs out.
        team: the processes that share the work.
    """

    host: Host
    plan: Plan
    tokens: Tokens | None
    recipe: Recipe
    home: torch.device
    report: Report
    store: Store
    thrift: Thrift = field(default_factory=Thrift)
    team: Team = field(default_factory=Team, kw_only=True)

    def prune(self) -> None:
        """Prune the embedding if that is asked for, then stream the stages; with less at once if memory runs out.

        Raises:
            ResourceError: memory runs out, and nothing more can be given up.
            NumericalError: an activation, a weight or a solution is not finite.
            CheckpointError: a stage cannot be read or stored.
        """
        with out_of_memory_in("the model's weights"):
            patterns = self.patterns()
        store = self.store
        if self.recipe.dense_target and any(site.expert is not None for site in self.plan.all_sites()):
            self.report.notes.append(
                "blocks with experts are fitted to their own outputs: no dense target follows tokens"
            )
        if self.recipe.autocast and self.host.dtype == torch.float32 and not self._autocast():
            self.report.notes.append("autocast: bfloat16 is not faster here, so the calibration ran in float32")
        embedding = self.plan.sites.get(self.host.embedding.name)
        if embedding and not store.has(self.host.embedding):
            store.begin(embedding)
            self._solve(_unfed(embedding), patterns)
            store.keep(self.host.embedding, embedding)
        store.batch_size = store.batch_size or self.team.tell(self._batch_size())
        while not all(store.has(stage) for stage in self.plan.stages):
            try:
                self._stream(patterns)
            except ResourceError as error:
                step = self.thrift.give_up(error, store, self.host.place.type != "cpu") if self._may_retry() else None
                if step is None:
                    raise
                said = str(error)  # not the error itself, from whose traceback all that took the memory hangs
                self.report.retries.append(f"{said.partition(': ')[0]}: {step}")
                _log.warning("%s; %s", said, step)
            make_room()
        self.report.close(self.plan)

    def patterns(self) -> dict[str, Pattern]:
        """Return every site's pattern; what is shared out over the sites the first rank decides, for all."""
        with self.report.clock.phase("allocation") if self.recipe.allocation != "uniform" else nullcontext():
            known = self.store.allocation
            choice = self._choice(known) if self.team.leads else None
            told = self.team.tell(choice.allocation if choice else None)
            choice = choice or self._choice(told)
        self.report.allocation = choice.allocation
        if choice.allocation and not known:
            self.store.keep_allocation(choice.allocation)
        return choice.patterns

    def _choice(self, known: dict[str, Any] | None) -> Choice:
        return choose(self.host, self.plan, self.recipe, self.tokens, self.home, known)

    def _stream(self, patterns: dict[str, Pattern]) -> None:
        """Visit the stages in order: load, collect statistics, solve, store, run on with the pruned weights, free."""
        stages, clock = self.plan.stages, self.report.clock
        with (
            out_of_memory_in(self.host.embedding.name),
            self._lanes() as lanes,
            Progress(len(stages), "pruning", "block") as bar,
        ):
            collector = self._collector(lanes)
            for index, stage in enumerate(stages):
                self.team.at(stage.name)
                with out_of_memory_in(stage.name), self._freed(stage):
                    if self.store.has(stage):
                        self._recall(stage, index, collector)
                    else:
                        self._prune_stage(stage, index, collector, patterns)
                    if lanes and stage is not self.host.head:
                        with clock.phase("forward"):  # after the last block one lane shows that the model ends there
                            lanes.advance(index, at_most=None if index + 1 < len(stages) else 1)
                bar.step()

    def _prune_stage(self, stage: Stage, index: int, collector: Collector | None, patterns: dict[str, Pattern]) -> None:
        clock, sites = self.report.clock, self.plan.sites.get(stage.name, [])
        with clock.phase("load"):
            self.host.load(stage)
            self.store.begin(sites)
        if collector is None:
            self._solve(_unfed(sites), patterns)
        else:
            with closing(collector.groups(index, sites)) as groups:
                self._solve(self._timed(stage, groups), patterns)
            self.report.most_runs = max(self.report.most_runs, collector.most_runs)
            if self.recipe.tune_epochs and sites and stage is not self.host.head:
                self._tune(stage, index, collector.lanes, sites)
        self.report.note_memory(stage.name)
        with clock.phase("write"):
            self.store.keep(stage, sites)

    def _tune(self, stage: Stage, index: int, lanes: Lanes, sites: list[Site]) -> None:
        recipe, tied = self.recipe, self.host.model.all_tied_weights_keys
        inputs_of = tunable(stage, sites, {*tied, *tied.values()})
        with self.report.clock.phase("tune"):
            tuning = tune(lanes, index, inputs_of, recipe.tune_epochs, recipe.tune_rate, recipe.seed)
        self.report.tuning.append(tuning)
        if tuning.kept:
            lanes.retract(range(len(lanes) // 2))

    def _recall(self, stage: Stage, index: int, collector: Collector | None) -> None:
        with self.report.clock.phase("recall"):
            if collector and collector.twins:
                self.host.load(stage)
                collector.run_twins(index)
            self.store.recall(stage)

    def _solve(self, groups: Iterable[Group], patterns: dict[str, Pattern]) -> None:
        for group in groups:
            for site in group.sites:
                job = partial(self._solved, site, self.host.weight(site), group, patterns[site.name])
                self._portions.take(site, job)
        with self.report.clock.phase("exchange"):
            self._portions.settle()

    def solve_site(self, site: Site, weight_OI: torch.Tensor, group: Group, pattern: Pattern) -> None:
        """Overwrite a site's weight with its solution, and report on it."""
        self.report.sites.append(self._solved(site, weight_OI, group, pattern))

    @cached_property
    def _portions(self) -> Portions:
        return Portions(self.team, self.host, self.plan, self.recipe.solver(), self.report)

    def _solved(self, site: Site, weight_OI: torch.Tensor, group: Group, pattern: Pattern) -> SiteReport:
        method = self.recipe.at(site.tensor).solver()
        if group.statistic is None and method.needs is not None:
            method = Magnitude()  # experts that no token reached; the group's notes say so
        seed, share, on_host = self.recipe.seed, self.recipe.dense_target, self.thrift.on_host
        with self.report.clock.phase("solve"), out_of_memory_in(site.name, SolvingError):
            outcome = prune_matrix(site.name, method, weight_OI, group.statistic, pattern, seed, share, on_host)
        return SiteReport.of(site, outcome, pattern, group.statistic, group.notes)

    def _timed(self, stage: Stage, groups: Iterator[Group]) -> Iterator[Group]:
        """Count the time it takes to come by each group, and let go of its statistic after use."""
        while True:
            with self.report.clock.phase("statistics"):
                group = next(groups, None)
            if group is None:
                return
            self.report.note_memory(stage.name)
            yield group
            group.statistic = None

    @contextmanager
    def _freed(self, stage: Stage) -> Iterator[None]:
        """Free a stage after use, and after a failure, when it will be loaded again."""
        try:
            yield
        finally:
            self.host.free(stage)

    def _may_retry(self) -> bool:
        """Forget what was done of the stage at work, if that is possible; with several ranks only one of them knows."""
        return self.team.size == 1 and self.store.go_back()

    def _autocast(self) -> torch.dtype | None:
        """Return the dtype that the forward multiplies in, if not that of the weights."""
        asked = self.recipe.autocast and self.host.dtype == torch.float32
        return torch.bfloat16 if asked and kernels.multiplies_bfloat16(self.host.place) else None

    def _batch_size(self) -> int:
        rows = self.tokens.rows if self.tokens else []
        longest = max((len(row) for row in rows), default=1)
        most = batch_size(longest, self.host.config, self.host.dtype, self.host.place)
        if self._autocast() and self.host.place.type == "cpu":
            most = max(1, _AUTOCAST_TOKENS // longest)
        return self.recipe.batch_size or (sequences_at_once(most, len(rows)) if self.recipe.tune_epochs else most)

    def _lanes(self) -> AbstractContextManager[Lanes | None]:
        if self.tokens is None or self.recipe.needs is None:
            return nullcontext()
        rows = self.team.share(batches(self.tokens, self.store.batch_size))
        rows = [*rows, *rows] if self.recipe.dense_stream else rows
        stops = [*self.host.blocks, self.host.head]
        return Lanes(self.host.model, stops, rows, self.home, self.host.device_of, self._autocast())

    def _collector(self, lanes: Lanes | None) -> Collector | None:
        needs, twins = self.recipe.needs, self.recipe.dense_stream
        if lanes is None or needs is None or self.tokens is None:
            return None
        room = statistics_budget(max(_nbytes(block.module) for block in self.host.blocks), self.host.place)
        budget = room if self.thrift.budget is None else min(room, self.thrift.budget)
        tokens = sum(len(row) for row in self.team.share(self.tokens.rows)) * (2 if twins else 1)
        fits = self.thrift.side_by_side and fits_side_by_side(
            tokens * self.team.neighbours, self.host.config, self.host.dtype, self.host.place
        )
        budget, fits = self.team.tell((budget, fits))
        if self.recipe.dense_target and not fits:
            raise RecipeError(
                f"a dense target holds the activations of {tokens} tokens, too many here: ask for fewer samples"
            )
        statistic = CrossGram if self.recipe.dense_target else needs
        how = lanes, statistic, budget, self.recipe.true_sequential, fits, twins
        shared = partial(SharedCollector, team=self.team, settle=self._portions.settle)
        self.thrift.collector = Collector(*how) if self.team.size == 1 else shared(*how)
        return self.thrift.collector


def _unfed(sites: Iterable[Site]) -> Iterator[Group]:
    return (Group([site]) for site in sites)


def _nbytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
