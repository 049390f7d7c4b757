"""Swap the fused experts of a loaded model for sparse ones, where that is measured to be faster."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.model.experts import is_of_interface, stacks_of
from llmprune.sparse.forms import is_worth
from llmprune.sparse.gate import SAMPLE_BYTES, WRONG
from llmprune.sparse.stacks import SparseExperts
from llmprune_kernels.bitmask.layout import TYPES, count_values
from llmprune_kernels.native import library

_TURNS, _LONGEST = 7, 2.0  # at most so many turns, and about so many seconds


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
    kept = sum(int(count_values(matrix.detach()).sum()) for stored in stacks for matrix in stored)
    share = kept / sum(stored.numel() for stored in stacks)
    return None if is_worth(share, next(iter(stacks)).dtype) else "too few zeros"


def _choose(model: nn.Module, modules: dict[str, nn.Module], batch: int) -> ExpertsChoice:
    first = next(iter(modules.values()))
    reason, seconds = _obstacle(first), None
    if reason is None:
        sample = list(modules.values())[: max(1, SAMPLE_BYTES // _nbytes(first))]
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
    if not float((found - expected).abs().max()) <= WRONG * float(expected.abs().max()):
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
