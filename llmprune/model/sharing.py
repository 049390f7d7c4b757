"""Statistics of what the lanes of several ranks feed to sites, the same to the bit as those of one process."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmprune.errors import UnsupportedModelError
from llmprune.model.collect import Collector, require_all_finite
from llmprune.model.groups import Group, StatisticType
from llmprune.model.lanes import Lanes
from llmprune.model.sites import Site
from llmprune.model.tally import Tally
from llmprune.model.walks import Walks
from llmprune.statistics import CrossGram, Statistic
from llmprune.team.parcels import Parcels
from llmprune.team.team import Team


def collector_of(
    team: Team, lanes: Lanes, needs: StatisticType, budget: int, settle: Callable[[], None] | None = None, **how: bool
) -> Collector:
    """Return what sums up the inputs that the lanes of a team feed to sites.

    Args:
        team: one process, or several whose shares of the lanes are put together.
        lanes, needs, budget: as `Collector` has them; `how` as well.
        settle: as `SharedCollector` has it.
    """
    if team.size == 1:
        return Collector(lanes, needs, budget, **how)
    return SharedCollector(lanes, needs, budget, **how, team=team, settle=settle or (lambda: None))


@dataclass
class SharedCollector(Collector):
    """A `Collector` whose lanes are this rank's share; see there for the other arguments.

    Args:
        team: the ranks, of which the first has the first lane and no other has more of them.
        settle: called before the stage is run anew: brings the weights that other ranks have solved.
    """

    team: Team = field(default_factory=Team)
    settle: Callable[[], None] = lambda: None
    _tally: Tally = field(init=False)  # of what is summed now
    _parcels: Parcels | None = field(default=None, init=False)
    _number: dict[Site, int] = field(default_factory=dict, init=False)  # of a group, by its first site

    def __post_init__(self) -> None:
        tokens = self.team.gather([self.lanes.batch(lane).numel() for lane in range(self._batches)])
        self._turns, self._ranks = len(tokens[0]), sum(bool(own) for own in tokens)  # these are the first ranks
        every = [count for own in tokens for count in own]
        self._uneven = max(every) / min(every)

    def run_dense(self, index: int) -> None:
        self.settle()
        super().run_dense(index)

    def _first_lane(self, index: int, sites: Sequence[Site]) -> tuple[list[Group], dict[Site, list[Tensor]] | None]:
        """As the first rank's first lane tells; the others give no inputs, but an empty mapping where it does."""
        self.settle()
        groups, seen = super()._first_lane(index, sites) if self.team.leads else ([], None)
        number = {site: place for place, site in enumerate(sites)}
        found = [([number[site] for site in group.sites], group.calls) for group in groups]
        found, known = self.team.tell((found, seen is not None))
        groups = [Group([sites[place] for place in places], calls) for places, calls in found]
        return groups, (seen or {}) if known else None

    def _sum(self, index: int, groups: Sequence[Group], seen: Mapping[Site, Sequence[Tensor]] | None = None) -> None:
        self.settle()
        by_leader = {group.sites[0]: group for group in groups}
        self._begin(index, groups)
        for turn in range(self._turns):
            if turn == 0 and seen is not None and self.team.leads:
                for leader in by_leader.keys() & seen.keys():
                    for x in seen[leader]:
                        self._add(by_leader[leader], x, turn)
            elif turn < self._batches:
                self._sum_lane(index, turn, by_leader)
            self._tally.end_turn()
        self._tally.complete()
        require_all_finite(groups)

    def _statistic(self, index: int, site: Site, inputs: Sequence[Tensor]) -> Statistic | None:
        group = Group([site])
        self._begin(index, [group])
        given = dict(zip(self.lanes.waiting_at(index), inputs, strict=True))
        for turn in range(self._turns):
            if turn < self._batches and turn in given:  # those beyond are the dense model's
                self._add(
                    group,
                    given[turn],
                    turn,
                    given.get(turn + self._batches) if issubclass(self.needs, CrossGram) else None,
                )
            self._tally.end_turn()
        self._tally.complete()
        require_all_finite([group])
        return group.statistic

    def _stops(self, index: int, walks: Walks, sites: Sequence[Site]) -> Iterator[tuple[Site, list[Tensor], bool]]:
        """As the first rank's lanes come to them; a rank without lanes follows."""
        own = super()._stops(index, walks, sites)
        number = {site: place for place, site in enumerate(sites)}
        while True:
            self.settle()
            site, inputs, fresh = next(own, (None, [], False))
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

    def _begin(self, index: int, groups: Sequence[Group]) -> None:
        """Begin to sum up what groups of a stage are fed."""
        device = self.lanes.device(index)
        if self._parcels is None or self._parcels.device != device:
            self._parcels = Parcels(self.team, device)
        self._number = {group.sites[0]: number for number, group in enumerate(groups)}
        self._tally = Tally(self._parcels, self.needs, groups, self._uneven)

    def _add(self, group: Group, x: Tensor, lane: int, dense: Tensor | None = None) -> None:
        number = self._number[group.sites[0]]
        for sequences, tensors in self._pieces(x, lane, dense):
            with torch.autocast(x.device.type, enabled=False):  # the forward's, within which inputs are seen
                self._tally.take(number, sequences, tensors)
