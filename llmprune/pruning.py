"""The line of a run: a checkpoint in, one block at a time through memory, a pruned checkpoint out."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from llmprune.allocation import global_magnitude
from llmprune.calibration import batches
from llmprune.checkpoint import Sink, Source
from llmprune.checkpoint.place import require_place
from llmprune.determinism import repeatable
from llmprune.errors import RecipeError, ResourceError
from llmprune.locate import locate
from llmprune.methods.magnitude import Magnitude
from llmprune.model import Lanes, Resident, Streamed, load_tokenizer
from llmprune.model.collect import Collector, Group
from llmprune.model.memory import (
    batch_size,
    give_back_freed_memory,
    home_device,
    out_of_memory_in,
    statistics_budget,
)
from llmprune.model.sites import Site, Stage, require_finite
from llmprune.patterns import Pattern, Unstructured
from llmprune.plan import Host, Plan, make_plan
from llmprune.progress import Progress
from llmprune.recipe import Recipe
from llmprune.report import Clock, Report, SiteReport, hardware, versions
from llmprune.solving import prune_matrix
from llmprune.storing import InMemory, OnDisk, Store

_DECISIVE = ("llmprune", "torch", "transformers")  # packages whose versions may change the bytes of a result
_SMALL_SHARE = 0.5  # of the parameters beside embeddings; below it a run warns that most of the model stays dense

_log = logging.getLogger(__name__)


def prune(
    model: Any,
    out: str | Path | None = None,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> Report:
    """Prune a causal language model.

    Args:
        model: a folder, a Hub id or `demo`: streamed block by block into the folder `out`. Or a loaded
            `PreTrainedModel`: pruned in place, where its blocks lie.
        out: the output folder; loads with plain `AutoModelForCausalLM.from_pretrained`.
        tokenizer: for a loaded model and calibration text.
        overwrite: replace `out` if it is a model folder, and give up an unfinished run.
        resume: continue an unfinished run at `out`, if there is one, where it was interrupted.
        options: the fields of `llmprune.Recipe`.

    Raises:
        LlmpruneError: one of its kinds, before any work wherever that is possible; `out` then does not exist. Once a
            block is done, what is done is kept for `resume`.
    """
    recipe = Recipe.of(options)
    with repeatable(recipe.deterministic):
        return _prune(model, out, tokenizer, recipe, overwrite, resume)


def _prune(model: Any, out: str | Path | None, tokenizer: Any, recipe: Recipe, overwrite: bool, resume: bool) -> Report:
    if not isinstance(model, str | Path):
        if out is not None or overwrite or resume:
            raise RecipeError("a loaded model is pruned in place: leave out `out`, and call save_pretrained afterwards")
        return _prune_in_place(model, tokenizer, recipe)
    if out is None:
        raise RecipeError("an output folder is needed: prune(model, out, ...)")
    return _prune_checkpoint(model, Path(out), recipe, overwrite, resume)


def _prune_checkpoint(model: str | Path, out: Path, recipe: Recipe, overwrite: bool, resume: bool) -> Report:
    source = Source.open(locate(model, recipe.revision))
    require_place(source, out, overwrite, resume)
    recipe = recipe.for_model(model)
    host = Streamed(source, recipe.place(), recipe.compute_dtype(), recipe.trust_remote_code)
    plan = make_plan(host, recipe, lambda: load_tokenizer(source.folder, recipe.trust_remote_code))
    _warn_of_small_share(plan)
    report = Report.begin(str(model), recipe.to_json(), host, plan)
    report.notes.extend(host.notes())
    home = home_device(recipe.place(), plan.rows, host.config, host.dtype)
    with Sink(source, out, _fingerprint(source, report), resume) as sink:
        with report.clock.phase("load"):
            host.open(home)
        with report.clock.phase("copy"):
            sink.copy_source()
        _run(host, plan, recipe, home, report, OnDisk(host, sink, report))
        sink.commit(report.to_json())
    return report


def _fingerprint(source: Source, report: Report) -> dict[str, Any]:
    """Return all that decides the bytes of a run's result."""
    installed = versions()
    return {
        "recipe": report.recipe,
        "source": source.fingerprint(),
        "calibration": report.calibration,
        "versions": {package: installed[package] for package in _DECISIVE if package in installed},
        "hardware": hardware(),
    }


def _prune_in_place(model: Any, tokenizer: Any, recipe: Recipe) -> Report:
    recipe.require_in_place()
    host = Resident(model)
    plan = make_plan(host, recipe, lambda: tokenizer)
    _warn_of_small_share(plan)
    for site in plan.all_sites():
        require_finite(site.name, host.weight(site))
    report = Report.begin(model.name_or_path or type(model).__name__, recipe.to_json(), host, plan)
    _run(host, plan, recipe, host.home, report, InMemory())
    return report


def _warn_of_small_share(plan: Plan) -> None:
    """A model of which most stays dense should not be called pruned without a word."""
    if plan.coverage < _SMALL_SHARE:
        _log.warning(
            "only %.1f%% of the parameters beside embeddings are in matrices to prune: `left_dense` of the report "
            "tells what stays dense and why",
            100 * plan.coverage,
        )


def _run(host: Host, plan: Plan, recipe: Recipe, home: torch.device, report: Report, store: Store) -> None:
    """Prune the embedding if that is asked for, then stream the stages; with half the batch if memory runs out."""
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
