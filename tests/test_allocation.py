"""One magnitude threshold over all sites: the counts of a sort of everything, without ever holding everything."""

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
from llmprune.allocation import global_magnitude
from llmprune.patterns import Count

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def by_brute_force(weights: dict[str, Tensor], sparsity: float) -> dict[str, int]:
    everything = [value for weight in weights.values() for value in weight.abs().flatten().tolist()]
    removed = iter(oracle.remove_lowest(everything, int(len(everything) * sparsity)))
    return {name: sum(next(removed) for _ in range(weight.numel())) for name, weight in weights.items()}


def split(weights: dict[str, Tensor], sparsity: float) -> dict[str, Count]:
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
    found = split(weights, sparsity)
    assert {name: count.removed for name, count in found.items()} == by_brute_force(weights, sparsity)
    assert {name: count.total for name, count in found.items()} == {n: w.numel() for n, w in weights.items()}


values = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0]), st.floats(-(2.0**99), 2.0**99, width=32))


@settings(max_examples=80, deadline=None)
@given(columns=st.lists(st.lists(values, min_size=1, max_size=12), min_size=1, max_size=4), percent=st.integers(1, 99))
def test_any_values_are_split_exactly(columns: list[list[float]], percent: int) -> None:
    weights = {str(index): torch.tensor([column]) for index, column in enumerate(columns)}
    found = {name: count.removed for name, count in split(weights, percent / 100).items()}
    assert found == by_brute_force(weights, percent / 100)


def test_equal_magnitudes_of_earlier_sites_go_first() -> None:
    found = split({"first": torch.ones(2, 2), "second": -torch.ones(2, 2)}, 0.75)
    assert found == {"first": Count(4, 4), "second": Count(2, 4)}


def test_the_masks_together_are_one_threshold() -> None:
    weights = sites(torch.float32)
    keep = {name: count.keep(weights[name].abs()) for name, count in split(weights, 0.5).items()}
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
