"""Fused experts kept sparse: a mixture's own forward, on weights that multiply by the sparse kernel.

Transformers writes the eager forward of every mixture of its experts interface as a loop over the experts that were
chosen, each multiplying its tokens by its part of a stack: `linear(x, stack[expert])`, or `x @ stack[expert]` where the
stack is transposed. A `SparseStack` answers that indexing with a matrix that knows how to be multiplied.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmprune.errors import UnsupportedModelError
from llmprune.model.experts import stacks_of
from llmprune_kernels.bitmask.layout import TYPES, Bitmask, expand
from llmprune_kernels.bitmask.ops import bitmask_linear

EXPAND_FROM = 64  # tokens of one expert


class SparseMatrix:
    """One expert's weight, for `functional.linear` or, where the stack is transposed, for `x @ weight`."""

    def __init__(self, matrix: Bitmask, transposed: bool) -> None:
        self._held, self._transposed = matrix, transposed

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x, matrix, *bias = args
        if not isinstance(matrix, SparseMatrix) or function is not _product(matrix._transposed):
            return NotImplemented
        held, (given,) = matrix._held, [*bias, (kwargs or {}).get("bias")][:1]
        return bitmask_linear(x, held.masks, held.values, held.starts, held.inputs, given, EXPAND_FROM)


def _product(transposed: bool) -> Any:
    """Return the function that a forward calls to multiply by a matrix of a stack."""
    return Tensor.matmul if transposed else functional.linear


class SparseStack:
    """Stands for the parameter [experts, outputs, inputs], or [experts, inputs, outputs] if `transposed`."""

    def __init__(self, matrices: Sequence[Bitmask], transposed: bool) -> None:
        self.matrices, self.transposed = list(matrices), transposed

    @classmethod
    def pack(cls, stored: Tensor, transposed: bool) -> "SparseStack":
        """Return a stack of experts, on the CPU and of a dtype in `TYPES`, made sparse."""
        return cls([Bitmask.pack(matrix.T if transposed else matrix) for matrix in stored.detach()], transposed)

    def __getitem__(self, expert: Any) -> SparseMatrix:
        return SparseMatrix(self.matrices[int(expert)], self.transposed)

    def __len__(self) -> int:
        return len(self.matrices)

    def dense(self) -> Tensor:
        """Return the parameter that this one stands for."""
        return torch.stack([expand(matrix).T if self.transposed else expand(matrix) for matrix in self.matrices])

    def apply(self, fn: Callable[[Tensor], Tensor]) -> "SparseStack":
        """Return the stack with its values cast; raises UnsupportedModelError for what no kernel serves."""
        return SparseStack([_cast(matrix, fn(matrix.values)) for matrix in self.matrices], self.transposed)

    def nbytes(self) -> int:
        """Return the bytes that the tensors occupy."""
        return sum(matrix.nbytes() for matrix in self.matrices)


def _cast(matrix: Bitmask, values: Tensor) -> Bitmask:
    if values.device.type != "cpu" or values.dtype not in TYPES:
        raise UnsupportedModelError(
            f"sparse experts run on the CPU in float32, bfloat16 or float16, not on {values.device} in {values.dtype}: "
            "call llmprune.densify(model) first"
        )
    return replace(matrix, values=values)


class SparseExperts(nn.Module):
    """Mixed into a class of experts: the same forward, biases, router and state dict, with sparse stacks.

    Raises:
        UnsupportedModelError: it is moved to a device or cast to a dtype that no sparse kernel serves.
    """

    sparse_stacks: dict[str, SparseStack]

    @classmethod
    def of(cls, experts: nn.Module) -> "SparseExperts":
        """Return sparse experts in the place of dense ones, which stay as they are."""
        kind: Any = type(experts)
        made: SparseExperts = _with_class(experts, _sparse_class(kind))
        made.sparse_stacks = {}
        for stack in stacks_of(experts):
            del made._parameters[stack.parameter]
            made._hold(stack.parameter, SparseStack.pack(experts.get_parameter(stack.parameter), stack.transposed))
        return made

    def dense(self) -> nn.Module:
        """Return the dense experts that these stand for."""
        made: nn.Module = _with_class(self, self._dense_class())
        stacks = made.__dict__.pop("sparse_stacks")
        for name in stacks:
            del made.__dict__[name]
        parameters = {name: nn.Parameter(stack.dense(), requires_grad=False) for name, stack in stacks.items()}
        made._parameters = {**parameters, **made._parameters}
        return made

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the experts one after the other, as the class's own eager forward does."""
        return self._dense_class().forward.__wrapped__(self, *args, **kwargs)

    def _dense_class(self) -> Any:
        return type(self).__mro__[2]  # after the class that `_sparse_class` makes, and this one

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
            given, first = state_dict.get(prefix + name), stack.matrices[0]
            shape = (first.inputs, first.outputs) if stack.transposed else (first.outputs, first.inputs)
            if given is not None and tuple(given.shape) == (len(stack), *shape):
                self._hold(name, SparseStack.pack(given.to("cpu", first.values.dtype), stack.transposed))
                state_dict = {key: value for key, value in state_dict.items() if key != prefix + name}
        super()._load_from_state_dict(state_dict, prefix, *rest)


@cache
def _sparse_class(dense: Any) -> Any:
    return type(f"Sparse{dense.__name__}", (SparseExperts, dense), {})


def _with_class(module: nn.Module, kind: type) -> Any:
    """Return a module of another class with the same contents, whose parameters can be taken away."""
    made = copy.copy(module)
    made.__class__ = kind
    made._parameters = dict(module._parameters)
    if "sparse_stacks" in made.__dict__:
        made.__dict__["sparse_stacks"] = dict(made.__dict__["sparse_stacks"])
    return made
