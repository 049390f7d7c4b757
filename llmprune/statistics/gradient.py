"""Squared gradients of a matrix and of its outputs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmprune.errors import NumericalError


class Gradient:
    """What a backward pass of the dense model tells of a matrix W, of y = W x, over sequences of tokens.

    Attributes:
        square_O: sum over tokens of (dL/dy)², one for each output.
        square_OI: sum over sequences of (dL/dW)², each of them the gradient of that sequence's loss; None unless asked
            for, as it is as large as W.
        sequences, tokens: how many were seen; of an expert, those that were routed to it.
        open, open_tokens: of the sequence that is not closed yet: its part of `square_O`, its dL/dW, and its tokens.
    """

    def __init__(self, outputs: int, inputs: int, device: torch.device, of_weights: bool = True) -> None:
        self.inputs = inputs
        self.square_O = torch.zeros(outputs, dtype=torch.float32, device=device)
        self.square_OI = torch.zeros(outputs, inputs, dtype=torch.float32, device=device) if of_weights else None
        self.open = [torch.zeros_like(total) for total in (self.square_O, self.square_OI) if total is not None]
        self.sequences = self.tokens = self.open_tokens = 0

    @classmethod
    def from_gradient(cls, gradient_OI: Tensor) -> "Gradient":
        """Return the statistic of weights whose gradient over one sequence is known."""
        outputs, inputs = gradient_OI.shape
        statistic = cls(outputs, inputs, gradient_OI.device)
        statistic.square_OI = gradient_OI.float().square()
        statistic.sequences = statistic.tokens = 1
        return statistic

    @property
    def device(self) -> torch.device:
        return self.square_O.device

    def add(self, x_TI: Tensor, g_TO: Tensor) -> None:
        """Add inputs and the gradients of the outputs for tokens of one sequence."""
        g_TO = g_TO.float()
        square_O, *gradients = self.open
        square_O += g_TO.square().sum(0)
        self.open_tokens += len(g_TO)
        for gradient_OI in gradients:
            gradient_OI.addmm_(g_TO.T, x_TI.float())

    def close_sequence(self) -> None:
        """Say that all of a sequence has been added."""
        self.add_sequence(self.open, self.open_tokens)
        for part in self.open:
            part.zero_()
        self.open_tokens = 0

    def add_sequence(self, parts: Sequence[Tensor], tokens: int) -> None:
        """Add a whole sequence of so many tokens, by what was `open` of it where its tokens were added."""
        square_O, *gradients = parts
        self.square_O += square_O
        self.tokens += tokens
        self.sequences += 1
        for gradient_OI in gradients:
            assert self.square_OI is not None
            self.square_OI.addcmul_(gradient_OI, gradient_OI)

    def energy(self, weight_OI: Tensor) -> float:
        """Return Σ (w · dL/dW)² over the weights and sequences: what a change of the weights does to first order."""
        assert self.square_OI is not None
        return float((weight_OI.float().square() * self.square_OI).sum())

    def move(self, device: torch.device) -> None:
        """Go on on another device."""
        self.square_O = self.square_O.to(device)
        if self.square_OI is not None:
            self.square_OI = self.square_OI.to(device)
        self.open = [part.to(device) for part in self.open]

    def require_finite(self, name: str) -> None:
        """Raise NumericalError, naming the site, unless all sums are finite."""
        sums = [self.square_O] if self.square_OI is None else [self.square_O, self.square_OI]
        if not all(bool(torch.isfinite(part).all()) for part in sums):
            raise NumericalError(f"{name}: its gradients hold NaN or infinity; run with --dtype bfloat16 or float32")
