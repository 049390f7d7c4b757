"""What a recipe states for some of the sites only, by globs on their tensors' names."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypeVar

from llmprune import patterns
from llmprune.errors import PatternError, RecipeError, did_you_mean
from llmprune.patterns import NM

OVERRIDABLE = ("method", "pattern", "method_options", "comparison_group")

Overrides = Mapping[str, Mapping[str, Any]]


class _Recipe(Protocol):
    """The part of a recipe that is looked at here; it is a frozen dataclass."""

    @property
    def method(self) -> Any: ...
    @property
    def method_options(self) -> Mapping[str, Any]: ...
    def target(self) -> Any: ...


R = TypeVar("R", bound=_Recipe)


def changes_for(name: str, overrides: Overrides, sparsities: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are stated for a tensor; of globs the first that matches counts."""
    changes = dict(next((changes for glob, changes in overrides.items() if fnmatchcase(name, glob)), {}))
    stated = next((value for glob, value in sparsities.items() if fnmatchcase(name, glob)), None)
    return changes if stated is None else {"pattern": stated} | changes


def changed(recipe: R, changes: Mapping[str, Any]) -> R:
    """Return a recipe with options changed; the options of a method are not passed on to another."""
    fresh: dict[str, Any] = {"overrides": {}, "sparsities": {}}
    if changes.get("method", recipe.method) != recipe.method:
        fresh |= {"method_options": {}, "comparison_group": None}
    elif isinstance(changes.get("method_options"), Mapping):
        changes = {**changes, "method_options": {**recipe.method_options, **changes["method_options"]}}
    if ":" in str(changes.get("pattern", "")):
        fresh["comparison_group"] = None
    return dataclasses.replace(recipe, **fresh | dict(changes))  # type: ignore[type-var]


def require_valid(recipe: _Recipe, overrides: Overrides, sparsities: Mapping[str, Any]) -> None:
    """Check all that is stated for some sites, as it would be if it were stated for all.

    Raises:
        RecipeError, PatternError: naming the glob.
    """
    for name, table in (("sparsities", sparsities), ("overrides", overrides)):
        if not isinstance(table, Mapping):
            raise RecipeError(f"{name} must map globs to values, not {table!r}")
        for glob in table:
            if not isinstance(glob, str):
                raise RecipeError(f"{name}: a glob must be text, not {glob!r}")
    for glob, value in sparsities.items():
        with _naming("sparsities", glob):
            if isinstance(patterns.parse(value), NM):
                raise RecipeError(f"'{value}' is no sparsity such as 60%; overrides take N:M")
    for glob, changes in overrides.items():
        with _naming("overrides", glob):
            _require_options(changes)
            changed(recipe, changes).target()


def _require_options(changes: Any) -> None:
    if not isinstance(changes, Mapping) or not changes:
        raise RecipeError(f"must map options such as 'method' to values, not {changes!r}")
    for option in changes:
        if option not in OVERRIDABLE:
            raise RecipeError(f"cannot set '{option}' for some sites: {did_you_mean(str(option), OVERRIDABLE)}")
    if changes.get("comparison_group") == "model":
        raise RecipeError("comparison_group 'model' compares all matrices with each other: set it for the whole run")


@contextmanager
def _naming(option: str, glob: str) -> Iterator[None]:
    try:
        yield
    except (RecipeError, PatternError) as error:
        raise type(error)(f"{option} '{glob}': {error}") from None


def require_matches(names: Collection[str], overrides: Overrides, sparsities: Mapping[str, Any]) -> None:
    """Raise RecipeError for a glob that matches none of the tensors to prune."""
    for option, table in (("sparsities", sparsities), ("overrides", overrides)):
        for glob in table:
            if not any(fnmatchcase(name, glob) for name in names):
                raise RecipeError(f"{option} '{glob}' matches nothing to prune: {did_you_mean(glob, names)}")
