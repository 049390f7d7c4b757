"""The line of a run: the stages of a model, one after another, are loaded, measured, solved, stored and run on."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from llmprune.budget import Chooser
from llmprune.calibration import Tokens
from llmprune.errors import ResourceError
from llmprune.feeding import Feed
from llmprune.methods.magnitude import Magnitude
from llmprune.model import Lanes
from llmprune.model.collect import Collector
from llmprune.model.groups import Group
from llmprune.model.memory import make_room, out_of_memory_in
from llmprune.model.sites import Site, Stage
from llmprune.patterns import Pattern
from llmprune.planning import Host, Plan
from llmprune.portions import Portions
from llmprune.progress import Progress
from llmprune.recipe import Recipe
from llmprune.report import Report, SiteReport
from llmprune.solving import prune_matrix
from llmprune.storing import Store
from llmprune.team.team import Team
from llmprune.thrift import SolvingError, Thrift
from llmprune.tuning import tune


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
        chooser: chooses the sites' patterns; None to make one for this run alone.
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
    chooser: Chooser | None = field(default=None, kw_only=True)

    def prune(self) -> None:
        """Prune the embedding if that is asked for, then stream the stages; with less at once if memory runs out.

        Raises:
            ResourceError: memory runs out, and nothing more can be given up.
            NumericalError: an activation, a weight or a solution is not finite.
            CheckpointError: a stage cannot be read or stored.
        """
        with out_of_memory_in("the model's weights"):
            patterns = self.patterns()
        self.report.notes.extend(self._feed.notes(self.plan))
        store, embedding = self.store, self.plan.sites.get(self.host.embedding.name)
        if embedding and not store.has(self.host.embedding):
            store.begin(self.host.embedding, embedding)
            self._solve(_unfed(embedding), patterns)
            store.keep(self.host.embedding, embedding)
        store.batch_size = store.batch_size or self.team.tell(self._feed.batch_size())
        while not all(store.has(stage) for stage in self.plan.stages):
            try:
                self._stream(patterns)
            except ResourceError as error:
                if self.team.size > 1:
                    raise  # only one of the ranks knows that memory ran out
                self._portions.forget()
                self.thrift.retry(error, self.store, self.report, self.host.device.type != "cpu")
            else:
                continue
            make_room()  # not above, where the error holds on to what it met
        self.close()

    def close(self) -> None:
        """End the report, with the most memory that any of the ranks needed."""
        self.report.close(self.plan)
        peaks = self.team.gather(self.report.peak)
        self.report.peak = {on: max(peak[on] for peak in peaks) for on in self.report.peak}

    def patterns(self) -> dict[str, Pattern]:
        """Return every site's pattern, the same for all ranks."""
        known = self.store.allocation
        self.team.at("the allocation of sparsity")
        with self.report.clock.phase("allocation") if self.recipe.allocation != "uniform" else nullcontext():
            chooser = self.chooser or Chooser(self.team, self.host, self.tokens, self.home, [self.recipe])
            choice = chooser.choose(self.plan, self.recipe, known)
        self.report.allocation = choice.told
        if choice.allocation and not known:
            self.store.keep_allocation(choice.allocation)
        return choice.patterns

    def _stream(self, patterns: dict[str, Pattern]) -> None:
        """Visit the stages in order: load, collect statistics, solve, store, run on with the pruned weights, free."""
        stages, clock = self.plan.stages, self.report.clock
        with (
            out_of_memory_in(self.host.embedding.name),
            self._feed.lanes(self.store.batch_size) as lanes,
            Progress(len(stages), "pruning", "block") as bar,
        ):
            collector = self.thrift.collector = self._feed.collector(lanes, self.thrift, self._portions.settle)
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
            self.store.begin(stage, sites)
        if collector is None:
            self._solve(_unfed(sites), patterns)
        else:
            with closing(collector.groups(index, sites)) as groups:
                self._solve(self._timed(stage, groups), patterns)
            self.report.most_runs = max(self.report.most_runs, collector.most_runs)
            if self.recipe.tune_epochs and sites and stage is not self.host.head:
                self._tune(index, collector.lanes, sites)
        self.report.note_memory(stage.name)
        with clock.phase("write"):
            self.store.keep(stage, sites)

    def _tune(self, index: int, lanes: Lanes, sites: list[Site]) -> None:
        recipe, tied = self.recipe, self.host.model.all_tied_weights_keys
        fixed = {*tied, *tied.values()}
        with self.report.clock.phase("tune"):
            tuning = tune(lanes, index, sites, fixed, recipe.tune_epochs, recipe.tune_rate, recipe.seed, self.team)
        self.report.tuning.append(tuning)

    def _recall(self, stage: Stage, index: int, collector: Collector | None) -> None:
        """Load a stage that an earlier run has pruned; the dense model's lanes are led through it while it is dense."""
        with self.report.clock.phase("recall"):
            if collector and collector.dense_stream:
                self.host.load(stage)
                collector.run_dense(index)
            self.store.recall(stage)

    def _solve(self, groups: Iterable[Group], patterns: dict[str, Pattern]) -> None:
        """Solve the sites of each group as it comes, each by one rank, and bring all solutions to all ranks."""
        for group in groups:
            for site in group.sites:
                job = partial(self.solve_site, site, self.host.weight(site), group, patterns[site.name])
                self._portions.take(site, job)
        with self.exchanging():
            self._portions.settle()

    def exchanging(self) -> AbstractContextManager[None]:
        """Return the context that times how solved matrices are handed to all ranks; one process has none to hand."""
        return self.report.clock.phase("exchange") if self.team.size > 1 else nullcontext()

    @cached_property
    def _feed(self) -> Feed:
        return Feed(self.host, self.tokens, self.recipe, self.home, self.team)

    @cached_property
    def _portions(self) -> Portions:
        return Portions(self.team, self.host.weight, self.plan, self.recipe.solver(), self.report)

    def solve_site(self, site: Site, weight_OI: torch.Tensor, group: Group, pattern: Pattern) -> SiteReport:
        """Overwrite a site's weight with its solution, and return the report on it."""
        method = self.recipe.at(site.tensor).solver()
        if group.statistic is None and method.needs is not None:
            method = Magnitude()  # experts that no token reached; the group's notes say so
        seed, towards, on_host = self.recipe.seed, self.recipe.dense_target, self.thrift.on_host
        with self.report.clock.phase("solve"), out_of_memory_in(site.name, SolvingError):
            outcome = prune_matrix(site.name, method, weight_OI, group.statistic, pattern, seed, towards, on_host)
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


def _unfed(sites: Iterable[Site]) -> Iterator[Group]:
    return (Group([site]) for site in sites)
