"""The pattern of every site: stated for it, the recipe's own, or its exact part of a budget over several sites."""

import zlib
from base64 import b85decode, b85encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmprune.allocation import Cost, Curve, Measured, bounds, global_magnitude, pinned, split
from llmprune.budget.dense import MOST_SEQUENCES, DensePass
from llmprune.calibration import Tokens
from llmprune.methods import Method
from llmprune.model.sites import Site
from llmprune.patterns import ComparisonGroup, Count, Pattern, Unstructured
from llmprune.planning import Host, Plan, multiplied_in, parts_of
from llmprune.recipe import Recipe
from llmprune.team.team import Team


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        patterns: of every site, by name.
        allocation: where a sparsity was shared out, plain values: `by`, `range`, `sequences`, and `sites` with, for
            each, `removed` weights, its `sparsity`, the `cost` foretold, and the `curve` of costs at sparsities. By a file
            of measured curves, `model` is the one measured there, and no `sequences` were needed. `rows` has the
            `row_levels` of sites as text, where those are known.
    """

    patterns: dict[str, Pattern]
    allocation: dict[str, Any] | None = None

    @property
    def told(self) -> dict[str, Any] | None:
        """Return the allocation as reports tell it: without what is known of every row."""
        return self.allocation and {name: value for name, value in self.allocation.items() if name != "rows"}


@dataclass
class Chooser:
    """Chooses the pattern of every site, for one or several recipes of a model that is dense when it is asked.

    Recipes that share out their sparsities in the same way share one pass through the dense model, which is made when
    the first of them asks. It measures for each what a pass of its own would, to the bit.

    Attributes:
        team: the ranks that share the pass; all choose the same.
        host: the model.
        tokens: the calibration; None where no recipe needs it.
        home: device of what lies between the blocks (embedding, masks), where hidden states wait.
        recipes: all that will ask, for the same sites.
    """

    team: Team
    host: Host
    tokens: Tokens | None
    home: torch.device
    recipes: Sequence[Recipe]
    _costs: list[tuple[Recipe, dict[str, Cost]]] = field(default_factory=list, init=False)

    def choose(self, plan: Plan, recipe: Recipe, known: dict[str, Any] | None) -> Choice:
        """Choose for a recipe; a budget over the model is split by one look, or one dense pass, at all of it.

        Args:
            known: the allocation of an earlier run that this one continues.

        Raises:
            LlmpruneError: as `DensePass.costs`.
        """
        sites, pattern = plan.all_sites(), recipe.target()
        if isinstance(pattern, Unstructured) and pattern.group == "model":
            return Choice(dict(global_magnitude(lambda: _weights(self.host, plan), pattern.sparsity)))
        patterns: dict[str, Pattern] = {site.name: recipe.at(site.tensor).target() for site in sites}
        shared = [site for site in sites if not recipe.states_pattern(site.tensor)]
        if recipe.allocation == "uniform" or not shared:
            return Choice(patterns)
        allocation = known or self.team.tell(self._allocate(plan, recipe, shared))
        rows = allocation.get("rows", {})  # which journals of earlier versions lack
        for site in shared:
            removed, levels = allocation["sites"][site.name]["removed"], _unpacked(rows.get(site.name, ""))
            patterns[site.name] = _count(recipe, site, removed, site.numel, levels)
        return Choice(patterns, allocation)

    def _allocate(self, plan: Plan, recipe: Recipe, shared: list[Site]) -> dict[str, Any]:
        sizes = {site.name: site.numel for site in shared}
        sparsity = recipe.target().sparsity
        if recipe.allocation_file:
            measured = Measured.read(recipe.allocation_file)
            costs: Mapping[str, Cost] = measured.costs(parts_of(self.host))
            how: dict[str, Any] = {"model": measured.model}
        else:
            assert self.tokens is not None
            costs = self._measured(plan, recipe, shared)
            how = {"sequences": min(len(self.tokens.rows), MOST_SEQUENCES)}
        all_costs = {name: costs.get(name, pinned(sparsity)) for name in sizes}
        removed = split(all_costs, sizes, sparsity, recipe.allocation_range)
        return {
            "by": str(recipe.allocation),
            "range": list(bounds(sparsity, recipe.allocation_range)),
            **how,
            "sites": {name: _entry(removed[name], size, costs.get(name)) for name, size in sizes.items()},
            "rows": {
                name: _packed(cost.row_levels)
                for name, cost in costs.items()
                if isinstance(cost, Curve) and cost.row_levels
            },
        }

    def _measured(self, plan: Plan, recipe: Recipe, shared: list[Site]) -> dict[str, Cost]:
        """Return the costs of a recipe, from a pass for all those that go the same way and have not been served."""
        if not any(served is recipe for served, _ in self._costs):
            alike = [other for other in self.recipes if self._way(other) == self._way(recipe)]
            with self.host.keeping():  # the run will want all blocks again
                self._costs += zip(alike, self._dense_pass(plan, alike, shared).costs(), strict=True)
        return next(costs for served, costs in self._costs if served is recipe)

    def _way(self, recipe: Recipe) -> tuple[str, torch.dtype | None]:
        return recipe.allocation, multiplied_in(self.host, recipe)

    def _dense_pass(self, plan: Plan, recipes: Sequence[Recipe], shared: list[Site]) -> DensePass:
        assert self.tokens is not None
        ends = {site for name in (plan.embedding, plan.head) for site in plan.sites.get(name, ())}
        measured = {name: [site for site in sites if site in set(shared) - ends] for name, sites in plan.sites.items()}
        measured = {name: sites for name, sites in measured.items() if sites}
        autocast = multiplied_in(self.host, recipes[0])
        return DensePass(self.host, recipes, self.tokens, self.home, measured, _solver, autocast, self.team)


def _solver(recipe: Recipe, site: Site) -> tuple[Method, Callable[[int, int], Count]]:
    return recipe.at(site.tensor).solver(), partial(_count, recipe, site)


def _entry(removed: int, size: int, cost: Cost | None) -> dict[str, Any]:
    """Return what the report says of a site; sites that were not measured have no cost and no curve."""
    entry: dict[str, Any] = {"removed": removed, "sparsity": removed / size}
    if isinstance(cost, Curve):
        entry |= {
            "cost": float(cost(np.array([removed / size]))[0]),
            "curve": [list(point) for point in zip(cost.shares, cost.costs, strict=True)],
        }
    return entry


def _packed(levels: bytes) -> str:
    """Return levels as text; they are many and much alike."""
    return b85encode(zlib.compress(levels)).decode()


def _unpacked(text: str) -> bytes:
    return zlib.decompress(b85decode(text)) if text else b""


def _count(recipe: Recipe, site: Site, removed: int, size: int, levels: bytes = b"") -> Count:
    """Return a site's pattern, which removes `removed` of its `size` weights.

    They compete as the recipe says, otherwise over the whole matrix, or in the method's own way if it cannot do that.
    """
    part = recipe.at(site.tensor)
    method = part.solver()
    own: ComparisonGroup = "layer" if "layer" in method.comparison_groups else method.comparison_group
    group = own if part.comparison_group is None else part.group(method)
    return Count(removed, size, group, b"" if group == "row" else levels)


def _weights(host: Host, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    for stage in [host.embedding, *plan.stages]:
        if stage.name in plan.sites:
            host.load(stage)
            yield from ((site.name, host.weight(site)) for site in plan.sites[stage.name])
            host.free(stage)
