"""What every sum over calibration inputs can do."""

from typing import Protocol, TypeVar

import torch
from torch import Tensor

from llmprune.errors import NumericalError

S = TypeVar("S", bound="Statistic")


class Statistic(Protocol):
    """A sum over calibration tokens that can be fed batch by batch."""

    sequences: int
    tokens: int

    def __init__(self, inputs: int, device: torch.device) -> None: ...

    @property
    def inputs(self) -> int:
        """Number of inputs of the matrices that it describes."""

    @property
    def device(self) -> torch.device:
        """Where it is, and where matrices are solved with it."""

    def add(self, x_TI: Tensor, sequences: int) -> None:
        """Add the inputs of `sequences` calibration sequences, flattened to [tokens, inputs]."""

    def merge(self: S, other: S) -> None:
        """Add what another statistic has summed."""

    def shrink(self: S, other: S, share: float) -> None:
        """Move the mean per token by `share` (0 to 1) of the way to that of `other`; `tokens` stays."""

    @staticmethod
    def nbytes(inputs: int) -> int:
        """Return the bytes that the statistic of that many inputs takes."""

    def energy(self, weight_OI: Tensor) -> float:
        """Return the summed square of the outputs of `weight_OI` on these inputs, per sequence."""

    def move(self, device: torch.device) -> None:
        """Go on on another device; what can be computed again is let go of."""

    def require_finite(self, name: str) -> None:
        """Raise NumericalError, naming the site, unless all sums are finite."""


def require_finite(sums: Tensor, name: str) -> None:
    """Raise NumericalError, naming the site, unless all sums of its inputs are finite."""
    if not bool(torch.isfinite(sums).all()):
        raise NumericalError(
            f"{name}: its calibration inputs hold NaN or infinity; where float16 overflows run with --dtype bfloat16 "
            "or float32, else check the checkpoint"
        )
