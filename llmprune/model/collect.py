"""Run a stage on the calibration batches and sum up what its sites are fed: one statistic per shared input."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from llmprune.model.lanes import Lanes
from llmprune.model.sites import Site
from llmprune.statistics import ColumnNorm, Gram

StatisticType = type[ColumnNorm] | type[Gram]


@dataclass
class Group:
    """Sites that read the same input, in the order of the forward, and the one statistic of that input."""

    sites: list[Site]
    calls: int  # how often the input is read in one forward
    statistic: ColumnNorm | Gram | None = field(default=None)


class _Enough(Exception):
    """The last wanted input of a stage's forward has been seen; what would follow is not needed."""


def find_groups(lanes: Lanes, index: int, sites: Sequence[Site]) -> list[Group]:
    """Group the sites of stage `index` by the tensors they read, on the first lane; unread sites are in no group."""
    groups, _ = _first_lane(lanes, index, sites)
    return groups


def collect(lanes: Lanes, index: int, sites: Sequence[Site], needs: StatisticType) -> list[Group]:
    """Group the sites of stage `index` and sum the statistic of each group over all lanes.

    Raises:
        NumericalError: an input holds NaN or infinity.
    """
    groups, inputs = _first_lane(lanes, index, sites)
    for group in groups:
        for x in inputs[group.sites[0]]:
            _add(group, x, needs, lanes.sequences(0))
    inputs.clear()
    sum_groups(lanes, index, groups, needs, first_lane=1)
    return groups


def sum_groups(lanes: Lanes, index: int, groups: Sequence[Group], needs: StatisticType, first_lane: int = 0) -> None:
    """Sum the statistic of known groups over the lanes from `first_lane` on."""
    by_leader = {group.sites[0]: group for group in groups}
    for lane in range(first_lane, len(lanes)):
        waiting = {group.sites[0]: group.calls for group in groups}

        def add(site: Site, x: Tensor, lane: int = lane, waiting: dict[Site, int] = waiting) -> None:
            _add(by_leader[site], x, needs, lanes.sequences(lane))
            waiting[site] -= 1
            if all(calls <= 0 for calls in waiting.values()):
                raise _Enough

        with _observing(list(by_leader), add), suppress(_Enough):
            lanes.run(index, lane)
    _require_finite(groups)


def collect_late(lanes: Lanes, index: int, sites: Sequence[Site], needs: StatisticType) -> list[Group]:
    """Sum the statistics of sites that the first lane did not reach, such as experts that it did not choose.

    Each is a group of its own; sites that no lane reaches are in none.
    """
    groups = {site: Group([site], 0) for site in sites}
    for lane in range(1, len(lanes) if sites else 0):

        def add(site: Site, x: Tensor, lane: int = lane) -> None:
            _add(groups[site], x, needs, lanes.sequences(lane))

        with _observing(sites, add):
            lanes.run(index, lane)
    reached = [group for group in groups.values() if group.statistic is not None]
    _require_finite(reached)
    return reached


def _require_finite(groups: Sequence[Group]) -> None:
    for group in groups:
        if group.statistic is not None:
            group.statistic.require_finite(group.sites[0].name)


def _first_lane(lanes: Lanes, index: int, sites: Sequence[Site]) -> tuple[list[Group], dict[Site, list[Tensor]]]:
    """Run one lane, holding on to every input so that no two of them can share an address, and compare addresses."""
    inputs: dict[Site, list[Tensor]] = defaultdict(list)
    with _observing(sites, lambda site, x: inputs[site].append(x)):
        lanes.run(index, 0)
    groups: dict[tuple[Any, ...], Group] = {}
    for site, seen in inputs.items():
        # An empty tensor has no address: it is told apart by its identity.
        key = tuple((x.data_ptr() or id(x), x.shape, x.stride(), x._version) for x in seen)
        groups.setdefault(key, Group([], len(seen))).sites.append(site)
    return list(groups.values()), inputs


def _add(group: Group, x: Tensor, needs: StatisticType, sequences: int) -> None:
    if group.statistic is None:
        group.statistic = needs(x.shape[-1], x.device)
    # One sequence at a time, as the papers' scripts see them: masks then do not depend on the batch size.
    parts = x.unbind() if x.ndim == 3 and len(x) == sequences else [x.reshape(-1, x.shape[-1])]
    for part in parts:
        group.statistic.add(part, sequences // len(parts))


@contextmanager
def _observing(sites: Sequence[Site], see: Callable[[Site, Tensor], None]) -> Iterator[None]:
    def hook_for(site: Site) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            see(site, x.detach())

        return hook

    handles = [site.module.register_forward_pre_hook(hook_for(site), with_kwargs=True) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
