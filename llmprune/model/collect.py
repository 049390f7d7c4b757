"""Run a stage on the calibration batches and sum up what its sites are fed: one statistic per shared input."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmprune import kernels
from llmprune.errors import UnsupportedModelError
from llmprune.model.experts import is_of_interface
from llmprune.model.groups import (
    Group,
    StatisticType,
    feed,
    first_lane,
    identity,
    is_starved,
    pool,
    units_of,
    with_statistic,
)
from llmprune.model.lanes import Lanes
from llmprune.model.observe import observing
from llmprune.model.originals import Originals
from llmprune.model.sites import Site
from llmprune.model.walks import Walks
from llmprune.statistics import CrossGram, Gram, Statistic


class _Enough(Exception):
    """The last wanted input of a stage's forward has been seen; what would follow is not needed."""


@dataclass
class Collector:
    """Collects the statistics of one stage after another.

    Args:
        lanes: the calibration batches.
        needs: the kind of statistic.
        budget: bytes that the statistics of a stage may take at once.
        true_sequential: let each site see the earlier ones of its block pruned.
        side_by_side: with `true_sequential`, hold all lanes before each site, so that a stage is run once. Takes the
            memory of all lanes' activations; without it, the stage is run once for each group.
        dense_stream: the second half of the lanes are the same batches again, to go through the dense model. With
            `side_by_side`, statistics that can (`CrossGram`) then also see what the dense model feeds a site.
        stays_dense: what is done with the groups leaves the weights alone, so that `Lanes.advance` need not run a stage
            again. Takes the memory of its outputs beside its inputs.
    """

    lanes: Lanes
    needs: StatisticType
    budget: int
    true_sequential: bool = False
    side_by_side: bool = False
    dense_stream: bool = False
    stays_dense: bool = False
    most_runs: int = field(default=0, init=False)  # how often a stage was run at most to collect its statistics
    together: int = field(default=0, init=False)  # most bytes that several groups of the last stage took at once
    walked: bool = field(default=False, init=False)  # the last stage's lanes were held side by side, and need not be

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
                self.lanes.retract(range(self._batches))  # what is pruned now changes their outputs
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
        if self.dense_stream:
            self.lanes.provide(
                {lane: self.lanes.run(index, lane) for lane in self.lanes.waiting_at(index) if self._is_dense(lane)}
            )

    @property
    def _batches(self) -> int:
        return len(self.lanes) // 2 if self.dense_stream else len(self.lanes)

    def _is_dense(self, lane: int) -> bool:
        return lane >= self._batches

    def _side_by_side(self, index: int, sites: Sequence[Site]) -> Generator[Group, None, list[Site]]:
        """Yield each site as the lanes come to it; return those that no module's call led to."""
        self.walked = not self.dense_stream
        statistic = None
        done = set[Site]()
        dense = Originals(sites) if self.dense_stream else None

        def weights_of(lane: int) -> AbstractContextManager[None]:
            return dense.in_place() if dense and self._is_dense(lane) else nullcontext()

        with Walks(self.lanes, index, sites, weights_of) as walks:
            for site, inputs, fresh in self._stops(index, walks, sites):
                if site in done:
                    raise UnsupportedModelError(f"{site.name} is used twice in its block: leave out --true-sequential")
                if fresh:
                    statistic = None  # before the next one takes its memory
                    statistic = self._statistic(index, site, inputs)
                done.add(site)
                yield Group([site], statistic=statistic)
        self.most_runs = max(self.most_runs, 1)
        return [site for site in sites if site not in done]

    def _stops(self, index: int, walks: Walks, sites: Sequence[Site]) -> Iterator[tuple[Site, list[Tensor], bool]]:
        """Yield each site that the lanes come to, their inputs, and whether these differ from those of the last one."""
        last: list[tuple[Any, Tensor]] = []  # with the inputs, so that no other can take their addresses meanwhile
        for site, inputs in walks.stops():
            seen = [(identity(x), x) for x in inputs]
            fresh = [one for one, _ in seen] != [one for one, _ in last]
            last = seen
            yield site, inputs, fresh

    def _first_lane(self, index: int, sites: Sequence[Site]) -> tuple[list[Group], dict[Site, list[Tensor]] | None]:
        return first_lane(self.lanes, index, sites, self._goes_on(index, lane=0))

    def _goes_on(self, index: int, lane: int) -> bool:
        """Say whether `Lanes.advance` is to go on with the output of a lane's next run, rather than run the stage again.

        It can with that of the first run, unless experts run one by one in it, to be seen: that may round otherwise.
        """
        if not self.stays_dense or self.lanes.is_provided(lane):
            return False
        return not any(map(is_of_interface, self.lanes.stage(index).module.modules()))

    def _statistic(self, index: int, site: Site, inputs: Sequence[Tensor]) -> Statistic | None:
        group = Group([site])
        given = dict(zip(self.lanes.waiting_at(index), inputs, strict=True))
        for lane, x in given.items():
            if not self._is_dense(lane):
                dense = given.get(lane + self._batches) if issubclass(self.needs, CrossGram) else None
                self._add(group, x, lane, dense)
        require_all_finite([group])
        return group.statistic

    def _by_runs(self, index: int, sites: Sequence[Site]) -> Iterator[Group]:
        groups, seen = self._first_lane(index, sites)
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
        """Sum the statistics of groups over all lanes; `seen` is what the first lane fed them, if it has been run."""
        if len(groups) > 1:
            self.together = max(self.together, self._bytes(groups))
        by_leader = {group.sites[0]: group for group in groups}
        for leader, inputs in (seen or {}).items():
            for x in inputs if leader in by_leader else ():
                self._add(by_leader[leader], x, lane=0)
        for lane in range(1 if seen is not None else 0, self._batches):
            self._sum_lane(index, lane, by_leader)
        require_all_finite(groups)

    def _sum_lane(self, index: int, lane: int, by_leader: dict[Site, Group]) -> None:
        waiting = {leader: group.calls for leader, group in by_leader.items()}
        goes_on = self._goes_on(index, lane)

        def see(site: Site, x: Tensor) -> None:
            self._add(by_leader[site], x, lane)
            calls = waiting[site]
            waiting[site] = None if calls is None else calls - 1
            if not goes_on and all(calls is not None and calls <= 0 for calls in waiting.values()):
                raise _Enough

        with observing(self.lanes.stage(index), list(by_leader), see), suppress(_Enough):
            (self.lanes.run_ahead if goes_on else self.lanes.run)(index, lane)

    def _add(self, group: Group, x: Tensor, lane: int, dense: Tensor | None = None) -> None:
        """Add a lane's input, and what the dense model's lane is given in its place."""
        if group.statistic is None:
            group.statistic = self.needs(x.shape[-1], x.device)
        for sequences, (x_TI, *dense_TI) in self._pieces(x, lane, dense):
            with torch.autocast(x.device.type, enabled=False):  # the forward's, within which inputs are seen
                group.statistic.add(x_TI, sequences, *dense_TI)

    def _pieces(self, x: Tensor, lane: int, dense: Tensor | None) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Yield what is to be added at once: of how many sequences, the input and that of the dense model."""
        sequences = self.lanes.sequences(lane)
        both = [self.lanes.as_multiplied(one) for one in (x, dense) if one is not None]
        split = _whole if issubclass(self.needs, Gram) and kernels.takes_batches(both[0]) else _in_sequences
        parts = [split(one, sequences) for one in both]
        for tensors in zip(*parts, strict=True):
            yield sequences // len(parts[0]), tensors


def _in_sequences(x: Tensor, sequences: int) -> Sequence[Tensor]:
    """Split into one part [tokens, inputs] per sequence where the input has them apart.

    So the papers' scripts see them: masks then do not depend on the batch size.
    """
    return x.unbind() if x.ndim == 3 and len(x) == sequences else [x.reshape(-1, x.shape[-1])]


def _whole(x: Tensor, sequences: int) -> Sequence[Tensor]:
    return [x.reshape(-1, x.shape[-1])]


def require_all_finite(groups: Sequence[Group]) -> None:
    for group in groups:
        if group.statistic is not None:
            group.statistic.require_finite(group.sites[0].name)
