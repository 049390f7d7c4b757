"""The stages of a model, one after another through memory: load, collect statistics, solve, store, run on, free."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from llmprune.allocation import global_magnitude
from llmprune.calibration import batches
from llmprune.errors import ResourceError
from llmprune.methods.magnitude import Magnitude
from llmprune.model import Lanes
from llmprune.model.collect import Collector, Group
from llmprune.model.memory import batch_size, give_back_freed_memory, out_of_memory_in, statistics_budget
from llmprune.model.sites import Site, Stage
from llmprune.patterns import Pattern, Unstructured
from llmprune.plan import Host, Plan
from llmprune.progress import Progress
from llmprune.recipe import Recipe
from llmprune.report import Clock, Report, SiteReport
from llmprune.solving import prune_matrix
from llmprune.storing import Store

_log = logging.getLogger(__name__)


def run_stages(host: Host, plan: Plan, recipe: Recipe, home: torch.device, report: Report, store: Store) -> None:
    """Prune the embedding if that is asked for, then stream the stages; with half the batch if memory runs out.

    Raises:
        ResourceError: memory runs out with one sequence a forward, or for a model that cannot be loaded again.
        NumericalError: an activation, a weight or a solution is not finite.
        CheckpointError: a stage cannot be read or stored.
    """
    patterns = _patterns(host, plan)
    embedding = plan.sites.get(host.embedding.name)
    if embedding and not store.has(host.embedding):
        _prune_sites(host, _unfed(embedding), patterns, recipe, report)
        store.keep(host.embedding, embedding)
    store.batch_size = store.batch_size or _batch_size(host, plan, recipe)
    while not all(store.has(stage) for stage in plan.stages):
        try:
            _stream(host, plan, patterns, recipe, home, report, store)
        except ResourceError as error:
            if store.batch_size == 1 or not store.go_back():
                raise
            store.batch_size //= 2
            _log.warning("%s; going on with %d sequences a forward", error, store.batch_size)
        give_back_freed_memory()
    report.close(plan)


def _stream(
    host: Host,
    plan: Plan,
    patterns: dict[str, Pattern],
    recipe: Recipe,
    home: torch.device,
    report: Report,
    store: Store,
) -> None:
    """Visit the stages in order: load, collect statistics, solve, store, run on with the pruned weights, free."""
    clock = report.clock
    with (
        out_of_memory_in(host.embedding.name),
        _lanes(host, plan, store.batch_size, home) as lanes,
        Progress(len(plan.stages), "pruning", "block") as bar,
    ):
        collector = _collector(lanes, host, recipe)
        for index, stage in enumerate(plan.stages):
            with out_of_memory_in(stage.name), _freed(host, stage):
                if store.has(stage):
                    with clock.phase("recall"):
                        store.recall(stage)
                else:
                    with clock.phase("load"):
                        host.load(stage)
                    sites = plan.sites.get(stage.name, [])
                    groups = _timed(collector.groups(index, sites), clock) if collector else _unfed(sites)
                    _prune_sites(host, groups, patterns, recipe, report)
                    report.most_runs = max(report.most_runs, collector.most_runs if collector else 0)
                    with clock.phase("write"):
                        store.keep(stage, sites)
                if lanes and index + 1 < len(plan.stages):
                    with clock.phase("forward"):
                        lanes.advance(index)
            bar.step()


@contextmanager
def _freed(host: Host, stage: Stage) -> Iterator[None]:
    """Free a stage after use, and after a failure, when it will be loaded again."""
    try:
        yield
    finally:
        host.free(stage)


def _batch_size(host: Host, plan: Plan, recipe: Recipe) -> int:
    longest = max((len(row) for row in plan.rows), default=1)
    return recipe.batch_size or batch_size(longest, host.config, host.dtype, host.place)


def _lanes(host: Host, plan: Plan, size: int, home: torch.device) -> AbstractContextManager[Lanes | None]:
    if plan.tokens is None:
        return nullcontext()
    return Lanes(host.model, plan.stages, batches(plan.tokens, size), home, host.device_of)


def _collector(lanes: Lanes | None, host: Host, recipe: Recipe) -> Collector | None:
    needs = recipe.solver().needs
    if lanes is None or needs is None:
        return None
    largest = max(_nbytes(block.module) for block in host.blocks)
    return Collector(lanes, needs, statistics_budget(largest, host.place), recipe.true_sequential)


def _nbytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _timed(groups: Iterator[Group], clock: Clock) -> Iterator[Group]:
    """Count the time it takes to come by each group, and let go of its statistic after use."""
    while True:
        with clock.phase("statistics"):
            group = next(groups, None)
        if group is None:
            return
        yield group
        group.statistic = None


def _unfed(sites: Iterable[Site]) -> Iterator[Group]:
    return (Group([site]) for site in sites)


def _prune_sites(
    host: Host, groups: Iterable[Group], patterns: dict[str, Pattern], recipe: Recipe, report: Report
) -> None:
    for group in groups:
        method = recipe.solver()
        if group.statistic is None and method.needs is not None:
            method = Magnitude()  # experts that no token reached; the group's notes say so
        for site in group.sites:
            with report.clock.phase("solve"), out_of_memory_in(site.name):
                pattern = patterns[site.name]
                outcome = prune_matrix(site.name, method, host.weight(site), group.statistic, pattern, recipe.seed)
            report.sites.append(SiteReport.of(site, outcome, pattern, group.statistic, group.notes))


def _patterns(host: Host, plan: Plan) -> dict[str, Pattern]:
    """Return every site's pattern; a budget over the whole model is split by one look at all weights."""
    sites = plan.all_sites()
    if not (isinstance(plan.pattern, Unstructured) and plan.pattern.group == "model"):
        return {site.name: plan.pattern for site in sites}

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for stage in [host.embedding, *plan.stages]:
            if stage.name in plan.sites:
                host.load(stage)
                yield from ((site.name, host.weight(site)) for site in plan.sites[stage.name])
                host.free(stage)

    return dict(global_magnitude(weights, plan.pattern.sparsity))
