"""Which sites read the same input, and how experts that few tokens reach borrow from their fellows."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor

from llmprune.model.lanes import Lanes
from llmprune.model.observe import observing
from llmprune.model.sites import Site
from llmprune.statistics import Statistic

StatisticType = type[Statistic]

_log = logging.getLogger(__name__)


@dataclass
class Group:
    """Sites that read the same input, and the one statistic of that input."""

    sites: list[Site]
    calls: int | None = None  # how often the input is read in one forward, where the first lane told
    statistic: Statistic | None = None
    notes: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        """The name that experts which do the same job share; unique for all others."""
        return self.sites[0].family

    @property
    def of_expert(self) -> bool:
        return self.sites[0].of_expert

    @property
    def inputs(self) -> int:
        """Width of the input."""
        return self.sites[0].shape[1]

    @property
    def tokens(self) -> int:
        """Tokens that the statistic has seen."""
        return self.statistic.tokens if self.statistic else 0


def identity(x: Tensor) -> tuple[Any, ...]:
    """Tell tensors apart that are alive at the same time; an empty one has no address."""
    return x.data_ptr() or id(x), x.shape, x.stride(), x._version


def first_lane(
    lanes: Lanes, index: int, sites: Sequence[Site], goes_on: bool = False
) -> tuple[list[Group], dict[Site, list[Tensor]] | None]:
    """Run the first lane through stage `index`, and group the sites by the tensors that they read.

    Tensors are told apart by their addresses. All inputs are held until the end, so that no two can share one.

    Args:
        goes_on: let the lane's output be the one with which `Lanes.advance` goes on.

    Returns:
        the groups in reading order, and each site's inputs. Sites that the lane does not reach, such as experts that it
        did not choose, come last, each in a group of its own. In place of the inputs None, if the model has changed one
        of them after a site has read it.
    """
    inputs: dict[Site, list[Tensor]] = defaultdict(list)
    identities: dict[Site, list[Any]] = defaultdict(list)

    def see(site: Site, x: Tensor) -> None:
        inputs[site].append(x)
        identities[site].append(identity(x))

    with observing(lanes.stage(index), sites, see):
        (lanes.run_ahead if goes_on else lanes.run)(index, 0)
    changed = any([identity(x) for x in seen] != identities[site] for site, seen in inputs.items())
    groups: dict[tuple[Any, ...], Group] = {}
    for site, seen in inputs.items():
        groups.setdefault(tuple(identities[site]), Group([], len(seen))).sites.append(site)
    unreached = [Group([site]) for site in sites if site not in inputs]
    return [*groups.values(), *unreached], None if changed else inputs


def units_of(groups: Sequence[Group]) -> list[list[Group]]:
    """Put experts that do the same job together, at the place of their first: none of them reads another's output."""
    place: dict[str, int] = {}
    for group in groups:  # families that share an input anywhere, as an expert's gate and up do, share a place
        families = {site.family for site in group.sites}
        found = min((place[family] for family in families if family in place), default=len(place))
        place |= {family: place.get(family, found) for family in families}
    ordered = sorted(groups, key=lambda group: place[group.family])
    return [list(unit) for _, unit in groupby(ordered, key=lambda group: place[group.family])]


def with_statistic(unit: Sequence[Group]) -> Iterator[Group]:
    """Yield the groups of a family that can be solved, starved experts fed from the others."""
    if starved := [group for group in unit if is_starved(group)]:
        feed(starved, pool(unit))
    yield from (group for group in unit if group.statistic is not None or group.of_expert)


def is_starved(group: Group) -> bool:
    """Say whether an expert saw fewer tokens than it has inputs, so that some directions were never measured."""
    return group.of_expert and group.tokens < group.inputs


def pool(groups: Sequence[Group], pooled: Statistic | None = None) -> Statistic | None:
    """Add up the statistics of groups, always in their order, so that the sum does not depend on the budget."""
    for group in groups:
        if group.statistic is not None:
            pooled = pooled or type(group.statistic)(group.inputs, group.statistic.device)
            pooled.merge(group.statistic)
    return pooled if pooled is not None and pooled.tokens else None


def feed(starved: Sequence[Group], pooled: Statistic | None) -> None:
    """Shrink the statistics of starved experts towards the pooled one, by 1 - tokens / inputs of the way."""
    family = starved[0].family
    if pooled is None:
        _log.warning("%s: no token reached any expert; all are solved by magnitude", family)
    else:
        _log.info("%s: %d experts saw too few tokens, and share the pooled statistic", family, len(starved))
    for group in starved:
        count = f"{group.tokens} routed tokens for {group.inputs} inputs"
        if pooled is None:
            group.statistic = None
            group.notes = (f"{count}, none for its fellow experts: solved by magnitude",)
            continue
        share = 1 - group.tokens / group.inputs
        group.statistic = group.statistic or type(pooled)(group.inputs, pooled.device)
        group.statistic.shrink(pooled, share)
        group.notes = (f"{count}: statistic shrunk by {share:.1%} towards that of all experts",)
