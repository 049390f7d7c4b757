"""The forms in which a weight is kept, one for each kind of kernels that reads it, and which of them suit a weight.

Every form gives the dense weight back. A form has one or more kernels; `linear` runs the one it is asked for. On the
CPU the GPU's forms work too, by their readable references.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from llmprune_kernels import native
from llmprune_kernels.bitmask import layout, rows, rows_ops
from llmprune_kernels.bitmask.layout import TYPES, Bitmask
from llmprune_kernels.bitmask.ops import bitmask_linear
from llmprune_kernels.support import cusparselt_missing, sparse_cores_missing, triton_missing
from llmprune_kernels.two_four import fragments, ops, reference

NEVER = 1 << 40  # tokens
_WORTH = 0.95  # of the dense bytes: what a weight must shrink to
_AT_ONCE = 1 << 24  # weights that are looked at for their pattern


@dataclass(frozen=True)
class Form(ABC):
    """A weight [outputs, inputs] of some dtype, in tensors that certain kernels read."""

    tensors: tuple[Tensor, ...]
    outputs: int
    inputs: int
    dtype: torch.dtype

    kernels: ClassVar[tuple[str, ...]]
    exact: ClassVar[bool] = True  # whether `expand` restores every bit

    @classmethod
    def of(cls, weight_OI: Tensor) -> "Form":
        """Return the weight in this form."""
        outputs, inputs = weight_OI.shape
        return cls(cls.pack(weight_OI.detach()), outputs, inputs, weight_OI.dtype)

    @staticmethod
    @abstractmethod
    def pack(weight_OI: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the form."""

    @abstractmethod
    def expand(self) -> Tensor:
        """Return the dense weight."""

    @abstractmethod
    def multiply(self, x_TI: Tensor, kernel: str, setting: int) -> Tensor:
        """Return x times the transposed weight, [T, O]."""

    def linear(self, x: Tensor, kernel: str, setting: int, bias: Tensor | None) -> Tensor:
        """Return x [..., I] times the transposed weight, plus the bias: [..., O]."""
        if kernel == "expand":
            return functional.linear(x, self.expand(), bias)
        y = self.multiply(x.reshape(-1, self.inputs), kernel, setting)
        return (y if bias is None else y + bias).view(*x.shape[:-1], self.outputs)

    def search(self, x_TI: Tensor, kernel: str) -> int:
        """Return the setting with which a kernel is fastest for this input, 0 where it has none."""
        return 0

    def share(self) -> float:
        """Return the share of the weight that is not zero, roughly."""
        part = self.expand()[: max(1, _AT_ONCE // self.inputs)]
        return int(part.count_nonzero()) / part.numel()

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.tensors[0].device

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Form":
        """Return the form with every tensor moved."""
        return replace(self, tensors=tuple(move(tensor) for tensor in self.tensors))

    def nbytes(self) -> int:
        """Return the bytes that the tensors occupy."""
        return sum(tensor.nbytes for tensor in self.tensors)


class Dense(Form):
    """The weight itself, kept where dense is the fastest for some numbers of tokens, and sparse for others."""

    kernels = ("dense",)

    @staticmethod
    def pack(weight_OI: Tensor) -> tuple[Tensor, ...]:
        return (weight_OI,)

    def expand(self) -> Tensor:
        return self.tensors[0]

    def multiply(self, x_TI: Tensor, kernel: str, setting: int) -> Tensor:
        return functional.linear(x_TI, self.tensors[0])


class Packed(Form):
    """A bitmask as compressed files hold it, in the layout of the CPU's kernels, for any pattern."""

    kernels = ("bitmask", "expand")

    @classmethod
    def holding(cls, matrix: Bitmask) -> "Packed":
        """Return the form of a matrix that is in this layout already; nothing is copied."""
        return cls((matrix.masks, matrix.values, matrix.starts), matrix.outputs, matrix.inputs, matrix.values.dtype)

    @staticmethod
    def pack(weight_OI: Tensor) -> tuple[Tensor, ...]:
        matrix = Bitmask.pack(weight_OI)
        return matrix.masks, matrix.values, matrix.starts

    @property
    def matrix(self) -> Bitmask:
        """The form as its kernels take it."""
        masks, values, starts = self.tensors
        return Bitmask(masks, values, starts, self.inputs)

    def share(self) -> float:
        return self.matrix.count() / (self.outputs * self.inputs)

    def expand(self) -> Tensor:
        return layout.expand(self.matrix)

    def multiply(self, x_TI: Tensor, kernel: str, setting: int) -> Tensor:
        return self.linear(x_TI, kernel, setting, None)

    def linear(self, x: Tensor, kernel: str, setting: int, bias: Tensor | None) -> Tensor:
        # One operator for both kernels: it adds the bias before it rounds, and expands a part of the weight at a time.
        product: Tensor = bitmask_linear(x, *self.tensors, self.inputs, bias, 0 if kernel == "expand" else NEVER)
        return product


class Fragments(Form):
    """2:4 in the order in which sparse tensor cores take it."""

    kernels = ("mma_sp", "expand")

    @staticmethod
    def pack(weight_OI: Tensor) -> tuple[Tensor, ...]:
        return fragments.pack(weight_OI)

    def expand(self) -> Tensor:
        weight_OI: Tensor = ops.expand(*self.tensors, self.outputs, self.inputs, self.dtype, True)
        return weight_OI

    def multiply(self, x_TI: Tensor, kernel: str, setting: int) -> Tensor:
        y_TO: Tensor = ops.mma(x_TI, *self.tensors, self.outputs)
        return y_TO


class Pairs(Form):
    """2:4 for GPUs without sparse tensor cores, or a Triton that cannot use them."""

    kernels = ("two_four", "expand")

    @staticmethod
    def pack(weight_OI: Tensor) -> tuple[Tensor, ...]:
        return reference.pack(weight_OI)

    def expand(self) -> Tensor:
        weight_OI: Tensor = ops.expand(*self.tensors, self.outputs, self.inputs, self.dtype, False)
        return weight_OI

    def multiply(self, x_TI: Tensor, kernel: str, setting: int) -> Tensor:
        y_TO: Tensor = ops.pairs(x_TI, *self.tensors)
        return y_TO


class Rows(Form):
    """A bitmask in the layout of the GPU's kernels, for any pattern."""

    kernels = ("bitmask", "expand")

    @staticmethod
    def pack(weight_OI: Tensor) -> tuple[Tensor, ...]:
        return rows.pack(weight_OI)

    def expand(self) -> Tensor:
        weight_OI: Tensor = rows_ops.expand(*self.tensors, self.inputs)
        return weight_OI

    def multiply(self, x_TI: Tensor, kernel: str, setting: int) -> Tensor:
        y_TO: Tensor = rows_ops.linear(x_TI, *self.tensors)
        return y_TO


class CuSparseLt(Form):
    """2:4 in the form of NVIDIA's cuSPARSELt, which torch brings along; its setting is the number of an algorithm."""

    kernels = ("cusparselt",)
    exact = False  # -0.0 comes back as 0.0

    @staticmethod
    def pack(weight_OI: Tensor) -> tuple[Tensor, ...]:
        return (torch._cslt_compress(weight_OI.contiguous()),)

    def expand(self) -> Tensor:
        eye_II = torch.eye(self.inputs, dtype=self.dtype, device=self.tensors[0].device)
        return self.multiply(eye_II, "cusparselt", 0).t().contiguous()

    def multiply(self, x_TI: Tensor, kernel: str, setting: int) -> Tensor:
        y_TO: Tensor = ops.cusparselt(x_TI, self.tensors[0], self.outputs, setting)
        return y_TO

    def search(self, x_TI: Tensor, kernel: str) -> int:
        filled_IT = ops.filled(x_TI).t()
        return int(torch._cslt_sparse_mm_search(self.tensors[0], filled_IT, transpose_result=True))


def sparse_forms(weight_OI: Tensor) -> list[type[Form]]:
    """Return the sparse forms that suit a weight where it is, the preferred one first; none if `obstacle` says why."""
    if obstacle(weight_OI.dtype, weight_OI.device) is not None:
        return []
    return [Packed] if weight_OI.device.type == "cpu" else gpu_forms(weight_OI)


def forms_beside(form: Form) -> list[type[Form]]:
    """Return what `sparse_forms` does, for the weight of a form where it is."""
    return [Packed] if isinstance(form, Packed) else sparse_forms(form.expand())


def gpu_forms(weight_OI: Tensor) -> list[type[Form]]:
    """Return the forms that suit a weight on a GPU: those for 2:4 if it is that, by what the GPU and libraries offer."""
    if not is_two_four(weight_OI):
        return [Rows]
    device, (outputs, inputs) = weight_OI.device, weight_OI.shape
    found: list[type[Form]] = [Rows]
    if sparse_cores_missing(device) is None:
        found = [Fragments]
    elif inputs % reference.COLUMNS == 0:
        found = [Pairs]
    if cusparselt_missing(device) is None and outputs % 16 == inputs % 16 == 0:
        found.append(CuSparseLt)
    return found


def obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why no sparse kernel can run for weights of a dtype on a device, None if one can."""
    if dtype not in TYPES:
        return "a dtype without a sparse kernel"
    if device.type == "cpu":
        return "no compiled kernels" if native.library() is None else None
    if device.type == "cuda":
        return triton_missing()
    return f"on {device.type}, where there is no sparse kernel"


def is_worth(share: float, dtype: torch.dtype) -> bool:
    """Say whether a weight of which this share is values is enough smaller as a bitmask and values."""
    return share + 1 / (8 * dtype.itemsize) <= _WORTH


def is_two_four(weight_OI: Tensor) -> bool:
    """Say whether a weight of 16 bits keeps at most two of every four columns."""
    inputs = weight_OI.shape[1]
    if weight_OI.element_size() != 2 or inputs % 4:
        return False
    parts = weight_OI.split(max(1, _AT_ONCE // inputs))
    return all(int((part != 0).view(len(part), -1, 4).sum(-1).max()) <= 2 for part in parts)


@dataclass(frozen=True)
class Step:
    """From this number of tokens on, a kernel of the form at `place` runs with this setting."""

    tokens: int
    place: int
    kernel: str
    setting: int = 0


def default_steps(forms: Sequence[Form], expand_from: int) -> tuple[Step, ...]:
    """Return what runs where nothing was measured: the first kernel for few tokens, the last one for many."""
    kernels = forms[0].kernels
    first: tuple[Any, ...] = (Step(1, 0, kernels[0]),)
    return first if len(kernels) == 1 else (*first, Step(expand_from, 0, kernels[-1]))
