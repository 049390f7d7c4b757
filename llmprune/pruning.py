"""The line of a run: a checkpoint in, one block at a time through memory, a pruned checkpoint out."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from llmprune.allocation import global_magnitude
from llmprune.calibration import Tokens, batches
from llmprune.checkpoint import Sink, Source
from llmprune.checkpoint.place import require_place
from llmprune.errors import RecipeError
from llmprune.locate import locate
from llmprune.methods.magnitude import Magnitude
from llmprune.model import Lanes, Resident, Streamed, load_tokenizer
from llmprune.model.collect import Collector, Group
from llmprune.model.memory import batch_size, home_device, statistics_budget
from llmprune.model.sites import Site, require_finite
from llmprune.patterns import Pattern, Unstructured
from llmprune.planning import Host, Plan, draw_tokens, make_plan
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
    plan = make_plan(host, recipe)
    tokens = draw_tokens(host, recipe, lambda: load_tokenizer(source.folder, recipe.trust_remote_code))
    _warn_of_small_share(plan)
    report = Report.begin(str(model), recipe.to_json(), host, plan, tokens)
    report.notes.extend(host.notes())
    home = home_device(recipe.place(), tokens.rows if tokens else [], host.config, host.dtype)
    with Sink(source, out, _fingerprint(source, report), resume) as sink:
        with report.clock.phase("load"):
            host.open(home)
        with report.clock.phase("copy"):
            sink.copy_source()
        _run(host, plan, tokens, recipe, home, report, OnDisk(host, sink, report))
        sink.commit(report.to_json())
    return report


def _fingerprint(source: Source, report: Report) -> dict[str, Any]:
    """Return all that decides the bytes of a run's result."""
    installed = versions()
    return {
        "source": source.fingerprint(),
        "recipe": report.recipe,
        "calibration": report.calibration,
        "versions": {package: installed[package] for package in _DECISIVE if package in installed},
        "hardware": hardware(),
    }


def _prune_in_place(model: Any, tokenizer: Any, recipe: Recipe) -> Report:
    recipe.require_in_place()
    host = Resident(model)
    plan = make_plan(host, recipe)
    tokens = draw_tokens(host, recipe, lambda: tokenizer)
    _warn_of_small_share(plan)
    for site in plan.all_sites():
        require_finite(site.name, host.weight(site))
    report = Report.begin(model.name_or_path or type(model).__name__, recipe.to_json(), host, plan, tokens)
    _run(host, plan, tokens, recipe, host.home, report, InMemory())
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
    host: Host, plan: Plan, tokens: Tokens | None, recipe: Recipe, home: torch.device, report: Report, store: Store
) -> None:
    """Visit the stages in order: load, collect statistics, solve, store, run on with the pruned weights, free."""
    patterns, clock = _patterns(host, plan), report.clock
    embedding = plan.sites.get(host.embedding.name)
    if embedding and not store.has(host.embedding):
        _prune_sites(host, _unfed(embedding), patterns, recipe, report)
        store.keep(host.embedding, embedding)
    stages = [] if all(store.has(stage) for stage in plan.stages) else plan.stages
    with _lanes(host, plan, tokens, recipe, home) as lanes, Progress(len(stages), "pruning", "block") as bar:
        collector = _collector(lanes, host, recipe)
        for index, stage in enumerate(stages):
            if store.has(stage):
                with clock.phase("recall"):
                    store.recall(stage)
            else:
                with clock.phase("load"):
                    host.load(stage)
                sites = plan.sites.get(stage.name, [])
                groups = _timed(collector.groups(index, sites), clock) if collector else _unfed(sites)
                _prune_sites(host, groups, patterns, recipe, report)
                with clock.phase("write"):
                    store.keep(stage, sites)
            if lanes and index + 1 < len(plan.stages):
                with clock.phase("forward"):
                    lanes.advance(index)
            host.free(stage)
            bar.step()
    report.close(plan, collector.most_runs if collector else 0)


def _lanes(
    host: Host, plan: Plan, tokens: Tokens | None, recipe: Recipe, home: torch.device
) -> AbstractContextManager[Lanes | None]:
    if tokens is None:
        return nullcontext()
    longest = max(len(row) for row in tokens.rows)
    size = recipe.batch_size or batch_size(longest, host.config, host.dtype, host.place)
    return Lanes(host.model, plan.stages, batches(tokens, size), home, host.device_of)


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
