"""Named recipes: what to ask for when quality for the time spent is all that matters.

Measured on trained models in `eval/results/LOG.md`. Each later one costs more time and loses less.
"""

from collections.abc import Mapping
from typing import Any

from llmprune import methods
from llmprune.errors import RecipeError, did_you_mean
from llmprune.statistics import ColumnMoments, Gradient, Gram

_TOWARDS_DENSE = {"true_sequential": True, "dense_target": 0.5, "autocast": True}
_BY_LOSS = {"allocation": "fisher"}  # of unstructured patterns; N:M is the same everywhere

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"method": "sparsegpt", "method_options": {"arithmetic": "fast"}, **_TOWARDS_DENSE},
    "balanced": {
        "method": "admm",
        "method_options": {"iterations": 10, "stages": 3, "first_rho": 0.2, "refit": 2},
        **_TOWARDS_DENSE,
        **_BY_LOSS,
    },
    "best": {"method": "admm", **_TOWARDS_DENSE, **_BY_LOSS, "tune_epochs": 10},
}


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
    if name not in PRESETS:
        raise RecipeError(f"unknown preset '{name}': {did_you_mean(str(name), PRESETS)}")
    preset = dict(PRESETS[name])
    method = given.get("method", preset["method"])
    for option in _unusable(preset, method):
        preset.pop(option)
    if ":" in str(given.get("pattern", "")) or given.get("comparison_group") == "model":
        preset.pop("allocation", None)  # nothing is to be shared out
    if method != preset["method"]:
        preset.pop("method_options", None)  # those of another method
    elif isinstance(given.get("method_options"), Mapping):
        given["method_options"] = preset.get("method_options", {}) | dict(given["method_options"])
    return preset | given


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


def as_yaml() -> str:
    """Return all presets as recipe files, one after another."""
    import yaml

    return "\n".join(f"# {name}\n{yaml.safe_dump(preset, sort_keys=False)}" for name, preset in PRESETS.items())
