"""A part of a sum that is foretold, and the work that calibration is."""

import math
from dataclasses import dataclass

import torch

from llmprune.calibration import DEFAULT_SAMPLES
from llmprune.model import Outline
from llmprune.model.memory import batch_size, home_device
from llmprune.planning import context_length, window_length
from llmprune.recipe import Recipe
from llmprune.tuning import sequences_at_once


@dataclass(frozen=True)
class Part:
    """One part of a sum: bytes or seconds, and where the number comes from; `on` is `host` or `device` (a GPU)."""

    name: str
    amount: float
    origin: str
    on: str = "host"


@dataclass(frozen=True)
class Workload:
    """The calibration sequences of a run, how many of them go through a block at once, and where they wait.

    With several ranks all but `sequences` and `tokens` is of the rank that has the most to do.
    """

    sequences: int
    length: int
    batch: int
    home: torch.device
    ranks: int = 1

    @classmethod
    def of(cls, recipe: Recipe, host: Outline, ranks: int = 1) -> "Workload":
        """Return the workload of a recipe, whose calibration data need not be there.

        Raises:
            DataError: the sequences are to be longer than the model's context.
        """
        length = window_length(recipe.length, context_length(host.config))
        sequences = recipe.samples or DEFAULT_SAMPLES
        most = batch_size(length, host.config, host.dtype, host.place)
        batch = recipe.batch_size or (sequences_at_once(most, sequences) if recipe.tune_epochs else most)
        batch = min(batch, sequences)
        rows = [torch.empty(length, device="meta")] * (math.ceil(sequences / batch / ranks) * batch)
        home = home_device(host.place, rows, host.config, host.dtype)
        return cls(sequences, length, batch, home, ranks)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return self.sequences * self.length

    @property
    def tokens_at_once(self) -> int:
        """Tokens that go through a block at once."""
        return self.batch * self.length

    @property
    def batches(self) -> int:
        """Forwards of a rank that it takes to lead its share of the sequences through a block."""
        return math.ceil(self.sequences / self.batch / self.ranks)

    @property
    def share(self) -> float:
        """A rank's share of the sequences."""
        return min(1.0, self.batches * self.batch / self.sequences)
