"""One matrix: solve it, check what came out, measure what it costs."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from llmprune.errors import PatternError, RecipeError
from llmprune.methods import Method, Solution
from llmprune.model.sites import require_finite
from llmprune.patterns import Pattern
from llmprune.recipe import Recipe
from llmprune.statistics import ColumnNorm, Gram

_ROW_CHUNK = 1 << 22  # weights that are held in fp32 at once while errors are summed


@torch.no_grad()
def solve(weight: Tensor, statistic: Tensor | ColumnNorm | Gram | None = None, **options: Any) -> Solution:
    """Prune one matrix with the maths that `prune` uses.

    Args:
        weight: [outputs, inputs], any floating dtype; not modified.
        statistic: what the method needs of the inputs: a `ColumnNorm` or `Gram`, or calibration inputs as a tensor
            [tokens, inputs]. None for methods that need nothing.
        options: `method`, `pattern`, `comparison_group`, `method_options`, `seed` as in `llmprune.Recipe`.

    Raises:
        RecipeError: an option is wrong, or the statistic is missing or of the wrong kind.
        PatternError: the pattern does not fit the matrix, or it is no matrix of floating point numbers.
        NumericalError: a weight or the statistic is not finite.
    """
    recipe = Recipe.of(options)
    method, pattern = recipe.solver(), recipe.target()
    if weight.ndim != 2:
        raise PatternError(f"a matrix [outputs, inputs] is needed, not a tensor of {weight.ndim} dimensions")
    if not weight.is_floating_point():
        raise PatternError(f"a matrix of floating point numbers is needed, not one of {weight.dtype}")
    if why := pattern.misfit(*weight.shape):
        raise PatternError(f"the matrix {why}")
    require_finite("the matrix", weight)
    return checked_solution("the matrix", method, weight, _fed(method, statistic, weight), pattern, recipe.seed)


def checked_solution(
    name: str, method: Method, weight_OI: Tensor, statistic: Any, pattern: Pattern, seed: int
) -> Solution:
    """Solve, and vouch for the result: exactly the pattern, finite, every zero a positive one."""
    solution = method.solve(weight_OI, statistic, pattern, _generator(seed, name))
    pattern.check(solution.keep_OI)
    pruned_OI = solution.weight_OI.masked_fill(~solution.keep_OI, 0).add_(0.0)  # adding zero turns -0.0 into +0.0
    require_finite(f"the solution of {name}", pruned_OI)
    return Solution(pruned_OI, solution.keep_OI, solution.notes)


def relative_error(weight_OI: Tensor, pruned_OI: Tensor, statistic: ColumnNorm | Gram | None) -> float:
    """Return the squared output change over the squared outputs, as far as the statistic can tell."""
    energy = statistic.energy if statistic else _square
    error = scale = 0.0
    step = max(1, _ROW_CHUNK // weight_OI.shape[1])
    for dense, pruned in zip(weight_OI.split(step), pruned_OI.split(step), strict=True):
        dense = dense.float()
        error += energy(dense - pruned.float())
        scale += energy(dense)
    return error / scale if scale else 0.0


def _square(weight_OI: Tensor) -> float:
    return float(weight_OI.square().sum())


def _fed(method: Method, statistic: Tensor | ColumnNorm | Gram | None, weight: Tensor) -> ColumnNorm | Gram | None:
    needs = method.needs
    if needs is None:
        return None
    if isinstance(statistic, Tensor):
        if statistic.ndim != 2 or statistic.shape[1] != weight.shape[1]:
            raise RecipeError(f"calibration inputs must be [tokens, {weight.shape[1]}], not {list(statistic.shape)}")
        inputs, statistic = statistic, needs(weight.shape[1], weight.device)
        statistic.add(inputs.to(weight.device), 1)
    if not isinstance(statistic, needs):
        raise RecipeError(f"{type(method).__name__} needs calibration inputs or a {needs.__name__} as its statistic")
    if statistic.inputs != weight.shape[1]:
        raise RecipeError(f"the statistic is of {statistic.inputs} inputs, the matrix has {weight.shape[1]}")
    statistic.require_finite("the matrix")
    return statistic


def _generator(seed: int, name: str) -> torch.Generator:
    """A stream of its own for each site, so that the result does not depend on the order of the sites."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
