"""A budget over all sites: by one magnitude threshold, or so that what the sites say it costs is least."""

import itertools
import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
from llmprune.allocation import Cost, Curve, bounds, global_magnitude, pinned, split, wish
from llmprune.patterns import Count

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def by_brute_force(weights: dict[str, Tensor], sparsity: float) -> dict[str, int]:
    everything = [value for weight in weights.values() for value in weight.abs().flatten().tolist()]
    removed = iter(oracle.remove_lowest(everything, int(len(everything) * sparsity)))
    return {name: sum(next(removed) for _ in range(weight.numel())) for name, weight in weights.items()}


def by_threshold(weights: dict[str, Tensor], sparsity: float) -> dict[str, Count]:
    return global_magnitude(weights.items, sparsity)


def sites(dtype: torch.dtype, distinct: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scales = {"a": (4, 8, 1.0), "b": (3, 5, 0.1), "c": (6, 6, 3.0)}
    made = {}
    for name, (outputs, inputs, scale) in scales.items():
        weight = torch.randn(outputs, inputs, generator=generator) * scale
        made[name] = (weight.clamp(-1, 1).mul(distinct).round() if distinct else weight).to(dtype)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distinct", [0, 1, 3])
@pytest.mark.parametrize("sparsity", [0.001, 0.1, 1 / 3, 0.5, 0.9, 0.999])
def test_the_counts_are_those_of_a_sort(sparsity: float, distinct: int, dtype: torch.dtype) -> None:
    weights = sites(dtype, distinct)
    found = by_threshold(weights, sparsity)
    assert {name: count.removed for name, count in found.items()} == by_brute_force(weights, sparsity)
    assert {name: count.total for name, count in found.items()} == {n: w.numel() for n, w in weights.items()}


values = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0]), st.floats(-(2.0**99), 2.0**99, width=32))


@settings(max_examples=80, deadline=None)
@given(columns=st.lists(st.lists(values, min_size=1, max_size=12), min_size=1, max_size=4), percent=st.integers(1, 99))
def test_any_values_are_split_exactly(columns: list[list[float]], percent: int) -> None:
    weights = {str(index): torch.tensor([column]) for index, column in enumerate(columns)}
    found = {name: count.removed for name, count in by_threshold(weights, percent / 100).items()}
    assert found == by_brute_force(weights, percent / 100)


def test_equal_magnitudes_of_earlier_sites_go_first() -> None:
    found = by_threshold({"first": torch.ones(2, 2), "second": -torch.ones(2, 2)}, 0.75)
    assert found == {"first": Count(4, 4), "second": Count(2, 4)}


def test_the_masks_together_are_one_threshold() -> None:
    weights = sites(torch.float32)
    keep = {name: count.keep(weights[name].abs()) for name, count in by_threshold(weights, 0.5).items()}
    kept = torch.cat([weights[name][mask].abs() for name, mask in keep.items()])
    gone = torch.cat([weights[name][~mask].abs() for name, mask in keep.items()])
    assert gone.max() <= kept.min() and len(gone) == int(0.5 * (len(gone) + len(kept)))


def test_the_weights_are_streamed_twice_and_not_changed() -> None:
    weights, calls = sites(torch.float32), []
    before = {name: weight.clone() for name, weight in weights.items()}

    def stream() -> Iterable[tuple[str, Tensor]]:
        calls.append(1)
        yield from weights.items()

    global_magnitude(stream, 0.5)
    assert len(calls) == 2
    assert all(torch.equal(weights[name], before[name]) for name in weights)


def least_cost(costs: dict[str, Cost], sizes: dict[str, int], sparsity: float, span: float) -> float:
    """Return the least cost of all ways to spend the budget exactly within the bounds."""
    low, high = bounds(sparsity, span)
    ranges = [range(int(n * low), min(n, math.ceil(n * high)) + 1) for n in sizes.values()]
    budget = int(sum(sizes.values()) * sparsity)
    return min(
        total_cost(costs, sizes, dict(zip(sizes, counts, strict=True)))
        for counts in itertools.product(*ranges)
        if sum(counts) == budget
    )


def total_cost(costs: dict[str, Cost], sizes: dict[str, int], removed: dict[str, int]) -> float:
    return sum(float(costs[name](np.array([removed[name] / size]))[0]) for name, size in sizes.items())


def convex_curves(seed: int, sites: int, sparsity: float, span: float) -> dict[str, Cost]:
    """Curves whose logarithm bends upwards, and which are convex."""
    generator = np.random.default_rng(seed)
    low, high = bounds(sparsity, span)
    middle = (low + high) / 2
    curves: dict[str, Cost] = {}
    for site in range(sites):
        start, first, second = generator.uniform(0.01, 1), *np.sort(generator.uniform(1, 12, 2))
        rise = (first * (middle - low), first * (middle - low) + second * (high - middle))
        costs = start, start * math.exp(rise[0]), start * math.exp(rise[1])
        curves[str(site)] = Curve((low, middle, high), costs)
    return curves


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(6))
def test_a_split_costs_no_more_than_any_other(seed: int, sparsity: float) -> None:
    sizes = {"0": 12, "1": 7, "2": 16}
    costs = convex_curves(seed, 3, sparsity, 0.2)
    found = total_cost(costs, sizes, split(costs, sizes, sparsity, 0.2))
    assert found == pytest.approx(least_cost(costs, sizes, sparsity, 0.2), rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=8),
    sparsity=st.floats(0.01, 0.99),
    span=st.floats(0.001, 0.999),
    seed=st.integers(0, 99),
)
def test_a_split_is_exact_and_within_bounds(sizes: list[int], sparsity: float, span: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    low, high = bounds(sparsity, span)
    shares = (low, (low + high) / 2, high)
    # Any curves at all: falling, flat, equal to each other, far from convex.
    costs: dict[str, Cost] = {
        str(site): Curve(shares, tuple(generator.choice([0.0, 1.0, 2.0, 1e-9, 1e9], 3))) for site in range(len(sizes))
    }
    named = {str(site): size for site, size in enumerate(sizes)}
    found = split(costs, named, sparsity, span)
    assert sum(found.values()) == int(sum(sizes) * sparsity)
    for name, size in named.items():
        assert int(size * low) <= found[name] <= min(size, math.ceil(size * high))
    assert found == split(costs, named, sparsity, span)


def test_an_expensive_site_keeps_more() -> None:
    shares = (0.45, 0.6, 0.75)
    costs = {"cheap": Curve(shares, (0.1, 0.2, 0.4)), "dear": Curve(shares, (1.0, 2.0, 4.0))}
    found = split(costs, {"cheap": 1000, "dear": 1000}, 0.6, 0.15)
    assert found["cheap"] > 700 and found["dear"] < 500 and sum(found.values()) == 1200


def test_a_pinned_site_keeps_its_share_whatever_the_others_cost() -> None:
    costs: dict[str, Cost] = {
        "pinned": pinned(0.5),
        "a": Curve((0.4, 0.6), (1.0, 9e9)),
        "b": Curve((0.4, 0.6), (1e-9, 2e-9)),
    }
    found = split(costs, {"pinned": 101, "a": 300, "b": 300}, 0.5, 0.1)
    assert found["pinned"] == 50 and sum(found.values()) == 350 and found["b"] > found["a"]


def test_wishes_are_met_as_far_as_the_budget_allows() -> None:
    costs = {"a": wish(0.4, 1000), "b": wish(0.6, 1000)}
    found = split(costs, {"a": 1000, "b": 1000}, 0.5, 0.15)
    assert abs(found["a"] - 400) <= 5 and sum(found.values()) == 1000


def test_a_curve_is_straight_in_its_logarithm() -> None:
    curve = Curve((0.4, 0.5, 0.6), (1.0, 10.0, 40.0))
    found = curve(np.array([0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.3]))
    assert found.tolist() == pytest.approx([1, 10**0.5, 10, 20, 40, 160, 0.1])


@pytest.mark.parametrize(("sparsity", "expected"), [(0.6, (0.45, 0.75)), (0.1, (0.05, 0.25)), (0.9, (0.75, 0.95))])
def test_no_site_loses_more_than_half_of_what_it_keeps(sparsity: float, expected: tuple[float, float]) -> None:
    assert bounds(sparsity, 0.15) == pytest.approx(expected)
