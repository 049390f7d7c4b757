"""One threshold of magnitude over all sites."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from llmprune.patterns import Count

_LOW_BITS = 16  # a magnitude's 32 bits are counted in two halves, so two passes over the weights find any threshold
_BINS = 1 << _LOW_BITS

WeightStream = Callable[[], Iterable[tuple[str, Tensor]]]


def global_magnitude(stream: WeightStream, sparsity: float) -> dict[str, Count]:
    """Split one magnitude threshold over all sites: exactly `int(sparsity * all weights)` go, whatever the ties.

    Args:
        stream: yields every site's name and weight; called twice, so that one site at a time is in memory.
        sparsity: of all sites together.

    Among equal magnitudes those of the earlier sites are removed first.
    """
    coarse, totals = torch.zeros(_BINS, dtype=torch.int64), {}
    for name, weight in stream():
        coarse += torch.bincount(_bits(weight) >> _LOW_BITS, minlength=_BINS).cpu()
        totals[name] = weight.numel()
    high, left = _reach(coarse, int(sum(totals.values()) * sparsity))
    below: dict[str, int] = {}
    inside: dict[str, tuple[Tensor, Tensor]] = {}
    fine = torch.zeros(_BINS, dtype=torch.int64)
    for name, weight in stream():
        bits = _bits(weight)
        below[name] = int((bits >> _LOW_BITS < high).sum())
        values, counts = torch.unique(bits[bits >> _LOW_BITS == high] & (_BINS - 1), return_counts=True)
        inside[name] = values.cpu(), counts.cpu()
        fine[inside[name][0]] += inside[name][1]
    low, left = _reach(fine, left)
    removed = {}
    for name, (values, counts) in inside.items():
        ties = min(left, int(counts[values == low].sum()))
        left -= ties
        removed[name] = below[name] + int(counts[values < low].sum()) + ties
    return {name: Count(removed[name], totals[name]) for name in totals}


def _bits(weight: Tensor) -> Tensor:
    """Return the magnitudes as integers that sort as they do: the bits of non-negative floats."""
    return weight.abs().float().flatten().view(torch.int32)


def _reach(histogram: Tensor, budget: int) -> tuple[int, int]:
    """Return the bin in which the running count reaches `budget`, and how many of that bin it takes."""
    running = histogram.cumsum(0)
    position = int(torch.searchsorted(running, max(budget, 1)))
    return position, budget - (int(running[position - 1]) if position else 0)
