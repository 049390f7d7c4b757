"""One backward pass of the dense model, block by block, so that the model is never whole in memory.

On the way forward the hidden states before every block are kept. Then the tail (the last norm, the head, the loss) is
run with gradients, and the blocks are visited in reverse: load, run again from the kept input, go backward, free.

Gradients follow the hidden states from block to block, and everything inside a block. All else that a block is handed
is taken as constant: masks, rotary tables, keys and values shared from an earlier block, inputs made for each block
from the token ids, and the choice of experts. The paths through these are left out of the gradients, exactly so where
blocks share keys and values. A model that changes the hidden states between its blocks is refused by name.

Shape suffixes: L length, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from llmprune.errors import UnsupportedModelError
from llmprune.model.lanes import Arrival, Lanes
from llmprune.model.observe import observing
from llmprune.model.sites import Site, Stage
from llmprune.model.turns import close_turn
from llmprune.statistics import Gradient
from llmprune.team.team import Team

Labels = Literal["sampled", "text"]
Found = dict[Site, Gradient]


class Loads(Protocol):
    """The part of a model that brings its stages into memory."""

    def load(self, stage: Stage) -> None: ...
    def free(self, stage: Stage) -> None: ...


@dataclass
class _Visit:
    """What a lane gave a stage, and which of it (`place`) is which output of the stage before (`source`)."""

    stage: int
    given: list[Any]
    spec: TreeSpec
    links: list[tuple[int, int]]  # source, place


class Tape:
    """Remembers a forward of lanes, one sequence each, for one backward.

    Args:
        lanes: the last of their stages is the head.
        of_weights: whether gradients of the weights are wanted, beside those of the outputs.
        labels: `sampled` from the model's own predictions (the gradients of the true Fisher matrix), or the `text`.
        seed: of the sampling.
        shelf: device on which the hidden states of all blocks are kept; None is where the lanes' glue runs.
        most: how many of the sequences are followed, the first ones; None is all.
        team: the ranks, whose shares of the sequences the lanes are. All have the same gradients in the end.
    """

    def __init__(
        self,
        lanes: Lanes,
        of_weights: bool,
        labels: Labels,
        seed: int = 0,
        shelf: torch.device | None = None,
        most: int | None = None,
        team: Team | None = None,
    ) -> None:
        self._lanes, self._of_weights, self._labels, self._seed = lanes, of_weights, labels, seed
        self._shelf, self._team = shelf or lanes.home, team or Team()
        self._sequences = sum(self._team.gather(len(lanes)))
        followed = [lane for lane in range(len(lanes)) if most is None or self._team.number(lane) < most]
        self._turns = max(self._team.gather(len(followed)))
        self._visits = [[self._first_visit(lane)] for lane in followed]
        self._gradients: list[list[tuple[int, Tensor]]] = [[] for _ in self._visits]  # of the last visit's outputs

    def forward(self, index: int) -> None:
        """Run a loaded block for all lanes and let them go on.

        Raises:
            UnsupportedModelError: what a block puts out is not what the next one is given.
        """
        for lane in self._lanes.waiting_at(index):
            if lane >= len(self._visits):
                self._lanes.step(index, lane)
                continue
            output = self._lanes.output(index, lane)
            versions = [value._version for value in tree_leaves(output) if isinstance(value, Tensor)]
            self._lanes.provide({lane: output})
            sent = self._lanes.step(index, lane)
            if versions != [value._version for value in tree_leaves(output) if isinstance(value, Tensor)]:
                raise self._refusal(index)
            self._visits[lane].append(self._next_visit(index, lane, tree_leaves(sent)))

    def backward(self, host: Loads, last: int, sites: Mapping[str, Sequence[Site]]) -> Iterator[tuple[Stage, Found]]:
        """Yield the stages in reverse, loaded and still dense, with the gradients of their sites, the head's first.

        Args:
            host: loads and frees them; the head is loaded and freed too.
            last: the number of the last block, before which the lanes wait.
            sites: by the stages' names; stages without any are gone through, and yielded nonetheless.

        Raises:
            NumericalError: a gradient holds NaN or infinity.
        """
        head, block = self._lanes.stage(last + 1), self._lanes.stage(last)
        host.load(block)
        with _loaded(host, head):
            found = self._found(head, sites)
            waiting = {lane for lane in self._lanes.waiting_at(last) if lane < len(self._visits)}
            for lane in range(self._turns):
                if lane in waiting:
                    self._tail(last, lane, head, found)
                close_turn(self._team, found.values(), lane in waiting)
            yield head, _checked(found)
        for index in reversed(range(last + 1)):
            stage = self._lanes.stage(index)
            with _loaded(host, stage):
                found = self._found(stage, sites)
                for lane in range(self._turns):
                    visited = self._has_visited(lane, index)
                    if visited:
                        self._back(lane, self._visits[lane].pop(), stage, found)
                    close_turn(self._team, found.values(), visited)
                yield stage, _checked(found)

    def _first_visit(self, lane: int) -> _Visit:
        arrival = self._arrival(lane)
        given, spec = tree_flatten((arrival.args, arrival.kwargs))
        hidden = [place for place, value in enumerate(given) if _carries(value)][:1]
        return self._visit(arrival.stage, given, spec, [(-1, place) for place in hidden])

    def _next_visit(self, index: int, lane: int, output: list[Any]) -> _Visit:
        arrival = self._arrival(lane)
        given, spec = tree_flatten((arrival.args, arrival.kwargs))
        sources = {id(value): source for source, value in enumerate(output) if _carries(value)}
        links = [(sources[id(value)], place) for place, value in enumerate(given) if id(value) in sources]
        if not links:
            raise self._refusal(index)
        return self._visit(arrival.stage, given, spec, links)

    def _visit(self, stage: int, given: list[Any], spec: TreeSpec, links: list[tuple[int, int]]) -> _Visit:
        for _, place in links:
            kept = given[place].detach().to(self._shelf, copy=True)  # some models go on to change it in place
            given[place] = kept
        return _Visit(stage, given, spec, links)

    def _arrival(self, lane: int) -> Arrival:
        arrival = self._lanes.arrival(lane)
        assert arrival is not None
        return arrival

    def _refusal(self, index: int) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"gradients cannot be followed past {self._lanes.stage(index).name}: the model changes its output before the "
            "next block; use --allocation error, or a method that needs no gradients"
        )

    def _has_visited(self, lane: int, stage: int) -> bool:
        """Say whether the backward pass of a lane comes to this stage next; the model's forward may have led it past."""
        visits = self._visits[lane] if lane < len(self._visits) else []
        return bool(visits) and visits[-1].stage == stage

    def _found(self, stage: Stage, sites: Mapping[str, Sequence[Site]]) -> Found:
        return {
            site: Gradient(*site.shape, self._lanes.device_of(stage), self._of_weights)
            for site in sites.get(stage.name, ())
        }

    def _tail(self, last: int, lane: int, head: Stage, found: Found) -> None:
        """Run the last block without gradients, then what follows it with them, back to the block's output."""
        values, spec = tree_flatten(self._lanes.output(last, lane))
        leaves = {place: value.detach().requires_grad_() for place, value in enumerate(values) if _carries(value)}
        with torch.enable_grad():
            values = [leaves[place].clone() if place in leaves else value for place, value in enumerate(values)]
            output = tree_unflatten(values, spec)
            self._lanes.provide({lane: output})
            self._lanes.step(last, lane)
            if self._lanes.arrival(lane) is not None:  # it has come to the head, as most do
                with observing(head, list(found), _ignore, _adding(found)):
                    self._lanes.step(last + 1, lane)
            logits_1LV = self._lanes.outputs().pop().logits
        gradient_1LV = self._loss_gradient(lane, logits_1LV)
        self._gradients[lane] = _back_to(leaves, [(logits_1LV, gradient_1LV)])

    def _loss_gradient(self, lane: int, logits_1LV: Tensor) -> Tensor:
        """Return d loss / d logits of the cross-entropy summed over the sequence: the predictions less the labels."""
        with torch.no_grad():
            gradient_LV = logits_1LV[0].float().softmax(-1)
            if self._labels == "sampled":
                seed = self._seed * self._sequences + self._team.number(lane)
                generator = torch.Generator(gradient_LV.device).manual_seed(seed)
                label_L1 = _drawn(gradient_LV, generator)
            else:
                gradient_LV[-1] = 0  # nothing follows the last token
                label_L1 = self._lanes.batch(lane)[0, 1:, None].to(gradient_LV.device)
            rows = gradient_LV[: len(label_L1)]
            rows.scatter_add_(1, label_L1, -torch.ones_like(rows[:, :1]))
            return gradient_LV[None].to(logits_1LV.dtype)

    def _back(self, lane: int, visit: _Visit, stage: Stage, found: Found) -> None:
        given = list(visit.given)
        leaves = {source: given[place].to(self._lanes.home).requires_grad_() for source, place in visit.links}
        with torch.enable_grad(), observing(stage, list(found), _ignore, _adding(found)):
            for source, place in visit.links:
                given[place] = leaves[source].clone()  # no leaf, so that a block may change it in place
            args, kwargs = tree_unflatten(given, visit.spec)
            output = tree_leaves(self._lanes.replay(Arrival(visit.stage, args, kwargs)))
        reached = [(output[place], gradient) for place, gradient in self._gradients[lane]]
        self._gradients[lane] = _back_to(leaves, reached)


def _drawn(share_LV: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a label [L, 1] for each row of probabilities; on a CPU by cumulative sums: one random number a row."""
    if share_LV.is_cuda:  # where cumulative sums do not repeat to the bit
        return torch.multinomial(share_LV, 1, generator=generator)
    upto_LV = share_LV.cumsum(-1)
    random_L1 = torch.rand(len(share_LV), 1, generator=generator, device=share_LV.device, dtype=share_LV.dtype)
    return torch.searchsorted(upto_LV, random_L1 * upto_LV[:, -1:], right=True).clamp_(max=share_LV.shape[1] - 1)


def _back_to(leaves: dict[int, Tensor], reached: list[tuple[Tensor, Tensor]]) -> list[tuple[int, Tensor]]:
    """Go backward from outputs whose gradients are known, and return those of the leaves that they depend on."""
    outputs = [output for output, _ in reached if output.requires_grad]
    known = [gradient.to(output.device) for output, gradient in reached if output.requires_grad]
    found = torch.autograd.grad(outputs, list(leaves.values()), known, allow_unused=True)
    return [(place, gradient) for place, gradient in zip(leaves, found, strict=True) if gradient is not None]


def _adding(found: Found) -> Any:
    def see_gradient(site: Site, x: Tensor, g: Tensor) -> None:
        found[site].add(x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]))

    return see_gradient


def _checked(found: Found) -> Found:
    for site, gradient in found.items():
        gradient.require_finite(site.name)
    return found


def _ignore(site: Site, x: Tensor) -> None:
    """Inputs come again with their gradients."""


def _carries(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2


@contextmanager
def _loaded(host: Loads, stage: Stage) -> Iterator[None]:
    host.load(stage)
    try:
        yield
    finally:
        host.free(stage)
