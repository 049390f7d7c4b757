"""What can be pruned: the weight matrices of a block, as [outputs, inputs] whatever way the model stores them."""

import fnmatch
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune.errors import NumericalError, RecipeError, did_you_mean
from llmprune.model.experts import stacks_of

_CHECKED_AT_ONCE = 1 << 20  # elements whose finiteness is checked at once: the check needs several times their size
_CHECKED_ON_A_GPU = 1 << 28  # which stops for each answer

# Routers choose experts; pruning one saves nothing and derails the model. Transformers 5 keeps most of them in plain
# parameters, which are no sites anyway; these globs catch those that are Linear modules.
ROUTERS = ("*router*", "*.gate.weight", "*.shared_expert_gate.weight")


@dataclass(frozen=True)
class Stage:
    """A part of the model that is pruned as one: a decoder block, the input embedding, or the output head."""

    name: str
    module: nn.Module


@dataclass(frozen=True, eq=False)
class Site:
    """One prunable weight matrix: a module's own, or one expert's part of a stack of them."""

    tensor: str  # name of the parameter that holds it
    module: nn.Module
    parameter: str  # the name within the module
    shape: tuple[int, int]  # (outputs, inputs)
    transposed: bool  # stored as [inputs, outputs], as transformers' Conv1D does
    expert: int | None = None
    experts: int = 1  # how many matrices the parameter holds

    @property
    def name(self) -> str:
        """The tensor's name, with the number of the expert in brackets."""
        return self.tensor if self.expert is None else f"{self.tensor}[{self.expert}]"

    @property
    def numel(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)

    @property
    def family(self) -> str:
        """One name for all experts that do the same job in a block; the site's own for what is no expert."""
        return re.sub(r"\.experts\.\d+\.", ".experts.*.", self.tensor)

    @property
    def of_expert(self) -> bool:
        """Whether it is one expert's: part of a stack, or in a module of its own."""
        return self.family != self.name

    @property
    def kind(self) -> str:
        """What holds the matrix: `Linear`, `Conv1D`, `expert` (one of a stack) or `Embedding`."""
        if self.expert is not None:
            return "expert"
        return "Conv1D" if self.transposed else "Embedding" if isinstance(self.module, nn.Embedding) else "Linear"

    def view(self, stored: Tensor) -> Tensor:
        """Return this matrix of the stored parameter, or of a mask of it, as [outputs, inputs] (a view)."""
        if self.expert is not None:
            stored = stored.view(self.experts, -1, stored.shape[-1])[self.expert]
        return stored.T if self.transposed else stored

    def is_stored_transposed(self, shape: tuple[int, ...]) -> bool:
        """Say whether a file's tensor of that shape is [inputs, outputs]: only as a whole parameter, not in pieces."""
        return self.transposed and shape == tuple(self.module.get_parameter(self.parameter).shape)


def tensor_of(name: str) -> str:
    """Return the tensor that holds the site of this name: `Site.name` less the number of an expert in brackets."""
    return name.partition("[")[0]


def sites_of(stage: Stage) -> list[Site]:
    """Return the sites of a stage in the order in which its modules are registered."""
    return list(_sites(stage))


def _sites(stage: Stage) -> Iterator[Site]:
    from transformers.pytorch_utils import Conv1D

    for path, module in stage.module.named_modules(prefix=stage.name):
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Embedding) and module is stage.module):
            yield Site(f"{path}.weight", module, "weight", _shape(module.weight, False), transposed=False)
        elif isinstance(module, Conv1D):
            yield Site(f"{path}.weight", module, "weight", _shape(module.weight, True), transposed=True)
        for stack in stacks_of(module):
            stored = module.get_parameter(stack.parameter)
            shape = _shape(stored.view(stack.count, -1, stored.shape[-1])[0], stack.transposed)
            for expert in range(stack.count):
                name = f"{path}.{stack.parameter}"
                yield Site(name, module, stack.parameter, shape, stack.transposed, expert, stack.count)


def _shape(weight: Tensor, transposed: bool) -> tuple[int, int]:
    rows, columns = weight.shape
    return (columns, rows) if transposed else (rows, columns)


def dense_parameters(stage: Stage) -> Iterator[tuple[str, str]]:
    """Yield the tensors of a stage that are no sites though they have two dimensions or more, and what they are."""
    sites = {site.tensor for site in _sites(stage)}
    for path, module in stage.module.named_modules(prefix=stage.name):
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.ndim > 1 and name not in sites:
                yield name, _what(name, module)


def outer_parameters(model: nn.Module, stages: Iterable[Stage]) -> dict[str, str]:
    """Return the parameters of two dimensions or more that are in none of the stages, and what they are."""
    inner = {id(parameter) for stage in stages for parameter in stage.module.parameters()}
    outer = (name for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in inner)
    return dict.fromkeys(outer, "outside the decoder blocks")


def _what(name: str, module: nn.Module) -> str:
    if is_router(name):
        return "router"
    return f"not a weight of a Linear, a Conv1D or an expert ({type(module).__name__})"


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


def require_finite(name: str, weight: Tensor, why: str = "the checkpoint is damaged, download it again") -> None:
    """Raise NumericalError, naming the tensor and saying why, when a weight is NaN or infinite."""
    if weight.is_floating_point() and not all(_is_finite(part) for part in _parts(weight)):
        raise NumericalError(f"{name} holds NaN or infinity: {why}")


def out_of_range(dtype: torch.dtype) -> str:
    """Return why a solution is not finite, and the way out."""
    return f"its new weights are out of the range of {dtype}; --exclude it, or use --method wanda, which changes none"


def _is_finite(part: Tensor) -> bool:
    """Add up first, which is many times faster: only of numbers that are finite the sum is, though it may overflow."""
    total = part.detach().sum(dtype=torch.promote_types(part.dtype, torch.float32))
    return math.isfinite(float(total)) or bool(torch.isfinite(part).all())


def _parts(weight: Tensor) -> tuple[Tensor, ...]:
    rows = weight.reshape(-1, weight.shape[-1]) if weight.ndim else weight.reshape(1, 1)
    size = _CHECKED_ON_A_GPU if weight.device.type == "cuda" else _CHECKED_AT_ONCE
    parts: tuple[Tensor, ...] = rows.split(max(1, size // max(1, rows.shape[1])))
    return parts


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)
