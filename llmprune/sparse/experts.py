"""Fused experts kept sparse: a mixture's own forward, on weights that multiply by the sparse kernel.

Transformers writes the eager forward of every mixture of its experts interface as a loop over the experts that were
chosen, each multiplying its tokens by its part of a stack: `linear(x, stack[expert])`, or `x @ stack[expert]` where the
stack is transposed. A `SparseStack` answers that indexing with a matrix that knows how to be multiplied.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmprune.errors import UnsupportedModelError
from llmprune.model.experts import is_of_interface, stacks_of
from llmprune_kernels.bitmask.layout import TYPES, Tiles, expand
from llmprune_kernels.bitmask.ops import bitmask_linear
from llmprune_kernels.native import library

EXPAND_FROM = 64  # tokens of one expert
_SAMPLE_BYTES = 256 << 20  # dense weights that are measured: more than a processor's cache holds
_TURNS, _LONGEST = 7, 2.0  # at most so many turns, and about so many seconds
_WRONG = 0.02  # of the largest output: more than rounding explains
_WORTH = 0.95  # of the dense bytes: what stacks must shrink to


class SparseMatrix:
    """One expert's weight, for `functional.linear` or, where the stack is transposed, for `x @ weight`."""

    def __init__(self, tiles: Tiles, transposed: bool) -> None:
        self._tiles, self._transposed = tiles, transposed

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x, matrix, *bias = args
        if not isinstance(matrix, SparseMatrix) or function is not _product(matrix._transposed):
            return NotImplemented
        tiles, (given,) = matrix._tiles, [*bias, (kwargs or {}).get("bias")][:1]
        return bitmask_linear(x, tiles.masks, tiles.values, tiles.offsets, tiles.outputs, given, EXPAND_FROM)


def _product(transposed: bool) -> Any:
    """Return the function that a forward calls to multiply by a matrix of a stack."""
    return Tensor.matmul if transposed else functional.linear


class SparseStack:
    """Stands for the parameter [experts, outputs, inputs], or [experts, inputs, outputs] if `transposed`."""

    def __init__(self, tiles: Sequence[Tiles], transposed: bool) -> None:
        self.tiles, self.transposed = list(tiles), transposed

    @classmethod
    def pack(cls, stored: Tensor, transposed: bool) -> "SparseStack":
        """Return a stack of experts, on the CPU and of a dtype in `TYPES`, in tiles."""
        return cls([Tiles.pack(matrix.T if transposed else matrix) for matrix in stored.detach()], transposed)

    def __getitem__(self, expert: Any) -> SparseMatrix:
        return SparseMatrix(self.tiles[int(expert)], self.transposed)

    def __len__(self) -> int:
        return len(self.tiles)

    def dense(self) -> Tensor:
        """Return the parameter that this one stands for."""
        return torch.stack([expand(tiles).T if self.transposed else expand(tiles) for tiles in self.tiles])

    def apply(self, fn: Callable[[Tensor], Tensor]) -> "SparseStack":
        """Return the stack with its values cast; raises UnsupportedModelError for what no kernel serves."""
        return SparseStack([_cast(tiles, fn(tiles.values)) for tiles in self.tiles], self.transposed)

    def nbytes(self) -> int:
        """Return the bytes that the tensors occupy."""
        return sum(tiles.nbytes() for tiles in self.tiles)


def _cast(tiles: Tiles, values: Tensor) -> Tiles:
    if values.device.type != "cpu" or values.dtype not in TYPES:
        raise UnsupportedModelError(
            f"sparse experts run on the CPU in float32, bfloat16 or float16, not on {values.device} in {values.dtype}: "
            "call llmprune.densify(model) first"
        )
    return Tiles(tiles.masks, values, tiles.offsets, tiles.outputs, tiles.inputs)


class SparseExperts(nn.Module):
    """Mixed into a class of experts: the same forward, biases, router and state dict, with sparse stacks.

    Raises:
        UnsupportedModelError: it is moved to a device or cast to a dtype that no sparse kernel serves.
    """

    sparse_stacks: dict[str, SparseStack]

    @classmethod
    def of(cls, experts: nn.Module) -> "SparseExperts":
        """Return sparse experts in the place of dense ones, which stay as they are."""
        made: SparseExperts = _with_class(experts, _sparse_class(type(experts)))
        made.sparse_stacks = {}
        for stack in stacks_of(experts):
            made._hold(stack.parameter, SparseStack.pack(made._parameters.pop(stack.parameter), stack.transposed))
        return made

    def dense(self) -> nn.Module:
        """Return the dense experts that these stand for."""
        made = _with_class(self, type(self).__mro__[2])
        stacks = made.__dict__.pop("sparse_stacks")
        for name in stacks:
            del made.__dict__[name]
        parameters = {name: nn.Parameter(stack.dense(), requires_grad=False) for name, stack in stacks.items()}
        made._parameters = {**parameters, **made._parameters}
        return made

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the experts one after the other, as the class's own eager forward does."""
        eager: Any = type(self).__mro__[2].forward
        return eager.__wrapped__(self, *args, **kwargs)

    def nbytes(self) -> int:
        """Return the bytes that the sparse stacks occupy."""
        return sum(stack.nbytes() for stack in self.sparse_stacks.values())

    def _hold(self, name: str, stack: SparseStack) -> None:
        self.sparse_stacks[name] = stack
        self.__dict__[name] = stack

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseExperts":
        cast = {name: stack.apply(fn) for name, stack in self.sparse_stacks.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, stack in cast.items():
            self._hold(name, stack)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: stack.dense() for name, stack in self.sparse_stacks.items()})
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name, stack in self.sparse_stacks.items():
            given, tiles = state_dict.get(prefix + name), stack.tiles[0]
            shape = (tiles.inputs, tiles.outputs) if stack.transposed else (tiles.outputs, tiles.inputs)
            if given is not None and tuple(given.shape) == (len(stack), *shape):
                self._hold(name, SparseStack.pack(given.to("cpu", tiles.values.dtype), stack.transposed))
                state_dict = {key: value for key, value in state_dict.items() if key != prefix + name}
        super()._load_from_state_dict(state_dict, prefix, *rest)


@cache
def _sparse_class(dense: type) -> type:
    return type(f"Sparse{dense.__name__}", (SparseExperts, dense), {})


def _with_class(module: nn.Module, kind: type) -> Any:
    """Return a module of another class with the same contents, whose parameters can be taken away."""
    made = copy.copy(module)
    made.__class__ = kind
    made._parameters = dict(module._parameters)
    if "sparse_stacks" in made.__dict__:
        made.__dict__["sparse_stacks"] = dict(made.__dict__["sparse_stacks"])
    return made


@dataclass(frozen=True)
class ExpertsChoice:
    """What became of the fused experts of one class and size.

    Attributes:
        modules: how many, of `experts` experts each.
        kernel: "bitmask", or "dense" with the reason.
        bytes: of their stacks, dense and as they are now.
        seconds: of the measured modules, dense and sparse, one forward each; None where nothing was measured.
    """

    kind: str
    modules: int
    experts: int
    kernel: str
    reason: str
    bytes: tuple[int, int]
    seconds: tuple[float, float] | None = None

    def __str__(self) -> str:
        return f"{self.modules:4} x {self.kind} of {self.experts} experts: {self.kernel} ({self.reason})"


def sparsify_experts(model: nn.Module, batch: int) -> list[ExpertsChoice]:
    """Make fused experts of a model on the CPU sparse, in place, where that measures faster at `batch` tokens."""
    groups: dict[Any, dict[str, nn.Module]] = defaultdict(dict)
    for name, module in model.named_modules():
        if isinstance(module, SparseExperts):
            module = module.dense()
        if any(True for _ in stacks_of(module)):
            groups[_kind(module)][name] = module
    return [_choose(model, modules, batch) for modules in groups.values()]


def densify_experts(model: nn.Module) -> None:
    """Make all sparse experts of a model dense again, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseExperts):
            model.set_submodule(name, module.dense())


def _kind(module: nn.Module) -> Any:
    shapes = [(name, tuple(stored.shape), stored.dtype) for name, stored in _stacks(module).items()]
    return type(module), *shapes, _obstacle(module)


def _stacks(module: nn.Module) -> dict[str, Tensor]:
    return {stack.parameter: module.get_parameter(stack.parameter) for stack in stacks_of(module)}


def _obstacle(module: nn.Module) -> str | None:
    """Return why experts cannot be sparse, None if they can."""
    stacks = _stacks(module).values()
    if not is_of_interface(module):
        return "no sparse kernel for this kind of experts"
    if hasattr(module, "_hf_hook"):
        return "moved about by accelerate"
    if any(stored.device.type != "cpu" for stored in stacks):
        return "not on the CPU"
    if any(stored.dtype not in TYPES for stored in stacks):
        return "a dtype without a sparse kernel"
    if library() is None:
        return "no compiled kernels"
    kept = sum(int(matrix.count_nonzero()) for stored in stacks for matrix in stored)
    total, size = sum(stored.numel() for stored in stacks), next(iter(stacks)).element_size()
    return "too few zeros" if kept / total + 1 / (8 * size) > _WORTH else None


def _choose(model: nn.Module, modules: dict[str, nn.Module], batch: int) -> ExpertsChoice:
    first = next(iter(modules.values()))
    reason, seconds = _obstacle(first), None
    if reason is None:
        sample = list(modules.values())[: max(1, _SAMPLE_BYTES // _nbytes(first))]
        reason, seconds = _measured(sample, batch)
    nbytes, used = len(modules) * _nbytes(first), 0
    for name, module in modules.items():
        placed = module if reason else SparseExperts.of(module)
        model.set_submodule(name, placed)
        used += placed.nbytes() if isinstance(placed, SparseExperts) else _nbytes(module)
    kernel = "dense" if reason else "bitmask"
    return ExpertsChoice(
        type(first).__name__, len(modules), len(next(iter(_stacks(first).values()))), kernel,
        reason or "measured faster", (nbytes, used), seconds,
    )  # fmt: skip


def _nbytes(module: nn.Module) -> int:
    return sum(stored.nbytes for stored in _stacks(module).values())


def _measured(sample: Sequence[nn.Module], batch: int) -> tuple[str | None, tuple[float, float] | None]:
    """Return why experts stay dense, None if they need not, and the seconds of the sample, dense and sparse."""
    sparse = [SparseExperts.of(module) for module in sample]
    inputs = _inputs(sample[0], batch)
    try:
        with torch.inference_mode():
            found, expected = sparse[0](*inputs), sample[0](*inputs)
    except Exception as error:  # a forward of its own that does something else with its weights
        return f"their forward does not run sparse: {type(error).__name__}", None
    if not float((found - expected).abs().max()) <= _WRONG * float(expected.abs().max()):
        return "their forward computes something else when sparse", None
    seconds = _seconds(sample, sparse, inputs)
    return (None if seconds[1] < seconds[0] else "measured faster"), seconds


def _inputs(module: Any, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a router might hand to experts: hidden states [T, inputs], chosen experts [T, K], weights [T, K]."""
    stack = next(stacks_of(module))
    stored = module.get_parameter(stack.parameter)
    generator = torch.Generator().manual_seed(0)
    chosen = min(stack.count, getattr(module.config, "num_experts_per_tok", None) or 1)
    hidden = torch.randn(batch, stored.shape[1 if stack.transposed else 2], generator=generator).to(stored.dtype)
    experts = torch.rand(batch, stack.count, generator=generator).topk(chosen).indices
    return hidden, experts, torch.full((batch, chosen), 1 / chosen, dtype=stored.dtype)


@torch.inference_mode()
def _seconds(
    dense: Sequence[nn.Module], sparse: Sequence[nn.Module], inputs: tuple[Tensor, ...]
) -> tuple[float, float]:
    """Return the shortest turn of each side; in a turn all modules run once, as a model runs them."""
    best = [float("inf"), float("inf")]
    ends = time.perf_counter() + _LONGEST
    for turn in range(_TURNS):
        if turn > 1 and time.perf_counter() > ends:
            break
        for side, modules in enumerate((dense, sparse)):
            began = time.perf_counter()
            for module in modules:
                module(*inputs)
            best[side] = min(best[side], time.perf_counter() - began)
    return best[0], best[1]
