"""Prune a model: check everything, set up the run, let it run, and let its result appear."""

import logging
from pathlib import Path
from typing import Any

from llmprune.checkpoint import Sink, Source
from llmprune.checkpoint.place import require_place
from llmprune.determinism import repeatable
from llmprune.errors import RecipeError
from llmprune.locate import locate
from llmprune.model import Resident, Streamed, load_tokenizer
from llmprune.model.memory import home_device, out_of_memory_in
from llmprune.model.originals import require_in_memory
from llmprune.model.sites import require_finite
from llmprune.planning import Plan, draw_tokens, make_plan
from llmprune.recipe import Recipe
from llmprune.report import Report, hardware, versions
from llmprune.run import Run
from llmprune.statistics import Gradient
from llmprune.storing import InMemory, OnDisk

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
    plan = make_plan(host, recipe)
    tokens = draw_tokens(host, recipe, lambda: load_tokenizer(source.folder, recipe.trust_remote_code))
    _warn_of_small_share(plan, recipe)
    report = Report.begin(str(model), recipe.to_json(), host, plan, tokens)
    report.notes.extend(host.notes())
    rows = tokens.rows * (2 if recipe.dense_target else 1) if tokens else []
    home = home_device(recipe.place(), rows, host.config, host.dtype)
    with Sink(source, out, _fingerprint(source, report), resume) as sink:
        with report.clock.phase("load"), out_of_memory_in("what surrounds the blocks"):
            host.open(home)
        with report.clock.phase("copy"):
            sink.copy_source()
        Run(host, plan, tokens, recipe, home, report, OnDisk(host, sink, report)).prune()
        sink.commit(report.to_json())
    report.out = out
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
    plan = make_plan(host, recipe)
    tokens = draw_tokens(host, recipe, lambda: tokenizer)
    _warn_of_small_share(plan, recipe)
    if recipe.dense_target:
        require_in_memory(plan.all_sites())
    for site in plan.all_sites():
        require_finite(site.name, host.weight(site))
    report = Report.begin(model.name_or_path or type(model).__name__, recipe.to_json(), host, plan, tokens)
    store = InMemory(host, report, once=bool(recipe.dense_target) or recipe.needs is Gradient)
    try:
        Run(host, plan, tokens, recipe, host.home, report, store).prune()
    except BaseException:
        store.go_back()  # every block is as it was, or pruned
        raise
    return report


def _warn_of_small_share(plan: Plan, recipe: Recipe) -> None:
    """A model of which most stays dense should not be called pruned without a word, unless that was asked for."""
    if plan.coverage < _SMALL_SHARE and not recipe.exclude:
        _log.warning(
            "only %.1f%% of the parameters beside embeddings are in matrices to prune: `left_dense` of the report "
            "tells what stays dense and why",
            100 * plan.coverage,
        )
