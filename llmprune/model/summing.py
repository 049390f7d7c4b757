"""Sum up what the lanes feed to sites: those of one process, or of several ranks to the same bits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmprune import kernels
from llmprune.errors import UnsupportedModelError
from llmprune.model.experts import is_of_interface
from llmprune.model.groups import Group, StatisticType, first_lane, identity
from llmprune.model.lanes import Lanes
from llmprune.model.observe import observing
from llmprune.model.sites import Site
from llmprune.model.tally import Tally
from llmprune.model.walks import Walks
from llmprune.statistics import CrossGram, Gram, Statistic
from llmprune.team.parcels import Parcels
from llmprune.team.team import Team


class _Enough(Exception):
    """The last wanted input of a stage's forward has been seen; what would follow is not needed."""


class Adder:
    """What a `Tally` is for several ranks, for a process on its own: it adds at once what it takes."""

    def __init__(self, needs: StatisticType, groups: Sequence[Group]) -> None:
        self._needs, self._groups = needs, groups

    def take(self, group: int, sequences: int, parts_TI: Sequence[Tensor]) -> None:
        x_TI, *dense_TI = parts_TI
        statistic = self._groups[group].statistic
        if statistic is None:
            statistic = self._groups[group].statistic = self._needs(x_TI.shape[-1], x_TI.device)
        statistic.add(x_TI, sequences, *dense_TI)

    def end_turn(self) -> None:
        """Nothing waits for the end of a turn."""

    def complete(self) -> None:
        """Nothing is left to be added."""


@dataclass
class Summing:
    """Sums over all lanes of a team, turn by turn: in each turn every rank has one lane, the first rank the first.

    Args:
        lanes: this rank's share of the calibration batches; no rank has more of them than the first.
        needs: the kind of statistic.
        dense_stream, stays_dense: see `Collector`.
        team: one process, or several whose lanes are summed together.
        settle: called before a stage is run: brings the weights that other ranks have solved.
    """

    lanes: Lanes
    needs: StatisticType
    dense_stream: bool
    stays_dense: bool
    team: Team
    settle: Callable[[], None]
    _parcels: Parcels | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._tokens = self.team.gather([self.lanes.batch(lane).numel() for lane in range(self.batches)])
        self._turns, self._ranks = len(self._tokens[0]), sum(map(bool, self._tokens))  # these are the first ranks

    @property
    def batches(self) -> int:
        """How many of the lanes are summed up; any after them are the dense model's."""
        return len(self.lanes) // 2 if self.dense_stream else len(self.lanes)

    def groups(self, index: int, sites: Sequence[Site]) -> tuple[list[Group], dict[Site, list[Tensor]] | None]:
        """Run the first lane and group the sites by what they read; see `first_lane`.

        The first rank has that lane. Where it returns the lane's inputs, the others return an empty mapping.
        """
        self.settle()
        groups, seen = list[Group](), None
        if self.team.leads:
            groups, seen = first_lane(self.lanes, index, sites, self._goes_on(index, lane=0))
        number = {site: place for place, site in enumerate(sites)}
        found = [([number[site] for site in group.sites], group.calls) for group in groups]
        found, known = self.team.tell((found, seen is not None))
        groups = [Group([sites[place] for place in places], calls) for places, calls in found]
        return groups, (seen or {}) if known else None

    def sum_up(self, index: int, groups: Sequence[Group], seen: Mapping[Site, Sequence[Tensor]] | None = None) -> None:
        """Run all lanes and sum up what groups are fed.

        Args:
            index: of the stage.
            groups: of which the statistics are filled in.
            seen: what the first lane has fed to sites, as from `groups`, if it need not run again.
        """
        self.settle()
        number = {group.sites[0]: place for place, group in enumerate(groups)}
        calls = {group.sites[0]: group.calls for group in groups}

        def feed(sums: Adder | Tally, lane: int) -> None:
            if lane == 0 and seen is not None and self.team.leads:
                for site, x in ((site, x) for site, inputs in seen.items() if site in number for x in inputs):
                    self._add(sums, number[site], x, lane)
            else:
                self._run(index, lane, calls, lambda site, x: self._add(sums, number[site], x, lane))

        self._each_turn(index, groups, feed)

    def sum_held(self, index: int, site: Site, inputs: Sequence[Tensor]) -> Statistic | None:
        """Return the statistic of what the lanes, held before a site, are about to feed it."""
        group = Group([site])
        given = dict(zip(self.lanes.waiting_at(index), inputs, strict=True))

        def feed(sums: Adder | Tally, lane: int) -> None:
            if lane in given:
                dense = given.get(lane + self.batches) if issubclass(self.needs, CrossGram) else None
                self._add(sums, 0, given[lane], lane, dense)

        self._each_turn(index, [group], feed)
        return group.statistic

    def stops(self, index: int, walks: Walks, sites: Sequence[Site]) -> Iterator[tuple[Site, list[Tensor], bool]]:
        """Yield each site that the lanes come to, their inputs, and whether these differ from those of the last one.

        A rank without lanes follows those of the first.
        """
        own = walks.stops()
        last: list[tuple[Any, Tensor]] = []  # with the inputs, so that no other can take their addresses meanwhile
        number = {site: place for place, site in enumerate(sites)}
        while True:
            self.settle()
            site, inputs = next(own, (None, []))
            seen = [(identity(x), x) for x in inputs]
            fresh = [one for one, _ in seen] != [one for one, _ in last]
            last = seen
            here = self.team.gather(None if site is None else number[site])[: self._ranks]
            if len(set(here)) > 1:
                raise UnsupportedModelError(
                    f"{self.lanes.stage(index).name}: not all sequences pass through it in the same order; "
                    "leave out --true-sequential"
                )
            place, fresh = self.team.tell((here[0], fresh))
            if place is None:
                return
            yield sites[place], inputs, fresh

    def _each_turn(self, index: int, groups: Sequence[Group], feed: Callable[[Adder | Tally, int], None]) -> None:
        """Let `feed` add what each of this rank's lanes feeds to groups, in step with the other ranks."""
        sums = self._sums(index, groups)
        for turn in range(self._turns):
            if turn < self.batches:
                feed(sums, turn)
            sums.end_turn()
        sums.complete()
        for group in groups:
            if group.statistic is not None:
                group.statistic.require_finite(group.sites[0].name)

    def _sums(self, index: int, groups: Sequence[Group]) -> Adder | Tally:
        if self.team.size == 1:
            return Adder(self.needs, groups)
        device = self.lanes.device(index)
        if self._parcels is None or self._parcels.device != device:
            self._parcels = Parcels(self.team, device)
        every = [count for own in self._tokens for count in own]
        return Tally(self._parcels, self.needs, groups, uneven=max(every) / min(every))

    def _goes_on(self, index: int, lane: int) -> bool:
        """Say whether `Lanes.advance` is to go on with the output of a lane's next run, rather than run the stage again.

        It can with that of the first run, unless experts run one by one in it, to be seen: that may round otherwise.
        """
        if not self.stays_dense or self.lanes.is_provided(lane):
            return False
        return not any(map(is_of_interface, self.lanes.stage(index).module.modules()))

    def _run(
        self, index: int, lane: int, calls: Mapping[Site, int | None], see: Callable[[Site, Tensor], None]
    ) -> None:
        """Run a lane through the stage and `see` what sites are fed, at most until each was called so often."""
        waiting = dict(calls)
        goes_on = self._goes_on(index, lane)

        def count(site: Site, x: Tensor) -> None:
            see(site, x)
            left = waiting[site]
            waiting[site] = None if left is None else left - 1
            if not goes_on and all(left is not None and left <= 0 for left in waiting.values()):
                raise _Enough

        with observing(self.lanes.stage(index), list(calls), count), suppress(_Enough):
            (self.lanes.run_ahead if goes_on else self.lanes.run)(index, lane)

    def _add(self, sums: Adder | Tally, group: int, x: Tensor, lane: int, dense: Tensor | None = None) -> None:
        """Add a lane's input, and what the dense model's lane is given in its place."""
        for sequences, parts_TI in self._pieces(x, lane, dense):
            with torch.autocast(x.device.type, enabled=False):  # the forward's, within which inputs are seen
                sums.take(group, sequences, parts_TI)

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
