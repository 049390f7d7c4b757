"""Collect the statistics of a stage group by group, with no more of them at once than there is memory for."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from llmprune.errors import UnsupportedModelError
from llmprune.model.groups import Group, StatisticType, feed, is_starved, pool, units_of, with_statistic
from llmprune.model.lanes import Lanes
from llmprune.model.originals import Originals
from llmprune.model.sites import Site
from llmprune.model.summing import Summing
from llmprune.model.walks import Walks
from llmprune.team.team import Team


@dataclass
class Collector:
    """Collects the statistics of one stage after another.

    Args:
        lanes: this rank's share of the calibration batches.
        needs: the kind of statistic.
        budget: bytes that the statistics of a stage may take at once.
        true_sequential: let each site see the earlier ones of its block pruned.
        side_by_side: with `true_sequential`, hold all lanes before each site, so that a stage is run once. Takes the
            memory of all lanes' activations; without it, the stage is run once for each group.
        dense_stream: the second half of the lanes are the same batches again, to go through the dense model. With
            `side_by_side`, statistics that can (`CrossGram`) then also see what the dense model feeds a site.
        stays_dense: what is done with the groups leaves the weights alone, so that `Lanes.advance` need not run a stage
            again. Takes the memory of its outputs beside its inputs.
        team, settle: see `Summing`.
    """

    lanes: Lanes
    needs: StatisticType
    budget: int
    true_sequential: bool = False
    side_by_side: bool = False
    dense_stream: bool = False
    stays_dense: bool = False
    team: Team = field(default_factory=Team)
    settle: Callable[[], None] = lambda: None
    most_runs: int = field(default=0, init=False)  # how often a stage was run at most to collect its statistics
    together: int = field(default=0, init=False)  # most bytes that several groups of the last stage took at once
    walked: bool = field(default=False, init=False)  # the last stage's lanes were held side by side, and need not be

    def __post_init__(self) -> None:
        self._summing = Summing(self.lanes, self.needs, self.dense_stream, self.stays_dense, self.team, self.settle)

    def groups(self, index: int, sites: Sequence[Site]) -> Generator[Group, None, None]:
        """Yield the groups of stage `index` with their statistics; each is to be solved before the next is asked for.

        Statistics that do not fit into the budget together are collected in several runs, those of the last sites
        first, as solving them does not change what earlier sites read. A site that no lane reaches is not yielded;
        an expert is, with the pooled statistic of its family, or with none where no token reached any of them.

        Raises:
            NumericalError: an input holds NaN or infinity.
        """
        self.together, self.walked = 0, False
        if any(site.module is self.lanes.stage(index).module for site in sites):
            yield from self._by_runs(index, sites)  # the head: nobody needs the logits that it would put out
            return
        if sites and self.holds(sites):
            sites = yield from self._side_by_side(index, sites)
            if sites:
                self.lanes.retract(range(self._summing.batches))  # what is pruned now changes their outputs
        else:
            self.run_dense(index)
        if sites:
            yield from self._by_runs(index, sites)

    def holds(self, sites: Sequence[Site]) -> bool:
        """Say whether all lanes are held before each of these sites of a block."""
        experts = any(site.of_expert for site in sites)  # lanes do not come to all of them
        return self.true_sequential and self.side_by_side and not experts

    def run_dense(self, index: int) -> None:
        """Run the dense model's lanes through stage `index` while its weights still are dense."""
        self.settle()
        if self.dense_stream:
            self.lanes.provide(
                {lane: self.lanes.run(index, lane) for lane in self.lanes.waiting_at(index) if self._is_dense(lane)}
            )

    def _is_dense(self, lane: int) -> bool:
        return lane >= self._summing.batches

    def _side_by_side(self, index: int, sites: Sequence[Site]) -> Generator[Group, None, list[Site]]:
        """Yield each site as the lanes come to it; return those that no module's call led to."""
        self.walked = not self.dense_stream
        statistic = None
        done = set[Site]()
        dense = Originals(sites) if self.dense_stream else None

        def weights_of(lane: int) -> AbstractContextManager[None]:
            return dense.in_place() if dense and self._is_dense(lane) else nullcontext()

        with Walks(self.lanes, index, sites, weights_of) as walks:
            for site, inputs, fresh in self._summing.stops(index, walks, sites):
                if site in done:
                    raise UnsupportedModelError(f"{site.name} is used twice in its block: leave out --true-sequential")
                if fresh:
                    statistic = None  # before the next one takes its memory
                    statistic = self._summing.sum_held(index, site, inputs)
                done.add(site)
                yield Group([site], statistic=statistic)
        self.most_runs = max(self.most_runs, 1)
        return [site for site in sites if site not in done]

    def _by_runs(self, index: int, sites: Sequence[Site]) -> Iterator[Group]:
        groups, seen = self._summing.groups(index, sites)
        units = units_of(groups)
        if not self.true_sequential and self._bytes(groups) <= self.budget:
            self._sum(index, groups, seen)
            if seen:
                seen.clear()
            for unit in units:
                yield from with_statistic(unit)
            self.most_runs = max(self.most_runs, 1)
            return
        seen = None
        runs = 0
        for unit in units if self.true_sequential else reversed(units):
            parts = list(self._parts(unit))
            yield from self._in_parts(index, parts) if len(parts) > 1 else self._at_once(index, unit)
            runs += len(parts)
        self.most_runs = max(self.most_runs, runs)

    def demand(self, groups: Sequence[Group]) -> tuple[int, int]:
        """Return the most bytes that the statistics of a stage's groups take, and in how many runs they are summed."""
        if not self.true_sequential and self._bytes(groups) <= self.budget:
            return self._bytes(groups), 1
        units = [list(self._parts(unit)) for unit in units_of(groups)]
        pooled = [self._bytes(parts[0][:1]) if len(parts) > 1 else 0 for parts in units]
        most = [max(map(self._bytes, parts)) for parts in units]
        runs = 1 if self.holds([site for group in groups for site in group.sites]) else sum(map(len, units))
        return max(map(sum, zip(most, pooled, strict=True)), default=0), runs

    def _at_once(self, index: int, unit: list[Group]) -> Iterator[Group]:
        self._sum(index, unit)
        yield from with_statistic(unit)

    def _in_parts(self, index: int, parts: list[list[Group]]) -> Iterator[Group]:
        """Yield the experts of a family part by part; starved ones wait until all are pooled, then run once more."""
        pooled, starved = None, list[Group]()
        for part in parts:
            self._sum(index, part)
            pooled = pool(part, pooled)
            for group in part:
                if is_starved(group):
                    group.statistic = None
                    starved.append(group)
                else:
                    yield group
        for part in self._parts(starved):
            self._sum(index, part)
            feed(part, pooled)
            yield from part

    def _parts(self, unit: Sequence[Group]) -> Iterator[list[Group]]:
        """Split a family into parts whose statistics fit into the budget, each of one group at least."""
        part: list[Group] = []
        for group in unit:
            if part and self._bytes([*part, group]) > self.budget:
                yield part
                part = []
            part.append(group)
        if part:
            yield part

    def _bytes(self, groups: Sequence[Group]) -> int:
        return sum(self.needs.nbytes(group.inputs) for group in groups)

    def _sum(self, index: int, groups: Sequence[Group], seen: Mapping[Site, Sequence[Tensor]] | None = None) -> None:
        if len(groups) > 1:
            self.together = max(self.together, self._bytes(groups))
        self._summing.sum_up(index, groups, seen)
