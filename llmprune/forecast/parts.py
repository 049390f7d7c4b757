"""One named part of a forecast, and the calibration work that forecasts are made from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from llmprune.batching import sequences_a_forward
from llmprune.calibration import DEFAULT_SAMPLES
from llmprune.model import Outline
from llmprune.model.memory import fits_side_by_side, home_device
from llmprune.planning import context_length, multiplied_in, window_length
from llmprune.recipe import Recipe
from llmprune.tuning import STEP_SEQUENCES


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

    Attributes:
        sequences: of the calibration.
        length: of each, in tokens.
        batch: sequences that go through a block at once.
        home: device on which hidden states wait between blocks.
        ranks: processes that share the work.
        dense_stream: the same sequences go through the dense model too.
        side_by_side: all of them are held within a block while its matrices are pruned, but for blocks with experts.
        dtype: that is multiplied in.
    """

    sequences: int
    length: int
    batch: int
    home: torch.device
    ranks: int = 1
    dense_stream: bool = False
    side_by_side: bool = False
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, recipe: Recipe, host: Outline, ranks: int = 1) -> "Workload":
        """Return the workload of a recipe, whose calibration data need not be there.

        Raises:
            DataError: the sequences are to be longer than the model's context.
        """
        length = window_length(recipe.length, context_length(host.config))
        sequences = recipe.samples or DEFAULT_SAMPLES
        batch = min(sequences_a_forward(host, recipe, length, sequences), sequences)
        lanes = math.ceil(sequences / batch / ranks) * (2 if recipe.dense_stream else 1)
        rows = [torch.empty(length, device="meta")] * (lanes * batch)
        home = home_device(host.device, rows, host.config, host.dtype)
        workload = cls(
            sequences, length, batch, home, ranks, recipe.dense_stream, dtype=multiplied_in(host, recipe) or host.dtype
        )
        held = recipe.true_sequential and (bool(recipe.dense_target) or workload.fits_side_by_side(host))
        return replace(workload, side_by_side=held)

    def fits_side_by_side(self, host: Outline) -> bool:
        """Say whether a run on this machine would hold all lanes within a block: a dense target asks for that."""
        return fits_side_by_side(self.lanes * self.tokens_at_once, host.config, host.dtype, host.device)

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
    def lanes(self) -> int:
        """Batches that a rank leads from block to block: those of the dense model beside those of the pruned one."""
        return self.batches * (2 if self.dense_stream else 1)

    @property
    def step(self) -> tuple[int, int]:
        """Batches of a step of tuning, and the most of them that one rank runs: they are drawn at random."""
        batches = min(max(1, STEP_SEQUENCES // self.batch), math.ceil(self.sequences / self.batch))
        return batches, min(batches, self.batches)

    @property
    def waited_for(self) -> float:
        """Batches of a step of tuning that the rank which has the most of them runs, on average."""
        batches, _ = self.step
        every = range(math.ceil(self.sequences / self.batch))
        return most_drawn([len(every[rank :: self.ranks]) for rank in range(self.ranks)], batches)

    @property
    def share(self) -> float:
        """A rank's share of the sequences."""
        return min(1.0, self.batches * self.batch / self.sequences)


def most_drawn(shares: Sequence[int], count: int) -> float:
    """Return how many of `count` things that are drawn at random come from the share that has the most of them, on average."""
    ways = math.comb(sum(shares), count)
    return sum(1 - _ways(shares, count, most) / ways for most in range(count))


def _ways(shares: Sequence[int], count: int, most: int) -> int:
    """Return in how many ways so many can be drawn with no more than `most` from any share."""
    ways = [1] + [0] * count  # of drawing so many from the shares up to here
    for share in shares:
        ways = [
            sum(ways[drawn - here] * math.comb(share, here) for here in range(min(most, drawn) + 1))
            for drawn in range(count + 1)
        ]
    return ways[count]
