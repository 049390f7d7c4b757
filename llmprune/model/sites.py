"""What can be pruned: the weight matrices of a block, as [outputs, inputs] whatever way the model stores them."""

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune.errors import NumericalError, RecipeError, did_you_mean

_CHECKED_AT_ONCE = 1 << 20  # elements whose finiteness is checked at once: the check needs several times their size

# Routers choose experts; pruning one saves nothing and derails the model. Transformers 5 keeps most of them in plain
# parameters, which are no sites anyway; these globs catch those that are Linear modules.
ROUTERS = ("*router*", "*.gate.weight", "*_gate.weight")


@dataclass(frozen=True)
class Stage:
    """A part of the model that is pruned as one: a decoder block, the input embedding, or the output head."""

    name: str
    module: nn.Module


@dataclass(frozen=True, eq=False)
class Site:
    """One prunable weight matrix."""

    name: str
    module: nn.Module
    shape: tuple[int, int]  # (outputs, inputs)
    transposed: bool  # stored as [inputs, outputs], as transformers' Conv1D does

    def view(self, stored: Tensor) -> Tensor:
        """Return the stored parameter, or a mask of it, as [outputs, inputs] (a view)."""
        return stored.T if self.transposed else stored


def sites_of(stage: Stage) -> list[Site]:
    """Return the sites of a stage in the order in which its modules are registered."""
    return list(_sites(stage))


def _sites(stage: Stage) -> Iterator[Site]:
    from transformers.pytorch_utils import Conv1D

    for path, module in stage.module.named_modules():
        name = ".".join(part for part in (stage.name, path, "weight") if part)
        if isinstance(module, nn.Linear):
            yield Site(name, module, (module.weight.shape[0], module.weight.shape[1]), transposed=False)
        elif isinstance(module, nn.Embedding) and module is stage.module:
            yield Site(name, module, (module.num_embeddings, module.embedding_dim), transposed=False)
        elif isinstance(module, Conv1D):
            yield Site(name, module, (module.weight.shape[1], module.weight.shape[0]), transposed=True)


def fused_parameters(stage: Stage) -> list[str]:
    """Return the names of parameters of three dimensions, most of them fused experts, which are no sites yet."""
    return [name for name, parameter in stage.module.named_parameters(stage.name) if parameter.ndim == 3]


@dataclass(frozen=True)
class Selection:
    """Globs on tensor names: `include` adds to what is pruned by default, `exclude` takes away and wins."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def takes(self, name: str, by_default: bool) -> bool:
        """Say whether the tensor called `name` is to be pruned."""
        if _matches(name, self.exclude):
            return False
        return by_default or _matches(name, self.include)

    def require_matches(self, names: Iterable[str]) -> None:
        """Raise RecipeError for a glob that matches no tensor of the model."""
        names = list(names)
        for option, globs in (("include", self.include), ("exclude", self.exclude)):
            for glob in globs:
                if not fnmatch.filter(names, glob):
                    raise RecipeError(f"--{option} '{glob}' matches no prunable tensor: {did_you_mean(glob, names)}")


def is_router(name: str) -> bool:
    """Say whether a tensor's name is that of a router."""
    return _matches(name, ROUTERS)


def require_finite(name: str, weight: Tensor) -> None:
    """Raise NumericalError, naming the tensor, when a weight is NaN or infinite."""
    if weight.is_floating_point() and not all(bool(torch.isfinite(part).all()) for part in _parts(weight)):
        raise NumericalError(f"{name} holds NaN or infinity: the checkpoint is damaged, download it again")


def _parts(weight: Tensor) -> tuple[Tensor, ...]:
    rows = weight.reshape(-1, weight.shape[-1]) if weight.ndim else weight.reshape(1, 1)
    parts: tuple[Tensor, ...] = rows.split(max(1, _CHECKED_AT_ONCE // max(1, rows.shape[1])))
    return parts


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)
