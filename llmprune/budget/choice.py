"""The pattern of every site: stated for it, the recipe's own, or its exact part of a budget over several sites."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmprune.allocation import Cost, Curve, Measured, bounds, global_magnitude, pinned, split
from llmprune.budget.dense import DensePass
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
            of measured curves, `model` is the one measured there, and no `sequences` were needed.
    """

    patterns: dict[str, Pattern]
    allocation: dict[str, Any] | None = None


def choose(
    team: Team,
    host: Host,
    plan: Plan,
    recipe: Recipe,
    tokens: Tokens | None,
    home: torch.device,
    known: dict[str, Any] | None,
) -> Choice:
    """Choose every site's pattern; a budget over the model is split by one look, or one dense pass, at all of it.

    Args:
        team: the ranks that share the dense pass; all choose the same.
        home: device of the model's glue.
        known: the allocation of an earlier run that this one continues.

    Raises:
        LlmpruneError: as `DensePass.costs`.
    """
    sites, pattern = plan.all_sites(), recipe.target()
    if isinstance(pattern, Unstructured) and pattern.group == "model":
        return Choice(dict(global_magnitude(lambda: _weights(host, plan), pattern.sparsity)))
    patterns: dict[str, Pattern] = {site.name: recipe.at(site.tensor).target() for site in sites}
    shared = [site for site in sites if not recipe.states_pattern(site.tensor)]
    if recipe.allocation == "uniform" or not shared:
        return Choice(patterns)
    allocation = known or team.tell(_allocate(team, host, plan, recipe, tokens, home, shared))
    for site in shared:
        removed = allocation["sites"][site.name]["removed"]
        patterns[site.name] = _count(recipe, site, removed, site.shape[0] * site.shape[1])
    return Choice(patterns, allocation)


def _allocate(
    team: Team, host: Host, plan: Plan, recipe: Recipe, tokens: Tokens | None, home: torch.device, shared: list[Site]
) -> dict[str, Any]:
    sizes = {site.name: site.shape[0] * site.shape[1] for site in shared}
    sparsity = recipe.target().sparsity
    if recipe.allocation_file:
        measured = Measured.read(recipe.allocation_file)
        costs: Mapping[str, Cost] = measured.costs(parts_of(host))
        how: dict[str, Any] = {"model": measured.model}
    else:
        assert tokens is not None
        dense = _dense_pass(team, host, plan, recipe, tokens, home, shared)
        with host.keeping():  # the run will want all blocks again
            costs, how = dense.costs(), {"sequences": len(dense.rows)}
    all_costs = {name: costs.get(name, pinned(sparsity)) for name in sizes}
    removed = split(all_costs, sizes, sparsity, recipe.allocation_range)
    return {
        "by": str(recipe.allocation),
        "range": list(bounds(sparsity, recipe.allocation_range)),
        **how,
        "sites": {name: _entry(removed[name], size, costs.get(name)) for name, size in sizes.items()},
    }


def _dense_pass(
    team: Team, host: Host, plan: Plan, recipe: Recipe, tokens: Tokens, home: torch.device, shared: list[Site]
) -> DensePass:
    ends = {site for name in (plan.embedding, plan.head) for site in plan.sites.get(name, ())}
    measured = {name: [site for site in sites if site in set(shared) - ends] for name, sites in plan.sites.items()}
    measured = {name: sites for name, sites in measured.items() if sites}

    def solver(site: Site) -> tuple[Method, Any]:
        return recipe.at(site.tensor).solver(), lambda removed, size: _count(recipe, site, removed, size)

    sparsity, autocast = recipe.target().sparsity, multiplied_in(host, recipe)
    return DensePass(host, recipe, tokens, home, measured, solver, sparsity, autocast, team)


def _entry(removed: int, size: int, cost: Cost | None) -> dict[str, Any]:
    """Return what the report says of a site; sites that were not measured have no cost and no curve."""
    entry: dict[str, Any] = {"removed": removed, "sparsity": removed / size}
    if isinstance(cost, Curve):
        entry |= {
            "cost": float(cost(np.array([removed / size]))[0]),
            "curve": [list(point) for point in zip(cost.shares, cost.costs, strict=True)],
        }
    return entry


def _count(recipe: Recipe, site: Site, removed: int, size: int) -> Count:
    """Return a site's pattern: within it weights compare over the whole matrix where the method can, if not as it does."""
    part = recipe.at(site.tensor)
    method = part.solver()
    own: ComparisonGroup = "layer" if "layer" in method.comparison_groups else method.comparison_group
    return Count(removed, size, own if part.comparison_group is None else part.group(method))


def _weights(host: Host, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    for stage in [host.embedding, *plan.stages]:
        if stage.name in plan.sites:
            host.load(stage)
            yield from ((site.name, host.weight(site)) for site in plan.sites[stage.name])
            host.free(stage)
