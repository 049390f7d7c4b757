"""`llmprune.solve`: one matrix that the caller has, and what is known of its inputs, in any of several forms."""

from typing import Any

import torch
from torch import Tensor

from llmprune.errors import PatternError, RecipeError
from llmprune.methods import Method, Solution
from llmprune.model.sites import require_finite
from llmprune.recipe import Recipe
from llmprune.solving import checked_solution, seeded
from llmprune.statistics import ColumnMoments, ColumnNorm, Gradient, Gram

_SYMMETRIC = 1e-5  # to which share of its largest number a Gram matrix is
_OF_ONE_MATRIX = ("preset", "method", "pattern", "comparison_group", "method_options", "seed")


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
    _require_matrix(weight)
    if why := pattern.misfit(*weight.shape):
        raise PatternError(f"the matrix {why}")
    require_finite("the matrix", weight)
    known, generator = _known(method, statistic, weight), seeded(recipe.seed, "the matrix")
    return checked_solution("the matrix", method, weight, known, pattern, generator)


def _require_matrix(weight: Any) -> None:
    if not isinstance(weight, Tensor):
        raise PatternError(f"a matrix must be a torch.Tensor [outputs, inputs], not a {type(weight).__name__}")
    if weight.ndim != 2 or not weight.numel():
        raise PatternError(f"a matrix [outputs, inputs] is needed, not a tensor {list(weight.shape)}")
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise PatternError(f"floating point numbers of 16 bits or more are needed, not a matrix of {weight.dtype}")


def _known(method: Method, statistic: Any, weight: Tensor) -> ColumnNorm | Gram | Gradient | None:
    """Return what the method needs to know of the inputs, made of what the caller gave for it."""
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
