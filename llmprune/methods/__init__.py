"""Pruning methods, one file each: the file's name is the method's name.

A method is a frozen dataclass: its fields are the hyper-parameters, `needs` is the statistic it wants of a site's
inputs, `comparison_group` the paper's own, and `solve` is pure tensor maths on one weight matrix.
"""

import dataclasses
import inspect
import math
import pkgutil
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from llmprune.errors import RecipeError, did_you_mean
from llmprune.patterns import ComparisonGroup, Pattern, as_numbers
from llmprune.statistics import ColumnNorm, Gradient, Gram

ARITHMETICS = ("paper", "fast")  # of methods that have a faster one, which rounds otherwise


@dataclass(frozen=True)
class Solution:
    """A pruned matrix: its weights, the mask they obey (True stays), and what the solver has to say about it.

    `change_O` is the statistic's energy of each row's change, before it is rounded, where the solver comes by it.
    """

    weight_OI: Tensor
    keep_OI: Tensor
    notes: tuple[str, ...] = ()
    change_O: Tensor | None = None

    @classmethod
    def masked(cls, weight_OI: Tensor, keep_OI: Tensor) -> "Solution":
        """Return the solution that leaves the surviving weights, which must be finite, as they are."""
        return cls(weight_OI * as_numbers(keep_OI), keep_OI)


class Method(Protocol):
    """What a file in this folder defines."""

    @property
    def needs(self) -> type[ColumnNorm] | type[Gram] | type[Gradient] | None:
        """The statistic that `solve` takes; None where it looks at the weights only."""

    @property
    def row_wise(self) -> bool:
        """Whether a row's solution needs no other row, so that a large matrix can be solved a few rows at a time."""

    @property
    def comparison_group(self) -> ComparisonGroup:
        """The paper's own."""

    @property
    def comparison_groups(self) -> tuple[ComparisonGroup, ...]:
        """All that it can follow."""

    def solve(self, weight_OI: Tensor, statistic: Any, pattern: Pattern, generator: torch.Generator) -> Solution:
        """Prune `weight_OI` [outputs, inputs] to `pattern`.

        Args:
            weight_OI: finite weights, any floating dtype; not modified.
            statistic: an instance of `needs` fed with the matrix's inputs, or None where `needs` is None.
            pattern: what may stay.
            generator: the only source of randomness.
        """


def names() -> list[str]:
    """Return the names of all methods."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str, options: dict[str, Any] | None = None) -> Method:
    """Return the method called `name` with its hyper-parameters set from `options`.

    Raises:
        RecipeError: there is no such method, or it has no such hyper-parameter, or a value is not of its type.
    """
    if name not in names():
        raise RecipeError(f"unknown method '{name}': {did_you_mean(name, names())}")
    method_class = _method_class(name)
    fields = {field.name: field for field in dataclasses.fields(method_class)}
    values = {}
    for option, value in (options or {}).items():
        if option not in fields:
            raise RecipeError(f"method '{name}' has no option '{option}': {_options_hint(str(option), list(fields))}")
        values[option] = _convert(name, option, value, fields[option].default)
    method: Method = method_class(**values)
    return method


def name_of(method: Method) -> str:
    """Return the name under which `get` finds this method."""
    return type(method).__module__.rpartition(".")[2]


def require_from_zero(method: Any, name: str) -> None:
    """Raise RecipeError unless the hyper-parameter called `name` is a finite number of at least 0."""
    value = getattr(method, name)
    if not 0 <= value < math.inf:
        raise RecipeError(f"method '{name_of(method)}': {name} must be a number of at least 0, not {value}")


def require_at_least(method: Any, name: str, least: int) -> None:
    """Raise RecipeError unless the hyper-parameter called `name`, a whole number, is at least `least`."""
    value = getattr(method, name)
    if value < least:
        raise RecipeError(f"method '{name_of(method)}': {name} must be at least {least}, not {value}")


def require_arithmetic(method: Any) -> None:
    """Raise RecipeError unless the method's `arithmetic` is one of those that there are."""
    if method.arithmetic not in ARITHMETICS:
        hint = did_you_mean(method.arithmetic, ARITHMETICS)
        raise RecipeError(f"method '{name_of(method)}': unknown arithmetic '{method.arithmetic}': {hint}")


def _method_class(name: str) -> Any:
    module = import_module(f"{__name__}.{name}")
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    (method_class,) = [c for c in classes if dataclasses.is_dataclass(c) and "solve" in vars(c)]
    return method_class


def _options_hint(option: str, known: list[str]) -> str:
    return did_you_mean(option, known) if known else "it takes none"


def _convert(name: str, option: str, value: Any, default: Any) -> Any:
    try:
        converted = type(default)(value)
    except (TypeError, ValueError, OverflowError):
        converted = None
    inexact = isinstance(value, float) and converted != value  # 64.5 is no int, NaN nothing at all
    if converted is None or inexact or (isinstance(value, bool) and converted is not value):
        raise RecipeError(f"method '{name}': {option}={value!r} is not a {type(default).__name__}")
    return converted
