"""One matrix of a run: solve it, check what came out, measure what it costs."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmprune.errors import naming
from llmprune.methods import Method, Solution
from llmprune.model.sites import out_of_range, require_finite
from llmprune.patterns import NM, Count, Pattern, Unstructured, as_numbers
from llmprune.retrying import Retry, reliefs
from llmprune.statistics import ColumnNorm, CrossGram, DenseTarget, Gradient, Gram

ROW_CHUNK = 1 << 20  # weights of which copies in fp32 are held at once
_SAMPLED_ROWS = 128  # of a matrix, from which the error of magnitude is taken
_GPU_ROW_CHUNK = 1 << 26  # on a GPU, which small pieces leave idle
_TARGET_DAMP = 0.01  # of methods without a damping of their own; that of SparseGPT has one factor serve both
Goal = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Outcome:
    """What pruning a matrix came to: its zeros, and its relative output error as far as the statistic can tell.

    `magnitude_error` is that of magnitude pruning, for comparison.
    """

    zeros: int
    error: float
    notes: tuple[str, ...]
    magnitude_error: float | None


@dataclass(frozen=True)
class _Part:
    """What some rows came to: zeros, the squared change of their outputs and their squared outputs, notes."""

    zeros: int
    energy: tuple[float, float]
    notes: tuple[str, ...]


def prune_matrix(
    name: str,
    method: Method,
    weight_OI: Tensor,
    statistic: Any,
    pattern: Pattern,
    seed: int,
    dense_target: DenseTarget = 0.0,
    on_host: bool = False,
) -> Outcome:
    """Overwrite a matrix with its solution, a few rows at a time where rows are independent.

    Where memory runs out the same is tried again with less; `on_host` allows that to be on the host in place of a GPU,
    where sums are rounded otherwise.
    """
    generator, rows_apart = seeded(seed, name), method.row_wise and pattern.row_wise
    goal_of = _goal_of(name, method, statistic, dense_target if method.needs is Gram else 0.0)
    measured = Retry(name, False, generator, reliefs(statistic, on_host))
    yardstick: float | None = None
    if not isinstance(statistic, Gradient):  # which knows no outputs of the matrix
        (yardstick,) = measured.solved(weight_OI, lambda all_OI: magnitude_error(all_OI, statistic, pattern, goal_of))

    def solve_rows(rows_OI: Tensor) -> _Part:
        here_OI = rows_OI.to(statistic.device) if statistic else rows_OI  # accelerate may keep weights off the GPU
        goal_OI = goal_of(here_OI)
        solution = checked_solution(name, method, goal_OI, statistic, pattern, generator, rows_OI.dtype)
        zeros = int((solution.weight_OI == 0).sum())  # ten times as fast as count_nonzero
        part = _Part(zeros, energies(goal_OI, solution.weight_OI, statistic, solution.change_O), solution.notes)
        rows_OI.copy_(solution.weight_OI)  # last, as what fails before is done again
        return part

    retry = Retry(name, rows_apart, generator, reliefs(statistic, on_host))
    chunks = _chunks(weight_OI) if rows_apart else (weight_OI,)
    parts = [part for rows_OI in chunks for part in retry.solved(rows_OI, solve_rows)]
    change, whole = (sum(part.energy[which] for part in parts) for which in (0, 1))
    notes = dict.fromkeys([*measured.notes, *retry.notes, *(note for part in parts for note in part.notes)])
    error = change / whole if whole else 0.0
    return Outcome(sum(part.zeros for part in parts), error, tuple(notes), yardstick)


def _goal_of(name: str, method: Method, statistic: Any, dense_target: DenseTarget) -> Goal:
    """Return what makes of dense weights those without a pattern that the pruned ones are to come close to."""
    if not isinstance(statistic, CrossGram):
        return _as_they_are
    damp = statistic.damping(getattr(method, "damp", _TARGET_DAMP), getattr(method, "sampling_damp", 0.0))

    def goal_of(weight_OI: Tensor) -> Tensor:
        with naming(name):
            return statistic.target(weight_OI, dense_target, damp)

    return goal_of


def _as_they_are(weight_OI: Tensor) -> Tensor:
    return weight_OI


def magnitude_error(weight_OI: Tensor, statistic: Any, pattern: Pattern, goal_of: Goal = _as_they_are) -> float:
    """Return the relative output error that magnitude pruning to the same sparsity would have.

    Measured as a method's own error is, but on 128 rows at most, evenly spaced: it is no more than a yardstick. Of a
    pattern that is not N:M the sampled rows are pruned to the sparsity as one matrix.
    """
    rows_OI = weight_OI[:: math.ceil(len(weight_OI) / _SAMPLED_ROWS)]
    rows_OI = rows_OI.to(statistic.device) if statistic else rows_OI
    choice = pattern if isinstance(pattern, NM) else Unstructured(pattern.sparsity)
    kept_OI = rows_OI * choice.keep(rows_OI.abs().float())
    change, whole = energies(goal_of(rows_OI), kept_OI, statistic)
    return change / whole if whole else 0.0


def checked_solution(
    name: str,
    method: Method,
    weight_OI: Tensor,
    statistic: Any,
    pattern: Pattern,
    generator: torch.Generator,
    dtype: torch.dtype | None = None,
) -> Solution:
    """Solve, and vouch for the result: exactly the pattern, in `dtype`, finite, every zero a positive one."""
    with naming(name):
        solution = _solved(method, weight_OI, statistic, pattern, generator)
    pattern.check(solution.keep_OI)
    pruned_OI = solution.weight_OI.to(dtype or weight_OI.dtype) * as_numbers(solution.keep_OI)
    pruned_OI = pruned_OI.add_(0.0).contiguous()  # turns -0.0 into +0.0
    require_finite(f"the solution of {name}", pruned_OI, out_of_range(pruned_OI.dtype))
    rounded = pruned_OI.dtype != torch.float32
    return Solution(pruned_OI, solution.keep_OI, solution.notes, None if rounded else solution.change_O)


def _solved(
    method: Method, weight_OI: Tensor, statistic: Any, pattern: Pattern, generator: torch.Generator
) -> Solution:
    """Solve, each row scaled by what an error in it costs where that is known, so that rows compete for what may stay.

    Weights that the method keeps as they were are the same to the bit, though they were scaled and scaled back.
    """
    if not isinstance(pattern, Count) or not pattern.row_levels:
        return method.solve(weight_OI, statistic, pattern, generator)
    scale_O = pattern.row_scales.to(weight_OI.device)
    dtype = torch.promote_types(weight_OI.dtype, scale_O.dtype)
    scaled_OI = weight_OI.to(dtype) * scale_O.unsqueeze(1)
    solution = method.solve(scaled_OI, statistic, pattern, generator)
    unchanged_OI = solution.weight_OI == scaled_OI
    del scaled_OI  # before more is made
    solved_OI = solution.weight_OI.div_(scale_O.unsqueeze(1))
    torch.where(unchanged_OI, weight_OI.to(dtype), solved_OI, out=solved_OI)
    change_O = None if solution.change_O is None else solution.change_O / scale_O.square()
    return Solution(solved_OI, solution.keep_OI, solution.notes, change_O)


def energies(
    weight_OI: Tensor,
    pruned_OI: Tensor,
    statistic: ColumnNorm | Gram | Gradient | None,
    known_O: Tensor | None = None,
) -> tuple[float, float]:
    """Return the squared change of the outputs, and the squared outputs, as far as the statistic can tell.

    The former is not worked out where that of each row is `known_O`.
    """
    energy = statistic.energy if statistic else _square
    change, whole = 0.0 if known_O is None else float(known_O.double().sum()), 0.0
    parts = _whole if isinstance(statistic, Gradient) else _chunks  # the gradient of a weight is known by its place
    for dense, pruned in zip(parts(weight_OI), parts(pruned_OI), strict=True):
        dense = dense.float()
        change += energy(dense - pruned.float()) if known_O is None else 0.0
        whole += energy(dense)
    return change, whole


def _square(weight_OI: Tensor) -> float:
    return float(weight_OI.square().sum())


def _whole(weight_OI: Tensor) -> tuple[Tensor, ...]:
    return (weight_OI,)


def _chunks(weight_OI: Tensor) -> tuple[Tensor, ...]:
    size = _GPU_ROW_CHUNK if weight_OI.device.type == "cuda" else ROW_CHUNK
    chunks: tuple[Tensor, ...] = weight_OI.split(max(1, size // weight_OI.shape[1]))
    return chunks


def seeded(seed: int, name: str) -> torch.Generator:
    """Return a stream of random numbers of its own for each part of a model, whatever the order in which parts come."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
