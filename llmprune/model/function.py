"""The block that lanes wait at, as a function of some of its weights: its outputs, their error, and its gradients.

Batches are numbered over all ranks of a team. Each is run by the rank that has it as its share, and what comes of it is
put together on all ranks in the order in which one process runs the batches, so that every rank has the same to the bit.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from llmprune.errors import UnsupportedModelError
from llmprune.model.lanes import Lanes
from llmprune.team.team import Team

Weights = dict[str, Tensor]  # by their names in the block
Gradients = Iterable[Tensor | None]  # of weights, in their order; None goes to experts without tokens


class BlockFunction:
    """The block at which lanes wait, as a function of some of its weights.

    Args:
        lanes: this rank's share of the batches; the second half, with the dense model's inputs, have been given its
            outputs, which the block's are to come close to.
        index: of the block.
        names: of its weights that change, within the block.
        team: the ranks.
    """

    def __init__(self, lanes: Lanes, index: int, names: Iterable[str], team: Team) -> None:
        self._lanes, self._index, self._team, self._stage = lanes, index, team, lanes.stage(index)
        self.own: Weights = {name: self._stage.module.get_parameter(name).data for name in names}

    def batches(self) -> list[int]:
        """Return the batches that wait at the block; the model's own forward may lead some past it."""
        waiting = [lane for lane in self._lanes.waiting_at(self._index) if lane < self._halfway]
        return sorted(chain(*self._team.gather([self._team.number(lane) for lane in waiting])))

    def sequences(self, batch: int) -> int:
        """Return the number of sequences in a batch."""
        return self._team.each([batch], self._lanes.sequences)[0]

    def change(self, batches: Sequence[int], weights: Weights) -> tuple[float, float]:
        """Return the squared difference from the dense model's outputs with these weights, and their square."""

        def of_lane(lane: int) -> tuple[float, float]:
            output, target = self._outputs(lane, weights)
            return float((output - target).square().sum()), float(target.square().sum())

        change = whole = 0.0
        for part, square in self._team.each(batches, of_lane):
            change, whole = change + part, whole + square
        return change, whole

    def gradients(self, batches: Sequence[int], weights: Weights, scale: float) -> Iterator[Gradients]:
        """Yield the gradients of `scale` times the squared difference, of one batch after another.

        A rank of several holds those of its own batches at once, so that no rank waits for another meanwhile.

        Raises:
            UnsupportedModelError: the block's output cannot be differentiated.
        """
        if self._team.size == 1:
            yield from (self._gradients(batch, weights, scale) for batch in batches)
            return
        found = {
            batch: self._gradients(lane, weights, scale)
            for batch in batches
            if (lane := self._team.place(batch)) is not None
        }
        given = self._team.each(batches, lambda lane: [one is not None for one in found[self._team.number(lane)]])
        for batch, there in zip(batches, given, strict=True):
            yield self._handed(self._team.owner(batch), found.pop(batch, None), there, weights)

    def adopt(self, weights: Weights) -> tuple[str, ...]:
        """Give the block these weights; return the full names of the vectors among them that have changed."""
        changed = [name for name, own in self.own.items() if own.ndim == 1 and not own.equal(weights[name])]
        for name, own in self.own.items():
            own.copy_(weights[name])
        self._lanes.retract(range(self._halfway))  # what they were given are outputs of the old weights
        return tuple(f"{self._stage.name}.{name}" for name in changed)

    @property
    def _halfway(self) -> int:
        return len(self._lanes) // 2

    def _outputs(self, lane: int, weights: Weights) -> tuple[Tensor, Tensor]:
        """Return what the block with these weights puts out for a lane, and what the dense model does."""
        output = _hidden(self._lanes.run(self._index, lane, weights))
        target = _hidden(self._lanes.provided(lane + self._halfway))
        return output.float(), target.float()

    def _gradients(self, lane: int, weights: Weights, scale: float) -> Sequence[Tensor | None]:
        with torch.enable_grad():
            output, target = self._outputs(lane, weights)
            if not output.requires_grad:
                raise UnsupportedModelError(f"{self._stage.name} cannot be differentiated: leave out tune_epochs")
            loss = scale * (output - target).square().sum()
        return torch.autograd.grad(loss, list(weights.values()), allow_unused=True)

    def _handed(
        self, owner: int, found: Gradients | None, there: Sequence[bool], weights: Weights
    ) -> Iterator[Tensor | None]:
        """Yield the gradients that a rank has found, one after another, where they are `there`."""
        room = (
            torch.empty_like(weight) if here else None for weight, here in zip(weights.values(), there, strict=True)
        )
        for gradient in found or room:
            if gradient is not None:
                self._team.hand(gradient, owner)
            yield gradient


def _hidden(output: Any) -> Tensor:
    """Return the hidden states among what a block puts out: the first tensor."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output
