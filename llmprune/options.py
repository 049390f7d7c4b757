"""Options that are checked, and turned into what they stand for, each on its own."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from llmprune.errors import RecipeError, did_you_mean

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def require_whole(name: str, value: Any, least: int) -> None:
    """Raise RecipeError unless the option called `name` is None or a whole number of at least `least`."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise RecipeError(f"{name} must be a whole number of at least {least}, not {value!r}")


def is_number(value: Any) -> bool:
    """Say whether an option is a number; `true`, which Python counts as 1, is not meant as one."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_dtype(name: Any) -> None:
    """Raise RecipeError unless `name` is `auto` or one of `DTYPES`."""
    if name not in ("auto", *DTYPES):
        raise RecipeError(f"unknown dtype '{name}': {did_you_mean(str(name), ['auto', *DTYPES])}")


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is the first GPU, or the CPU where there is none.

    Raises:
        RecipeError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        made = torch.empty(0, device=torch.device(name))
        made.tolist()  # where nothing can be read back, as from `meta`, nothing can be run
    except (RuntimeError, AssertionError, TypeError):
        raise RecipeError(f"device '{name}' is not available here; use --device cpu or --device auto") from None
    return made.device  # with its number, as tensors have it: `cuda` and `cuda:0` do not compare as equal


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which a GPU is the current one, which torch's clocks and counts of memory are of."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def host_by_default() -> AbstractContextManager[Any]:
    """Return the context in which tensors for no device in particular are the host's, as without `set_default_device`."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def as_globs(name: str, value: Any) -> tuple[str, ...]:
    """Return the globs that the option called `name` gives, one or several.

    Raises:
        RecipeError: they are no text.
    """
    globs = (value,) if isinstance(value, str) else () if value is None else value
    if not isinstance(globs, list | tuple) or not all(isinstance(glob, str) for glob in globs):
        raise RecipeError(f"{name} must be a glob or a list of globs, not {value!r}")
    return tuple(globs)
