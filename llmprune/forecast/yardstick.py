"""What statistics and solving cost on this machine: sample matrices are timed, and what they took is scaled up.

Sizes: O outputs, I inputs, T tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmprune.methods import Method
from llmprune.model.groups import StatisticType
from llmprune.model.live import LiveBytes
from llmprune.model.probe import least_seconds
from llmprune.patterns import NM, Count, Unstructured
from llmprune.solving import ROW_CHUNK, prune_matrix
from llmprune.statistics import CrossGram, DenseTarget, Gradient, Gram

_NARROW, _WIDE = 256, 1024  # inputs and outputs of sample matrices
_TOKENS = 256


@dataclass(frozen=True)
class SolvingTime:
    """Seconds for matrices of one input: cube · I³ once, and (column + weight · O + product · O · I) · I for each."""

    cube: float
    column: float
    weight: float
    product: float

    def seconds(self, shapes: list[tuple[int, int]]) -> float:
        """Return the time that solving matrices [outputs, inputs] which share their input takes."""
        inputs = shapes[0][1]
        each = (self.column + self.weight * outputs + self.product * outputs * inputs for outputs, _ in shapes)
        return self.cube * inputs**3 + inputs * sum(each)


def statistic_work(needs: StatisticType, inputs: int) -> int:
    """Return the operations by which a statistic sums one token: a vector for norms, half a matrix for a Gram.

    A whole one more for the products with the inputs of the dense model.
    """
    if not issubclass(needs, Gram):
        return inputs
    return inputs * (inputs + 256) + (2 * inputs * inputs if issubclass(needs, CrossGram) else 0)


def statistic_time(needs: StatisticType, inputs: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the seconds per operation that summing a statistic of that many inputs takes."""
    width = min(inputs, _WIDE)
    add = _adding(needs, width, _TOKENS, dtype, device)
    return least_seconds(lambda: add) / (_TOKENS * statistic_work(needs, width))


def copied_bytes(needs: StatisticType, inputs: int, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the bytes of copies that adding so many tokens at once to a statistic of that many inputs takes.

    Measured with two numbers of tokens, as the copies of some kernels grow with them and the buffers of others do not.
    """
    width, few = min(inputs, _WIDE), _TOKENS // 2
    low, high = (_copied(_adding(needs, width, count, dtype, device)) for count in (few, _TOKENS))
    return max(0.0, low + (high - low) * (tokens - few) / (_TOKENS - few)) * inputs / width


def _copied(add: Callable[[], None]) -> int:
    add()  # some sums are first there with the first inputs
    live = LiveBytes()
    with live:
        add()
    return live.peak


def _adding(
    needs: StatisticType, inputs: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """Return what adds so many random tokens to a statistic, and as many of the dense model where it takes those."""
    statistic = needs(inputs, device)
    x_TI, dense_TI = (torch.randn(tokens, inputs).to(device, dtype) for _ in range(2))
    if isinstance(statistic, CrossGram):
        return partial(statistic.add, x_TI, 1, dense_TI)
    return lambda: statistic.add(x_TI, 1)


def solving_time(
    method: Method,
    pattern: Unstructured | NM,
    dtype: torch.dtype,
    device: torch.device,
    dense_target: DenseTarget = 0.0,
) -> SolvingTime:
    """Time four sample matrices and solve for the coefficients of `SolvingTime`.

    Methods that need no Gram take time in proportion to the weights: their higher powers are zero.
    """
    narrow, wide = (_fit(inputs, pattern) for inputs in (_NARROW, _WIDE))
    times = {
        (outputs, inputs): least_seconds(_sample(method, pattern, outputs, inputs, dtype, device, dense_target))
        for outputs in (_NARROW, _WIDE)
        for inputs in (narrow, wide)
    }
    per_row = {
        inputs: max(0.0, times[_WIDE, inputs] - times[_NARROW, inputs]) / (_WIDE - _NARROW) for inputs in (narrow, wide)
    }
    once = {inputs: max(0.0, times[_NARROW, inputs] - _NARROW * per_row[inputs]) for inputs in (narrow, wide)}
    if method.needs is not Gram:
        return SolvingTime(0.0, once[wide] / wide, per_row[wide] / wide, 0.0)
    column, cube = _line((narrow**2, once[narrow] / narrow), (wide**2, once[wide] / wide))
    weight, product = _line((narrow, per_row[narrow] / narrow), (wide, per_row[wide] / wide))
    return SolvingTime(cube, column, weight, product)


def solving_bytes(
    method: Method,
    pattern: Unstructured | NM,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    dense_target: DenseTarget = 0.0,
    weighed: bool = False,
) -> int:
    """Return the memory that solving a matrix takes beside it and its statistic.

    Measured on a matrix of the same proportions with at most a million weights, and scaled by the number of weights;
    a method that goes through a large matrix in parts takes no more for the whole than for one of them. `weighed` says
    whether its rows compete by what their errors cost.
    """
    outputs, inputs = shape
    part = min(1.0, ROW_CHUNK / (outputs * inputs))
    if method.row_wise and pattern.row_wise and not weighed:
        sample, scale = (max(1, int(outputs * part)), inputs), 1.0
    else:
        side = math.sqrt(part)
        sample = max(1, int(outputs * side)), _fit(int(inputs * side), pattern)
        scale = outputs * inputs / (sample[0] * sample[1])
    met: Unstructured | NM | Count = pattern
    if weighed and isinstance(pattern, Unstructured):
        size = sample[0] * sample[1]
        met = Count(int(size * pattern.sparsity), size, row_levels=bytes(sample[0]))
    solve = _sample(method, met, *sample, dtype, device, dense_target)()
    live = LiveBytes()
    with live:
        solve()
    return int(live.peak * scale)


def _sample(
    method: Method,
    pattern: Unstructured | NM | Count,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    device: torch.device,
    dense_target: DenseTarget,
) -> Callable[[], Callable[[], Any]]:
    """Return what sets up a random matrix and statistic, and returns what solves it."""
    if isinstance(pattern, Unstructured) and pattern.group == "model":
        pattern = replace(pattern, group="layer")  # a run gives each matrix its share of the budget
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def set_up() -> Callable[[], Any]:
        statistic: Any = None
        weight_OI = randn(outputs, inputs)
        if method.needs is not None and issubclass(method.needs, Gradient):
            return partial(prune_matrix, "a sample", method, weight_OI, _flat(weight_OI), pattern, 0)
        if method.needs is not None:
            needs = CrossGram if dense_target and method.needs is Gram else method.needs
            statistic = needs(inputs, device)
            beside = [randn(2 * inputs, inputs)] if needs is CrossGram else []
            statistic.add(randn(2 * inputs, inputs), 1, *beside)
        return lambda: prune_matrix("a sample", method, weight_OI, statistic, pattern, 0, dense_target)

    return set_up


def _flat(weight_OI: Tensor) -> Gradient:
    return Gradient.from_gradient(torch.ones_like(weight_OI))


def _line(low: tuple[float, float], high: tuple[float, float]) -> tuple[float, float]:
    """Return the offset and the slope, neither of them negative, of the line through two points."""
    (x, y), (far_x, far_y) = low, high
    slope = max(0.0, (far_y - y) / (far_x - x))
    return max(0.0, far_y - slope * far_x), slope


def _fit(inputs: int, pattern: Unstructured | NM) -> int:
    """Return the next width that the pattern fits."""
    m = pattern.m if isinstance(pattern, NM) else 1
    return max(1, math.ceil(inputs / m)) * m
