"""One pass through the dense model with a few calibration sequences, which measures what sparsity costs in each site.

Block by block, each in memory alone: the Gram matrix of every group is collected, and the cost of sparsity measured.

* `error`: the squared change of a site's outputs over its squared outputs.
* `fisher`: the expected increase of the loss in nats a token, ½ Σ_o F_o E[(Δy_o)²] with F_o = E[(dL/dy_o)²] for labels
  that the model samples itself: second order in a site's outputs, with the Hessian taken to be the diagonal of the
  Fisher matrix, and errors to be independent of gradients (compare Optimal Brain Damage; LeCun et al., NIPS 1989).
  The gradients take one more pass, backward. They also tell what an error in each row of a matrix costs; trials are
  solved with rows alike, as they come before.
* `owl`: the outliers of each block; nothing is solved.

Several sparsities share the pass: each is measured as it would be alone, from the same statistics and gradients.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llmprune.allocation import Cost, Curve, bounds, wish
from llmprune.budget.curves import SAMPLED_ROWS, Loss, Trials, losses, sampled
from llmprune.budget.outliers import block_shares, outlier_share
from llmprune.calibration import Tokens
from llmprune.methods import Method
from llmprune.model import Lanes
from llmprune.model.collect import Collector
from llmprune.model.gradients import Tape
from llmprune.model.groups import Group
from llmprune.model.memory import home_device, most_kept, parameter_bytes, statistics_budget
from llmprune.model.sites import Site, Stage
from llmprune.patterns import Count, as_row_levels
from llmprune.planning import Host
from llmprune.progress import Progress
from llmprune.recipe import Recipe
from llmprune.statistics import Gram
from llmprune.team.team import Team, deal

MOST_SEQUENCES = 8  # of the calibration; curves do not need more
MOST_FOLLOWED = 4  # of these, backward
POINTS = 2  # of a curve: the ends of the range
_ROW_POWER = 0.25  # of F_o, by which rows are scaled; a half would be right if gradients told F_o exactly
_ROW_TOKENS = 16  # of an expert, at which half of that is taken
_MOST_OCTAVES = 12  # of F_o, up or down
_TINY = 1e-30
_SEEDS = 1 << 60  # torch takes 64 bits, of which some number the sequences; a user's may be any whole number

Solver = Callable[[Recipe, Site], tuple[Method, Callable[[int, int], Count]]]


@dataclass(frozen=True)
class DensePass:
    """The pass, and what follows from it.

    Args:
        recipes: each with a sparsity to be shared out, all in one way and with one seed.
        tokens: the calibration, of which the first sequences are used.
        home: device of what lies between the blocks (embedding, masks), where hidden states wait.
        sites: those to be measured, by the names of their blocks.
        autocast: the dtype that the forward multiplies in, if not that of the weights.
        solver: of a recipe; see `Trials`.
        team: the ranks, which share the sequences, and the groups to be solved.
    """

    host: Host
    recipes: Sequence[Recipe]
    tokens: Tokens
    home: torch.device
    sites: Mapping[str, Sequence[Site]]
    solver: Solver
    autocast: torch.dtype | None
    team: Team

    @property
    def rows(self) -> list[Tensor]:
        """The sequences that are run."""
        return self.tokens.rows[:MOST_SEQUENCES]

    @property
    def seed(self) -> int:
        """The seed of all recipes."""
        return self.recipes[0].seed % _SEEDS

    def costs(self) -> list[dict[str, Cost]]:
        """Return, for each recipe, the cost of every site that inputs have reached, by its name.

        Raises:
            UnsupportedModelError: gradients cannot be followed through the model.
            NumericalError: an input, a gradient or a solution is not finite.
        """
        stops = [*self.host.blocks, self.host.head]
        batches = [row[None] for row in self.team.share(self.rows)]
        by = self.recipes[0].allocation
        with Lanes(self.host.model, stops, batches, self.home, self.host.device_of, self.autocast) as lanes:
            if by == "owl":
                return self._owl(lanes)
            if by == "error":
                return self._error(self._forward(lanes, None))
            tape = self._tape(lanes, self.rows[:MOST_FOLLOWED])
            return self._fisher(tape, self._forward(lanes, tape), sum(map(len, self.rows)))

    def _tape(self, lanes: Lanes, rows: Sequence[Tensor]) -> Tape:
        """Return what follows the first rows, no more than may have their hidden states kept."""
        blocks, config, dtype = len(self.host.blocks), self.host.config, self.host.dtype
        most = self.team.tell(most_kept(rows, blocks, config, dtype))
        shelf = home_device(self.host.device, self.team.share(rows[:most]) * blocks, config, dtype)
        return Tape(lanes, False, "sampled", self.seed, shelf, most, self.team)

    def _forward(self, lanes: Lanes, tape: Tape | None) -> list[dict[str, Loss]]:
        trials = [Trials(partial(self.solver, recipe), _shares(recipe)) for recipe in self.recipes]
        found, load = [dict[str, Loss]() for _ in trials], [0.0] * self.team.size

        def takes(group: Group) -> bool:
            return deal([_cost(group)], load) == [self.team.rank]

        for _, groups in self._blocks(lanes, tape):
            of_block = losses(groups, self.host.weight, trials, self.seed, takes)
            found = [before | more for before, more in zip(found, of_block, strict=True)]
        of_ranks = self.team.gather(found)
        return [{name: loss for part in parts for name, loss in part.items()} for parts in zip(*of_ranks, strict=True)]

    def _owl(self, lanes: Lanes) -> list[dict[str, Cost]]:
        sizes = {name: sum(site.numel for site in sites) for name, sites in self.sites.items()}
        outliers = {
            stage.name: outlier_share(groups, self.host.weight)
            for stage, groups in self._blocks(lanes, None)
            if stage.name in self.sites
        }
        return [
            {
                site.name: wish(share, site.numel)
                for name, share in block_shares(
                    outliers, sizes, recipe.target().sparsity, recipe.allocation_range
                ).items()
                for site in self.sites[name]
            }
            for recipe in self.recipes
        ]

    def _error(self, found: Sequence[Mapping[str, Loss]]) -> list[dict[str, Cost]]:
        return [
            {name: _curve(recipe, loss.error_PR.sum(1) / max(loss.energy, _TINY)) for name, loss in of_recipe.items()}
            for recipe, of_recipe in zip(self.recipes, found, strict=True)
        ]

    def _fisher(self, tape: Tape, found: Sequence[Mapping[str, Loss]], tokens: int) -> list[dict[str, Cost]]:
        costs = [dict[str, Cost]() for _ in self.recipes]
        for _, gradients in tape.backward(self.host, len(self.host.blocks) - 1, self.sites):
            for site, gradient in gradients.items():
                if not gradient.tokens:
                    continue
                square_O = gradient.square_O.cpu() / gradient.tokens
                square_R, levels = sampled(square_O), _row_levels(square_O, gradient.tokens)
                share = len(square_R) / len(square_O)
                for recipe, of_recipe, to in zip(self.recipes, found, costs, strict=True):
                    if site.name in of_recipe:
                        cost_P = of_recipe[site.name].error_PR @ square_R / (2 * tokens * share)
                        to[site.name] = _curve(recipe, cost_P, levels)
        return costs

    def _blocks(self, lanes: Lanes, tape: Tape | None) -> Iterator[tuple[Stage, Generator[Group, None, None]]]:
        """Yield every block, loaded, with its groups, and let the lanes go on to the next."""
        blocks = self.host.blocks
        largest = max(parameter_bytes(block.module) for block in blocks)
        budget = self.team.tell(statistics_budget(largest, self.host.device))
        collector = Collector(lanes, Gram, budget, stays_dense=True, team=self.team)
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


def _shares(recipe: Recipe) -> tuple[float, ...]:
    """Return the points of a recipe's curves."""
    low, high = bounds(recipe.target().sparsity, recipe.allocation_range)
    return tuple(low + (high - low) * point / (POINTS - 1) for point in range(POINTS))


def _curve(recipe: Recipe, cost_P: Tensor, levels: bytes = b"") -> Curve:
    return Curve(_shares(recipe), tuple(cost_P.tolist()), levels)


def _row_levels(square_O: Tensor, tokens: int) -> bytes:
    """Return the levels of rows that are scaled by F_o^(1/4) beside that of the median row; less where few tokens tell F_o."""
    live = square_O[square_O > 0]
    if not len(live):
        return b""
    octave_O = (square_O / live.median()).log2().clamp(-_MOST_OCTAVES, _MOST_OCTAVES)
    return as_row_levels(octave_O * _ROW_POWER * tokens / (tokens + _ROW_TOKENS))


def _cost(group: Group) -> float:
    """Return the operations that solving a group takes, up to a factor."""
    rows = POINTS * sum(min(SAMPLED_ROWS, site.shape[0]) for site in group.sites)
    return float(group.inputs**2 * (group.inputs + rows))
