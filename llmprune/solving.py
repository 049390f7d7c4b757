"""One matrix: solve it, check what came out, measure what it costs."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmprune.errors import PatternError, RecipeError, naming
from llmprune.methods import Method, Solution
from llmprune.model.sites import out_of_range, require_finite
from llmprune.patterns import NM, Count, Pattern, Unstructured, as_numbers
from llmprune.recipe import Recipe
from llmprune.retrying import Retry, reliefs
from llmprune.statistics import ColumnMoments, ColumnNorm, CrossGram, DenseTarget, Gradient, Gram

ROW_CHUNK = 1 << 20  # weights of which copies in fp32 are held at once
_SAMPLED_ROWS = 128  # of a matrix, from which the error of magnitude is taken
_GPU_ROW_CHUNK = 1 << 26  # on a GPU, which small pieces leave idle
_OF_ONE_MATRIX = ("preset", "method", "pattern", "comparison_group", "method_options", "seed")
_TARGET_DAMP = 0.01  # of methods without a damping of their own; that of SparseGPT has one factor serve both
_SYMMETRIC = 1e-5  # to which share of its largest number a Gram matrix is
Goal = Callable[[Tensor], Tensor]


@torch.no_grad()
def solve(weight: Tensor, statistic: Tensor | ColumnNorm | Gram | Gradient | None = None, **options: Any) -> Solution:
    """Prune one matrix with the maths that `prune` uses.

    Args:
        weight: [outputs, inputs], any floating dtype of 16 bits or more; not modified.
        statistic: what the method needs of the inputs: a `ColumnNorm`, or a `Gram`, which serves for both; or a tensor:
            the inputs themselves [tokens, inputs], their Gram matrix XᵀX (symmetric, [inputs, inputs]), or, for methods
            that need no more, their norms [inputs]. For `dsnot` the inputs, or a `llmprune.statistics.ColumnMoments`;
            for `taylor` the gradient of the loss [outputs, inputs], or a `llmprune.statistics.Gradient`. None for
            methods that need nothing.
        options: `method`, `pattern`, `comparison_group`, `method_options`, `seed` as in `llmprune.Recipe`, or `preset`.

    Returns:
        `weight_OI` [outputs, inputs] in the dtype of `weight`, with +0.0 for what was removed; `keep_OI`, the mask, True
        for what stays; and `notes`, such as that the damping had to be raised.

    Raises:
        RecipeError: an option is wrong, or the statistic is missing or of the wrong kind.
        PatternError: the pattern does not fit the matrix, or it is no matrix of floating point numbers.
        NumericalError: a weight or the statistic is not finite.
    """
    recipe = Recipe.of(options)
    if idle := [name for name in options if name not in _OF_ONE_MATRIX]:
        raise RecipeError(f"{idle[0]} means nothing for a single matrix: solve takes {', '.join(_OF_ONE_MATRIX)}")
    method, pattern = recipe.solver(), recipe.target()
    if not isinstance(weight, Tensor):
        raise PatternError(f"a matrix must be a torch.Tensor [outputs, inputs], not a {type(weight).__name__}")
    if weight.ndim != 2 or not weight.numel():
        raise PatternError(f"a matrix [outputs, inputs] is needed, not a tensor {list(weight.shape)}")
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise PatternError(f"floating point numbers of 16 bits or more are needed, not a matrix of {weight.dtype}")
    if why := pattern.misfit(*weight.shape):
        raise PatternError(f"the matrix {why}")
    require_finite("the matrix", weight)
    generator = seeded(recipe.seed, "the matrix")
    return checked_solution(
        "the matrix", method, weight, _fed(method, statistic, weight), pattern, generator, weight.dtype
    )


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


def _fed(method: Method, statistic: Any, weight: Tensor) -> ColumnNorm | Gram | Gradient | None:
    needs = method.needs
    if needs is None:
        return None
    if issubclass(needs, Gradient):
        return _gradient_of(statistic, weight)
    if isinstance(statistic, Tensor):
        statistic = _from_tensor(needs, statistic.to(weight.device), weight.shape[1])
    known = (needs,) if needs is ColumnMoments else (needs, Gram)  # a Gram also knows the column norms, but no means
    if not isinstance(statistic, known):
        raise RecipeError(f"{type(method).__name__} needs calibration inputs or a {needs.__name__} as its statistic")
    if not statistic.sequences:
        raise RecipeError("the statistic has seen no inputs: add some, or use --method magnitude, which needs none")
    if statistic.inputs != weight.shape[1]:
        raise RecipeError(f"the statistic is of {statistic.inputs} inputs, the matrix has {weight.shape[1]}")
    statistic.require_finite("the matrix")
    return statistic


def _gradient_of(statistic: Any, weight_OI: Tensor) -> Gradient:
    if isinstance(statistic, Tensor) and statistic.shape == weight_OI.shape:
        statistic = Gradient.from_gradient(statistic.to(weight_OI.device))
    if (
        not isinstance(statistic, Gradient)
        or statistic.square_OI is None
        or statistic.square_OI.shape != weight_OI.shape
    ):
        raise RecipeError(f"a gradient of the loss {list(weight_OI.shape)}, or a Gradient with its squares, is needed")
    statistic.require_finite("the matrix")
    return statistic


def _from_tensor(needs: type[ColumnNorm] | type[Gram], tensor: Tensor, inputs: int) -> ColumnNorm | Gram:
    if tensor.ndim == 1 and len(tensor) == inputs and needs is ColumnNorm:
        return ColumnNorm.from_norms(tensor)
    if tensor.ndim != 2 or tensor.shape[1] != inputs:
        other = "" if needs is ColumnMoments else " or a Gram matrix"
        raise RecipeError(f"the statistic must be inputs [tokens, {inputs}]{other}, not {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise RecipeError(f"the statistic must be of floating point numbers, not of {tensor.dtype}")
    if needs is not ColumnMoments and _is_gram(tensor):
        return Gram.from_matrix(tensor) if needs is Gram else ColumnNorm.from_norms(tensor.diagonal().sqrt())
    statistic = needs(inputs, tensor.device)
    if len(tensor):
        statistic.add(tensor, 1)
    return statistic


def _is_gram(tensor: Tensor) -> bool:
    """Say whether this may be a Gram matrix: symmetric, but for rounding beside its largest sum, and with no square below 0."""
    if tensor.shape[0] != tensor.shape[1] or bool((tensor.diagonal() < 0).any()):
        return False
    rounding = _SYMMETRIC * float(tensor.abs().max())
    return torch.allclose(tensor, tensor.T, rtol=0, atol=rounding)


def seeded(seed: int, name: str) -> torch.Generator:
    """Return a stream of random numbers of its own for each part of a model, whatever the order in which parts come."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
