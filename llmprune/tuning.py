"""Block tuning: what survives of a pruned block, fitted by gradient to what the dense block puts out.

The pruned block gets what the pruned model feeds it, and its target is the output of the dense model at that place, so
that a block also makes up for some of what the ones before it have lost. Compare regional optimisation in Wanda++ (Yang
et al., 2025, arXiv:2503.04992) and block-wise reconstruction (Zimmer et al., 2025, arXiv:2510.14444). The mask does
not change. Matrices in which nothing was pruned, and routers, stay as they are; biases and the gains of norms are tuned.

Adam moves every weight by about its step size. Steps are relative to the size of the weights and to the square root of
their inputs, which keeps the change of the outputs the same from small models to large ones. Sequences that no step
sees decide: where they do not gain, smaller steps are tried, and where these do not help either, nothing changes.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from llmprune.model import Lanes
from llmprune.model.function import BlockFunction, Weights
from llmprune.model.sites import Site, Stage, is_router
from llmprune.solving import seeded
from llmprune.structure import fields_of
from llmprune.team.team import Team

STEP_SEQUENCES = 4  # calibration sequences of one step of Adam
_HELD_OUT = 0.1  # share of the batches that no step sees
_BETAS = 0.9, 0.95
_ATTEMPTS = 3
_SLOWER = 4  # by which steps are smaller in the next attempt


@dataclass(frozen=True)
class BlockTuning:
    """What tuning a block came to.

    Attributes:
        block: its name.
        before, after: squared difference from the dense model's outputs relative to their square, on the sequences that
            were held out, with the weights from before and with the best ones seen.
        epochs: after which `after` was reached; 0 if nothing was better, and the old weights were kept.
        rate: step size at the start of that attempt.
        vectors: the gains and biases that have changed, for which the report has no other entry.
    """

    block: str
    before: float
    after: float
    epochs: int
    rate: float
    vectors: tuple[str, ...]

    @property
    def kept(self) -> bool:
        """Whether the block has its tuned weights."""
        return self.epochs > 0

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "BlockTuning":
        """Return what `to_json` and JSON have made plain."""
        return cls(**fields_of(cls, values) | {"vectors": tuple(values["vectors"])})

    def to_json(self) -> dict[str, Any]:
        """Return all as plain values."""
        return asdict(self) | {"kept": self.kept}


def sequences_at_once(most: int, sequences: int) -> int:
    """Return how many sequences go through a block at once, of at most `most`: a step's, and a tenth to hold out."""
    return max(1, min(most, STEP_SEQUENCES, int(_HELD_OUT * sequences)))


def tune(
    lanes: Lanes,
    index: int,
    sites: Sequence[Site],
    fixed: Collection[str],
    epochs: int,
    rate: float,
    seed: int,
    team: Team,
) -> BlockTuning:
    """Tune a pruned block in place, if that brings its outputs nearer to the dense ones on sequences held out.

    Args:
        lanes: they wait at the block; the second half, with the dense model's inputs, have been given its outputs.
        index: of the block.
        sites: the pruned ones of the block.
        fixed: full names of weights to leave as they are, such as those that other parts of the model share.
        epochs: passes over the calibration sequences.
        rate: step size of Adam at the start, as a share of the weights' root mean square over the square root of their
            inputs; it falls to zero linearly.
        seed: decides what is held out, and in which order the others come.
        team: the ranks, whose shares of the batches the lanes are. All take the same steps.

    Raises:
        UnsupportedModelError: the block's output cannot be differentiated.
    """
    stage = lanes.stage(index)
    inputs = _tunable(stage, sites, fixed)
    block = BlockFunction(lanes, index, inputs, team)
    batches = block.batches()
    if len(batches) < 2:
        return BlockTuning(stage.name, 0.0, 0.0, 0, rate, ())
    generator = seeded(seed, stage.name)
    order = [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
    count = max(1, round(_HELD_OUT * len(order)))
    held_out, seen = order[:count], order[count:]
    before = after = _error(block, held_out, block.own)
    for attempt in range(_ATTEMPTS if before else 0):
        rate_now = rate / _SLOWER**attempt
        best, kept = Weights(), 0
        for epoch, weights in enumerate(_descend(block, seen, epochs, rate_now, inputs, generator), start=1):
            error = _error(block, held_out, weights)
            if error < after:
                best, after, kept = weights, error, epoch
        if kept:
            return BlockTuning(stage.name, before, after, kept, rate_now, block.adopt(best))
    return BlockTuning(stage.name, before, before, 0, rate, ())


def _tunable(stage: Stage, sites: Sequence[Site], fixed: Collection[str]) -> dict[str, int]:
    """Return the names within a stage of what can be tuned, and how many inputs each has.

    These are the pruned matrices, the gains of norms and the biases, without those in `fixed`.
    """
    inputs = {site.tensor: site.shape[1] for site in sites}
    for name, parameter in stage.module.named_parameters(stage.name):
        if parameter.ndim == 1 and not is_router(f"{name.rpartition('.')[0]}.weight"):
            inputs[name] = len(parameter)
    return {name[len(stage.name) + 1 :]: count for name, count in inputs.items() if name not in fixed}


def _error(block: BlockFunction, batches: Sequence[int], weights: Weights) -> float:
    """Return the squared difference from the dense outputs relative to their square."""
    change, whole = block.change(batches, weights)
    return change / whole if whole else 0.0


def _descend(
    block: BlockFunction,
    batches: Sequence[int],
    epochs: int,
    rate: float,
    inputs: Mapping[str, int],
    generator: torch.Generator,
) -> Iterator[Weights]:
    """Go through the batches `epochs` times; yield after each what the weights are, in the dtypes of the block."""
    masters = {name: own.float().clone() for name, own in block.own.items()}
    groups = [
        {"params": [master], "lr": rate * _size(block.own[name]) / math.sqrt(inputs[name])}
        for name, master in masters.items()
    ]
    optimizer = torch.optim.Adam(groups, betas=_BETAS, foreach=False)
    width = max(1, STEP_SEQUENCES // block.sequences(batches[0]))
    steps = epochs * math.ceil(len(batches) / width)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    scale = _scale(block, batches[0])
    for _ in range(epochs):
        shuffled = torch.tensor(batches)[torch.randperm(len(batches), generator=generator)]
        for step in shuffled.split(width):
            _differentiate(block, masters, step.tolist(), scale)
            optimizer.step()
            decay.step()
        yield {name: _rounded(master, block.own[name]) for name, master in masters.items()}


def _differentiate(block: BlockFunction, masters: Weights, batches: Sequence[int], scale: float) -> None:
    """Set the gradient of each master, summed over the batches of a step; where a weight is pruned it is zero."""
    weights = {name: master.detach().to(block.own[name].dtype).requires_grad_() for name, master in masters.items()}
    for master in masters.values():
        master.grad = torch.zeros_like(master)
    for gradients in block.gradients(batches, weights, scale):
        for master, gradient in zip(masters.values(), gradients, strict=True):
            if master.grad is not None and gradient is not None:
                master.grad += gradient
    for name, own in block.own.items():
        summed = masters[name].grad
        if summed is not None and own.ndim > 1:
            summed.masked_fill_(own == 0, 0)


def _scale(block: BlockFunction, batch: int) -> float:
    """Return what brings gradients to a size that half precision holds; Adam's steps do not depend on it."""
    error, _ = block.change([batch], block.own)
    return 1 / math.sqrt(error) if error else 1.0


def _rounded(master: Tensor, own: Tensor) -> Tensor:
    """Return a master in the dtype of the block's own weight, with zeros where that has zeros and nowhere else."""
    rounded = master.to(own.dtype, copy=True)
    return rounded if own.ndim == 1 else torch.where(rounded == 0, own, rounded)


def _size(weight: Tensor) -> float:
    """Return the root mean square of the weights that are not zero."""
    return math.sqrt(float(weight.float().square().sum()) / max(int(weight.count_nonzero()), 1))
