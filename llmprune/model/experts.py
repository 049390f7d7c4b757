"""Fused experts: parameters that hold one matrix for each expert of a mixture.

Transformers 5 keeps the experts of most models in such stacks, in modules of its experts interface, which say
themselves how the stack is stored. The few stacks outside that interface are data here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Stack:
    """A parameter that holds `count` matrices, each [outputs, inputs], or [inputs, outputs] if `transposed`."""

    parameter: str
    count: int
    transposed: bool


# Stacks of modules that are not of the experts interface: class, parameter, and whether it is transposed.
_OTHER_STACKS = {
    "DbrxExpertGLU": {"w1": False, "v1": False, "w2": True},
    "InklingSharedExperts": {"gate_proj": False, "up_proj": False, "down_proj": False},
    "JetMoeParallelExperts": {"weight": False},
    "Llama4TextExperts": {"gate_up_proj": True, "down_proj": True},
    "LongcatFlashExperts": {"gate_up_proj": False, "down_proj": False},
}
_COUNTS = {"DbrxExpertGLU": "moe_num_experts"}  # stored as one matrix: the attribute that tells how many it holds


def stacks_of(module: nn.Module) -> Iterator[Stack]:
    """Yield the stacks of experts among a module's own parameters."""
    kind = type(module).__name__
    transposed = _OTHER_STACKS.get(kind, {})
    for name, parameter in module.named_parameters(recurse=False):
        if name in transposed:
            yield Stack(name, getattr(module, _COUNTS[kind]) if kind in _COUNTS else len(parameter), transposed[name])
        elif is_of_interface(module) and parameter.ndim == 3:
            yield Stack(name, len(parameter), bool(module.is_transposed))


@contextmanager
def one_by_one(module: nn.Module) -> Iterator[None]:
    """Let experts multiply their own tokens one expert after the other, where the inputs of each can be seen."""
    configs: dict[int, Any] = {id(part.config): part.config for part in module.modules() if is_of_interface(part)}
    before = [(config, config._experts_implementation) for config in configs.values()]
    for config, _ in before:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation


def is_of_interface(module: nn.Module) -> bool:
    """Say whether the class was made by transformers' `use_experts_implementation`, which sets both of these."""
    return {"is_transposed", "has_gate"} <= vars(module).keys()
