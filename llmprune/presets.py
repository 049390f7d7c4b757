"""Named recipes: what to ask for when quality for the time spent is all that matters.

Measured on trained models in `eval/results/LOG.md`. Each later one costs more time and loses less.
"""

from collections.abc import Mapping
from typing import Any

from llmprune import methods
from llmprune.errors import RecipeError, did_you_mean
from llmprune.statistics import ColumnMoments, Gradient, Gram

_TOWARDS_DENSE = {"true_sequential": True, "dense_target": "auto", "autocast": True}
_SOLVER = {"arithmetic": "fast", "sampling_damp": 0.5}
_BY_LOSS = {"allocation": "fisher"}

_SHORT_SEARCH = {"iterations": 10, "stages": 3, "first_rho": 0.2, "refit": 2, **_SOLVER}
_LONG_SEARCH = {"iterations": 20, "stages": 5, "first_rho": 0.2, "refit": 4, **_SOLVER}

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"method": "sparsegpt", "method_options": _SOLVER, **_TOWARDS_DENSE},
    "balanced": {"method": "admm", "method_options": _SHORT_SEARCH, **_TOWARDS_DENSE, **_BY_LOSS},
    "best": {"method": "admm", "method_options": _LONG_SEARCH, **_TOWARDS_DENSE, **_BY_LOSS, "tune_epochs": 10},
}
# What is otherwise for N:M: such a sparsity is the same everywhere, so the time of sharing it out goes into the search.
_OF_GROUPS: dict[str, dict[str, Any]] = {"balanced": {"method_options": _LONG_SEARCH}}


def expanded(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options in which `preset` is replaced by what it stands for; what is given beside it wins.

    What a preset asks for, and the method or the pattern given beside it has no use for, is left out.

    Raises:
        RecipeError: there is no such preset.
    """
    given = dict(options)
    name = given.pop("preset", None)
    if name is None:
        return given
    if not isinstance(name, str) or name not in PRESETS:
        raise RecipeError(f"unknown preset '{name}': {did_you_mean(str(name), PRESETS)}")
    preset = _preset(name, of_groups=":" in str(given.get("pattern", "")))
    method = given.get("method", preset["method"])
    for option in _unusable(preset, method):
        preset.pop(option)
    if given.get("comparison_group") == "model":
        preset.pop("allocation", None)  # the weights of all matrices compete already
    if method != preset["method"]:
        preset.pop("method_options", None)  # those of another method
    elif isinstance(given.get("method_options"), Mapping):
        given["method_options"] = preset.get("method_options", {}) | dict(given["method_options"])
    return preset | given


def _preset(name: str, of_groups: bool) -> dict[str, Any]:
    preset = dict(PRESETS[name])
    if of_groups:
        preset.pop("allocation", None)
        preset |= _OF_GROUPS.get(name, {})
    return preset


def _unusable(preset: Mapping[str, Any], method: Any) -> list[str]:
    """Return the preset's options that a method would be refused with."""
    needs = getattr(methods.get(method) if isinstance(method, str) else method, "needs", None)
    unusable = set[str]()
    if needs is not Gram:
        unusable |= {"dense_target"}  # it fits no outputs
    if needs in (ColumnMoments, Gradient):
        unusable |= {"allocation"}  # whose curves are solved from Gram matrices
    if needs in (None, Gradient):
        unusable |= {"tune_epochs", "true_sequential", "autocast"}  # it is not fed by the pruned model
    return [option for option in preset if option in unusable]


def in_full() -> dict[str, dict[str, Any]]:
    """Return every preset by its name, and as `NAME, N:M` what it is for such patterns, where that differs."""
    found = {}
    for name, preset in PRESETS.items():
        found[name], grouped = preset, _preset(name, of_groups=True)
        if grouped != preset:
            found[f"{name}, N:M"] = grouped
    return found


def as_yaml() -> str:
    """Return all presets as recipe files, one after another; those for N:M need such a pattern beside them."""
    import yaml

    return "\n".join(f"# {name}\n{yaml.safe_dump(preset, sort_keys=False)}" for name, preset in in_full().items())
