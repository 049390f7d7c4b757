"""The line of a run: a checkpoint in, one block at a time through memory, a pruned checkpoint out."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from llmprune.allocation import global_magnitude
from llmprune.calibration import batches
from llmprune.checkpoint import Sink, Source
from llmprune.checkpoint.sink import require_place
from llmprune.errors import RecipeError
from llmprune.locate import locate
from llmprune.methods.magnitude import Magnitude
from llmprune.model import Lanes, Resident, Streamed, load_tokenizer
from llmprune.model.collect import Collector, Group
from llmprune.model.memory import batch_size, home_device, statistics_budget
from llmprune.model.sites import Site, Stage, require_finite
from llmprune.patterns import Pattern, Unstructured
from llmprune.plan import Host, Plan, make_plan
from llmprune.progress import Progress
from llmprune.recipe import Recipe
from llmprune.report import Clock, Report, SiteReport
from llmprune.solving import prune_matrix

_SMALL_SHARE = 0.5  # of the parameters beside embeddings; below it a run warns that most of the model stays dense

_log = logging.getLogger(__name__)


def prune(
    model: Any, out: str | Path | None = None, *, tokenizer: Any = None, overwrite: bool = False, **options: Any
) -> Report:
    """Prune a causal language model.

    Args:
        model: a folder, a Hub id or `demo`: streamed block by block into the folder `out`. Or a loaded
            `PreTrainedModel`: pruned in place, where its blocks lie.
        out: the output folder; loads with plain `AutoModelForCausalLM.from_pretrained`.
        tokenizer: for a loaded model and calibration text.
        overwrite: replace `out` if it is a model folder.
        options: the fields of `llmprune.Recipe`.

    Raises:
        LlmpruneError: one of its kinds, before any work wherever that is possible; `out` then does not exist.
    """
    recipe = Recipe.of(options)
    if not isinstance(model, str | Path):
        if out is not None or overwrite:
            raise RecipeError("a loaded model is pruned in place: leave out `out`, and call save_pretrained afterwards")
        return _prune_in_place(model, tokenizer, recipe)
    if out is None:
        raise RecipeError("an output folder is needed: prune(model, out, ...)")
    return _prune_checkpoint(model, Path(out), recipe, overwrite)


def _prune_checkpoint(model: str | Path, out: Path, recipe: Recipe, overwrite: bool) -> Report:
    source = Source.open(locate(model, recipe.revision))
    require_place(source, out, overwrite)
    recipe = recipe.for_model(model)
    host = Streamed(source, recipe.place(), recipe.compute_dtype(), recipe.trust_remote_code)
    plan = make_plan(host, recipe, lambda: load_tokenizer(source.folder, recipe.trust_remote_code))
    _warn_of_small_share(plan)
    report = Report.begin(str(model), recipe.to_json(), host, plan)
    report.notes.extend(host.notes())
    home = home_device(recipe.place(), plan.rows, host.config, host.dtype)
    with report.clock.phase("load"):
        host.open(home)
    with Sink(source, out) as sink:
        with report.clock.phase("copy"):
            sink.copy_source()

        def store(stage: Stage, sites: list[Site]) -> None:
            for name, tensor in host.stored(stage, sites):
                sink.write(name, tensor)

        _run(host, plan, recipe, home, report, store)
        sink.commit(report.to_json())
    return report


def _prune_in_place(model: Any, tokenizer: Any, recipe: Recipe) -> Report:
    recipe.require_in_place()
    host = Resident(model)
    plan = make_plan(host, recipe, lambda: tokenizer)
    _warn_of_small_share(plan)
    for site in plan.all_sites():
        require_finite(site.name, host.weight(site))
    report = Report.begin(model.name_or_path or type(model).__name__, recipe.to_json(), host, plan)
    _run(host, plan, recipe, host.home, report, lambda stage, sites: None)
    return report


def _warn_of_small_share(plan: Plan) -> None:
    """A model of which most stays dense should not be called pruned without a word."""
    if plan.coverage < _SMALL_SHARE:
        _log.warning(
            "only %.1f%% of the parameters beside embeddings are in matrices to prune: `left_dense` of the report "
            "tells what stays dense and why",
            100 * plan.coverage,
        )


def _run(
    host: Host,
    plan: Plan,
    recipe: Recipe,
    home: torch.device,
    report: Report,
    store: Callable[[Stage, list[Site]], None],
) -> None:
    """Visit the stages in order: load, collect statistics, solve, run on with the pruned weights, store, free."""
    patterns, clock = _patterns(host, plan), report.clock
    if embedding := plan.sites.get(host.embedding.name):
        _prune_sites(host, _unfed(embedding), patterns, recipe, report)
        store(host.embedding, embedding)
    with _lanes(host, plan, recipe, home) as lanes, Progress(len(plan.stages), "pruning", "block") as bar:
        collector = _collector(lanes, host, recipe)
        for index, stage in enumerate(plan.stages):
            with clock.phase("load"):
                host.load(stage)
            sites = plan.sites.get(stage.name, [])
            groups = _timed(collector.groups(index, sites), clock) if collector else _unfed(sites)
            _prune_sites(host, groups, patterns, recipe, report)
            if lanes and index + 1 < len(plan.stages):
                with clock.phase("forward"):
                    lanes.advance(index)
            with clock.phase("write"):
                store(stage, sites)
            host.free(stage)
            bar.step()
    report.close(plan, collector.most_runs if collector else 0)


def _lanes(host: Host, plan: Plan, recipe: Recipe, home: torch.device) -> AbstractContextManager[Lanes | None]:
    if plan.tokens is None:
        return nullcontext()
    longest = max(len(row) for row in plan.rows)
    size = recipe.batch_size or batch_size(longest, host.config, host.dtype, host.place)
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
            with report.clock.phase("solve"):
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
