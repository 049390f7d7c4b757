"""An exact budget, split over sites so that what removing weights costs is least in all.

Shape suffixes: E edges between the steps of a site, S steps.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_STEPS = 64  # in which a site's range is gone through; the last step of all is cut to the weight
_PINNED = 1e100
_MOST = 200.0  # of a cost's logarithm
_LEAST = 1e-30  # of a cost, whose logarithm is taken

Floats = NDArray[np.float64]
Cost = Callable[[Floats], Floats]  # of a site, at shares of removed weights


@dataclass(frozen=True)
class Curve:
    """A cost measured at a few rising shares: between them, and beyond, its logarithm is a straight line.

    Output errors of a pruned layer grow about geometrically with sparsity, so that few points are enough.
    `row_levels` tell what an error in each output costs beside the others, where that is known: see `Count`.
    """

    shares: tuple[float, ...]
    costs: tuple[float, ...]
    row_levels: bytes = b""

    def __call__(self, at_E: Floats) -> Floats:
        log = np.log(np.maximum(self.costs, _LEAST))
        shares = np.asarray(self.shares)
        segment = np.clip(np.searchsorted(shares, at_E) - 1, 0, len(shares) - 2)
        slope = np.diff(log) / np.diff(shares)
        log_E = log[segment] + slope[segment] * (at_E - shares[segment])
        cost_E: Floats = np.exp(np.minimum(log_E, _MOST))
        return cost_E


def wish(share: float, weights: int) -> Cost:
    """Return the cost of a site that is to come as near to a share as the budget lets it."""
    return lambda at_E: weights * (at_E - share) ** 2


def pinned(share: float) -> Cost:
    """Return the cost of a site that is to have exactly this share, rounded down to whole weights.

    No measured cost comes near it, and going over is far worse than going under.
    """
    return lambda at_E: _PINNED * np.where(at_E > share, 1e6 * (at_E - share), share - at_E)


def bounds(sparsity: float, span: float) -> tuple[float, float]:
    """Return the least and the largest share of a site: `span` away, but never past half the way to nothing or all."""
    return max(sparsity - span, sparsity / 2), min(sparsity + span, (1 + sparsity) / 2)


def split(costs: Mapping[str, Cost], sizes: Mapping[str, int], sparsity: float, span: float) -> dict[str, int]:
    """Return how many weights each site loses: exactly `int(sparsity * all weights)` together, at the least cost.

    Every site starts at its least share. The steps that cost least per weight are taken first, until the budget is
    spent; where a curve is not convex, steps are pooled into ones that are. So the result minimises the sum of the
    convex hulls of the costs, each linear within a step (the greedy optimum of Fox, Management Science 13(3), 1966).

    Args:
        costs: of each site; sites of one cost function may still differ in size.
        sizes: weights of each site.
        sparsity: of all sites together.
        span: how far from it a site may be, see `bounds`; whole weights are rounded outwards.
    """
    low, high = bounds(sparsity, span)
    budget = int(sum(sizes.values()) * sparsity)
    removed = {name: int(size * low) for name, size in sizes.items()}
    steps: list[tuple[float, int, str]] = []
    for name, size in sizes.items():
        middle, last = int(size * sparsity), min(size, math.ceil(size * high))
        steps += _steps(name, costs[name], size, removed[name], middle, last)
    left = budget - sum(removed.values())
    for _, width, name in sorted(steps, key=lambda step: step[0]):  # stable: a site's own steps stay in order
        taken = min(left, width)
        removed[name] += taken
        left -= taken
    return removed


def _steps(name: str, cost: Cost, size: int, first: int, middle: int, last: int) -> list[tuple[float, int, str]]:
    """Return a site's steps from `first` through `middle` to `last` removed weights: cost of each weight, never
    falling, and width.
    """
    edges = np.linspace(first, last, min(_STEPS, last - first) + 1).round().tolist()
    edge_E = np.unique(np.array([*edges, middle], dtype=np.int64))
    width_S, rise_S = np.diff(edge_E), np.diff(cost(edge_E / size))
    pools: list[tuple[float, int]] = []  # of cost and width
    for rise, width in zip(rise_S.tolist(), width_S.tolist(), strict=True):
        while pools and pools[-1][0] * width >= rise * pools[-1][1]:
            earlier = pools.pop()
            rise, width = rise + earlier[0], width + earlier[1]
        pools.append((rise, width))
    return [(rise / width, width, name) for rise, width in pools]
