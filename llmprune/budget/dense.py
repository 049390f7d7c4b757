"""One pass of the dense model over some of the calibration, from which the sites' parts of a budget follow.

Block by block, each in memory alone: the Gram matrix of every group is collected, and the cost of sparsity measured.

* `error`: the squared change of a site's outputs over its squared outputs.
* `fisher`: the expected increase of the loss in nats a token, ½ Σ_o F_o E[(Δy_o)²] with F_o = E[(dL/dy_o)²] for labels
  that the model samples itself: second order in a site's outputs, with the Hessian taken to be the diagonal of the
  Fisher matrix, and errors to be independent of gradients (compare Optimal Brain Damage; LeCun et al., NIPS 1989).
  The gradients take one more pass, backward.
* `owl`: the outliers of each block; nothing is solved.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llmprune.allocation import Cost, Curve, bounds, wish
from llmprune.budget.curves import Loss, Solver, losses
from llmprune.budget.outliers import block_shares, outlier_share
from llmprune.calibration import Tokens
from llmprune.model import Lanes
from llmprune.model.collect import Collector
from llmprune.model.gradients import Tape
from llmprune.model.groups import Group
from llmprune.model.memory import home_device, most_kept, parameter_bytes, statistics_budget
from llmprune.model.sharing import SharedCollector
from llmprune.model.sites import Site, Stage
from llmprune.planning import Host
from llmprune.progress import Progress
from llmprune.recipe import Recipe
from llmprune.statistics import Gram
from llmprune.team.team import Team, deal

MOST_SEQUENCES = 8  # of the calibration; curves and gradients do not need more
POINTS = 2  # of a curve: the ends of the range
_TINY = 1e-30


@dataclass(frozen=True)
class DensePass:
    """The pass, and what follows from it.

    Args:
        tokens: the calibration, of which the first sequences are used.
        home: device of the model's glue.
        sites: those to be measured, by the names of their blocks.
        solver: see `losses`.
        team: the ranks, which share the sequences, and the groups to be solved.
    """

    host: Host
    recipe: Recipe
    tokens: Tokens
    home: torch.device
    sites: Mapping[str, Sequence[Site]]
    solver: Solver
    sparsity: float
    team: Team

    @cached_property
    def rows(self) -> list[Tensor]:
        """The sequences that are run; for gradients no more than may have their hidden states kept."""
        rows = self.tokens.rows[:MOST_SEQUENCES]
        if self.recipe.allocation != "fisher":
            return rows
        kept = most_kept(rows, len(self.host.blocks), self.host.config, self.host.dtype)
        return rows[: self.team.tell(kept)]

    @property
    def shares(self) -> tuple[float, ...]:
        """The points of the curves."""
        low, high = bounds(self.sparsity, self.recipe.allocation_range)
        return tuple(low + (high - low) * point / (POINTS - 1) for point in range(POINTS))

    def costs(self) -> dict[str, Cost]:
        """Return the cost of every site that inputs have reached, by its name.

        Raises:
            UnsupportedModelError: gradients cannot be followed through the model.
            NumericalError: an input, a gradient or a solution is not finite.
        """
        rows, seed = self.team.share(self.rows), self.recipe.seed
        stops = [*self.host.blocks, self.host.head]
        with Lanes(self.host.model, stops, [row[None] for row in rows], self.home, self.host.device_of) as lanes:
            if self.recipe.allocation == "owl":
                return self._owl(lanes)
            if self.recipe.allocation == "error":
                found = self._forward(lanes, None)
                return {
                    name: self._curve(loss.error_PO.sum(1) / max(loss.energy, _TINY)) for name, loss in found.items()
                }
            shelf = home_device(self.host.place, rows * len(self.host.blocks), self.host.config, self.host.dtype)
            tape = Tape(lanes, of_weights=False, labels="sampled", seed=seed, shelf=shelf, team=self.team)
            return self._fisher(tape, self._forward(lanes, tape), sum(map(len, self.rows)))

    def _forward(self, lanes: Lanes, tape: Tape | None) -> dict[str, Loss]:
        found, load = dict[str, Loss](), [0.0] * self.team.size

        def takes(group: Group) -> bool:
            return deal([_cost(group)], load) == [self.team.rank]

        for _, groups in self._blocks(lanes, tape):
            found |= losses(groups, self.host.weight, self.solver, self.shares, self.recipe.seed, takes)
        return {name: loss for part in self.team.gather(found) for name, loss in part.items()}

    def _owl(self, lanes: Lanes) -> dict[str, Cost]:
        sizes = {name: sum(site.shape[0] * site.shape[1] for site in sites) for name, sites in self.sites.items()}
        outliers = {
            stage.name: outlier_share(groups, self.host.weight)
            for stage, groups in self._blocks(lanes, None)
            if stage.name in self.sites
        }
        shares = block_shares(outliers, sizes, self.sparsity, self.recipe.allocation_range)
        return {
            site.name: wish(share, site.shape[0] * site.shape[1])
            for name, share in shares.items()
            for site in self.sites[name]
        }

    def _fisher(self, tape: Tape, found: dict[str, Loss], tokens: int) -> dict[str, Cost]:
        costs = dict[str, Cost]()
        for _, gradients in tape.backward(self.host, len(self.host.blocks) - 1, self.sites):
            for site, gradient in gradients.items():
                if site.name in found and gradient.tokens:
                    square_O = gradient.square_O.cpu() / gradient.tokens
                    costs[site.name] = self._curve(found[site.name].error_PO @ square_O / (2 * tokens))
        return costs

    def _blocks(self, lanes: Lanes, tape: Tape | None) -> Iterator[tuple[Stage, Generator[Group, None, None]]]:
        """Yield every block, loaded, with its groups, and let the lanes go on to the next."""
        blocks = self.host.blocks
        largest = max(parameter_bytes(block.module) for block in blocks)
        budget = self.team.tell(statistics_budget(largest, self.host.place))
        alone = self.team.size == 1
        collector = Collector(lanes, Gram, budget) if alone else SharedCollector(lanes, Gram, budget, team=self.team)
        with Progress(len(blocks), "measuring", "block") as bar:
            for index, stage in enumerate(blocks):
                self.host.load(stage)
                try:
                    with closing(collector.groups(index, self.sites.get(stage.name, ()))) as groups:
                        yield stage, groups
                    if index + 1 < len(blocks):
                        (tape.forward if tape else lanes.advance)(index)
                finally:
                    self.host.free(stage)
                bar.step()

    def _curve(self, cost_P: Tensor) -> Curve:
        return Curve(self.shares, tuple(cost_P.tolist()))


def _cost(group: Group) -> float:
    """Return the operations that solving a group takes, up to a factor."""
    return float(group.inputs**2 * (group.inputs + POINTS * sum(site.shape[0] for site in group.sites)))
