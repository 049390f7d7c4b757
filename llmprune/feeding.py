"""How the model is fed with calibration sequences: how many at once, in which precision, and who sums up its inputs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from llmprune.batching import sequences_a_forward
from llmprune.calibration import Tokens, batches
from llmprune.errors import RecipeError
from llmprune.model import Lanes
from llmprune.model.collect import Collector
from llmprune.model.memory import fits_side_by_side, parameter_bytes, statistics_budget
from llmprune.planning import Host, Plan, asks_autocast, multiplied_in, sums_inputs
from llmprune.recipe import Recipe
from llmprune.statistics import CrossGram
from llmprune.team.team import Team
from llmprune.thrift import Thrift


@dataclass(frozen=True)
class Feed:
    """Decides how calibration goes through the model, by what the recipe asks for and what the machine has room for.

    Attributes:
        host: the model.
        tokens: the calibration tokens; None where the method needs none.
        recipe: what the user asked for.
        home: device on which hidden states wait between stages.
        team: the processes that share the work.
    """

    host: Host
    tokens: Tokens | None
    recipe: Recipe
    home: torch.device
    team: Team

    def notes(self, plan: Plan) -> list[str]:
        """Return what the recipe asks for and this model or machine does not get."""
        notes = []
        if self.recipe.dense_target and any(site.of_expert for site in plan.all_sites()):
            notes.append("blocks with experts are fitted to their own outputs: no dense target follows tokens")
        if asks_autocast(self.host, self.recipe) and not self._autocast:
            why = "bfloat16 is not faster here" if sums_inputs(self.recipe) else "no method sums up inputs"
            notes.append(f"autocast: {why}, so nothing ran in bfloat16")
        return notes

    def batch_size(self) -> int:
        """Return how many sequences go through a block at once."""
        rows = self.tokens.rows if self.tokens else []
        longest = max((len(row) for row in rows), default=1)
        return sequences_a_forward(self.host, self.recipe, longest, len(rows))

    def lanes(self, sequences: int) -> AbstractContextManager[Lanes | None]:
        """Return this rank's lanes of so many sequences each; None where the method sees no inputs.

        Where the dense model runs too, it has a second lane for each.
        """
        if self.tokens is None or self.recipe.needs is None:
            return nullcontext()
        rows = self.team.share(batches(self.tokens, sequences))
        rows = [*rows, *rows] if self.recipe.dense_stream else rows
        stops = [*self.host.blocks, self.host.head]
        return Lanes(self.host.model, stops, rows, self.home, self.host.device_of, self._autocast)

    def collector(self, lanes: Lanes | None, thrift: Thrift, settle: Callable[[], None]) -> Collector | None:
        """Return what sums up the inputs of sites from the lanes, with no more at once than there is memory for.

        Args:
            lanes: as from `lanes`.
            thrift: what is given up where memory ran out.
            settle: brings what is solved to all ranks.

        Raises:
            RecipeError: a dense target needs more memory than there is.
        """
        needs, dense_stream = self.recipe.needs, self.recipe.dense_stream
        if lanes is None or needs is None or self.tokens is None:
            return None
        room = statistics_budget(max(parameter_bytes(block.module) for block in self.host.blocks), self.host.device)
        budget = room if thrift.budget is None else min(room, thrift.budget)
        tokens = sum(len(row) for row in self.team.share(self.tokens.rows)) * (2 if dense_stream else 1)
        fits = thrift.side_by_side and fits_side_by_side(
            tokens * self.team.neighbours, self.host.config, self.host.dtype, self.host.device
        )
        budget, fits = self.team.tell((budget, fits))
        if self.recipe.dense_target and not fits:
            raise RecipeError(
                f"a dense target holds the activations of {tokens} tokens, too many here: ask for fewer samples"
            )
        statistic = CrossGram if self.recipe.dense_target else needs
        return Collector(
            lanes,
            statistic,
            budget,
            true_sequential=self.recipe.true_sequential,
            side_by_side=fits,
            dense_stream=dense_stream,
            team=self.team,
            settle=settle,
        )

    @property
    def _autocast(self) -> torch.dtype | None:
        return multiplied_in(self.host, self.recipe)
