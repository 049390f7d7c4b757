"""The line of a run: the stages of a model, one after another, are loaded, measured, solved, stored and run on."""

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch

from llmprune.branch import Branch
from llmprune.budget import Chooser
from llmprune.calibration import Tokens
from llmprune.errors import ResourceError
from llmprune.feeding import Feed
from llmprune.model import Lanes
from llmprune.model.collect import Collector
from llmprune.model.groups import Group
from llmprune.model.memory import make_room, out_of_memory_in
from llmprune.model.sites import Site, Stage
from llmprune.planning import Host, Plan
from llmprune.progress import Progress
from llmprune.recipe import Recipe
from llmprune.report import Report
from llmprune.storing import Store
from llmprune.team.team import Team
from llmprune.thrift import Thrift
from llmprune.tuning import tune


@dataclass(frozen=True)
class Run:
    """All that a run needs.

    Attributes:
        host: the model.
        plan: the stages and their sites.
        tokens: the calibration tokens; None where the method needs none.
        recipe: what the user asked for; of several results, the one whose statistic serves all of them.
        home: device on which hidden states wait between stages.
        report: filled on the way.
        store: takes pruned stages, and knows those of an earlier run that was interrupted.
        branches: the results.
        chooser: chooses the sites' patterns.
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
    branches: tuple[Branch, ...]
    chooser: Chooser
    thrift: Thrift
    team: Team

    @classmethod
    def of(cls, branch: Branch, host: Host, tokens: Tokens | None, home: torch.device, chooser: Chooser) -> Self:
        """Return the run for one result, which prunes the model itself."""
        own = branch.recipe, home, branch.report, branch.store
        return cls(host, branch.plan, tokens, *own, (branch,), chooser, branch.thrift, branch.team)

    def prune(self) -> None:
        """Prune the embedding if that is asked for, then stream the stages; with less at once if memory runs out.

        Raises:
            ResourceError: memory runs out, and nothing more can be given up.
            NumericalError: an activation, a weight or a solution is not finite.
            CheckpointError: a stage cannot be read or stored.
        """
        with out_of_memory_in("the model's weights"):
            for branch in self.branches:
                branch.choose(self.chooser)
        self.report.notes.extend(self._feed.notes(self.plan))
        store, embedding = self.store, self.plan.sites.get(self.host.embedding.name)
        if embedding and not store.has(self.host.embedding):
            store.begin(self.host.embedding, embedding)
            self._solve(self.host.embedding, _unfed(embedding))
            store.keep(self.host.embedding, embedding)
        store.batch_size = store.batch_size or self.team.tell(self._feed.batch_size())
        while not all(store.has(stage) for stage in self.plan.stages):
            try:
                self._stream()
            except ResourceError as error:
                if self.team.size > 1:
                    raise  # only one of the ranks knows that memory ran out
                for branch in self.branches:
                    branch.portions.forget()
                self.thrift.retry(error, self.store, self.report, self.host.device.type != "cpu")
            else:
                continue
            make_room()  # not above, where the error holds on to what it met
        for branch in self.branches:
            branch.close()

    def _stream(self) -> None:
        """Visit the stages in order: load, collect statistics, solve, store, run on with the pruned weights, free."""
        stages, clock = self.plan.stages, self.report.clock
        with (
            out_of_memory_in(self.host.embedding.name),
            self._feed.lanes(self.store.batch_size) as lanes,
            Progress(len(stages), "pruning", "block") as bar,
        ):
            collector = self.thrift.collector = self._feed.collector(lanes, self.thrift, self._settle)
            for index, stage in enumerate(stages):
                self.team.at(stage.name)
                with out_of_memory_in(stage.name), self._freed(stage):
                    if self.store.has(stage):
                        self._recall(stage, index, collector)
                    else:
                        self._prune_stage(stage, index, collector)
                    if lanes and stage is not self.host.head:
                        with clock.phase("forward"):  # after the last block one lane shows that the model ends there
                            lanes.advance(index, at_most=None if index + 1 < len(stages) else 1)
                bar.step()

    def _prune_stage(self, stage: Stage, index: int, collector: Collector | None) -> None:
        clock, sites = self.report.clock, self.plan.sites.get(stage.name, [])
        with clock.phase("load"):
            self.host.load(stage)
            self.store.begin(stage, sites)
        if collector is None:
            self._solve(stage, _unfed(sites))
        else:
            with closing(collector.groups(index, sites)) as groups:
                self._solve(stage, self._timed(stage, groups))
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

    def _solve(self, stage: Stage, groups: Iterable[Group]) -> None:
        """Solve the groups of a stage as they come, in all branches that lack it, and bring all solutions to all ranks."""
        branches = [branch for branch in self.branches if not branch.store.has(stage)]
        for group in groups:
            for branch in branches:
                branch.solve(group)
        with self.report.clock.phase("exchange") if self.team.size > 1 else nullcontext():
            for branch in branches:
                branch.portions.settle()

    def _settle(self) -> None:
        """Bring what is solved of a stage to all ranks before it is run again."""
        for branch in self.branches:
            branch.portions.settle()

    @cached_property
    def _feed(self) -> Feed:
        return Feed(self.host, self.tokens, self.recipe, self.home, self.team)

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
