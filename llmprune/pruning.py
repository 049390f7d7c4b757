"""Prune a model: check everything, set up the run, let it run, and let its result appear."""

from pathlib import Path
from typing import Any, overload

from llmprune.apart import prune_apart, run_of
from llmprune.branch import Branch
from llmprune.budget import Chooser
from llmprune.determinism import repeatable
from llmprune.errors import RecipeError
from llmprune.model import Resident
from llmprune.model.originals import require_in_memory
from llmprune.model.sites import require_finite
from llmprune.opening import Output
from llmprune.options import current, host_by_default
from llmprune.planning import draw_tokens, make_plan, warn_of_small_share
from llmprune.recipe import Recipe
from llmprune.report import Report
from llmprune.several import prune_patterns
from llmprune.statistics import Gradient
from llmprune.storing import InMemory
from llmprune.team.joining import joined
from llmprune.team.team import Team


@overload
def prune(
    model: Any,
    out: str | Path | None = None,
    *,
    pattern: str | float = ...,
    tokenizer: Any = None,
    overwrite: bool = False,
    resume: bool = False,
    compressed: bool = False,
    **options: Any,
) -> Report: ...


@overload
def prune(
    model: str | Path,
    out: str | Path,
    *,
    pattern: list[str] | tuple[str, ...],
    overwrite: bool = False,
    resume: bool = False,
    compressed: bool = False,
    **options: Any,
) -> list[Report]: ...


def prune(
    model: Any,
    out: str | Path | None = None,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    resume: bool = False,
    compressed: bool = False,
    **options: Any,
) -> Report | list[Report]:
    """Prune a causal language model.

    Args:
        model: a folder, a Hub id or `demo`: streamed block by block into the folder `out`. Or a loaded
            `PreTrainedModel`: pruned in place, where its blocks lie.
        out: the output folder; loads with plain `AutoModelForCausalLM.from_pretrained`.
        tokenizer: for a loaded model and calibration text.
        overwrite: replace `out` if it is a model folder, and give up an unfinished run.
        resume: continue an unfinished run at `out`, if there is one, where it was interrupted.
        compressed: write what `llmprune compress` would make of the output; transformers loads it after
            `import llmprune`.
        options: the fields of `llmprune.Recipe`. A list of several as `pattern` prunes a model on disk to each of them,
            into folders below `out` that are named after them: `50%` into `out/50%`, `2:4` into `out/2of4`. One
            calibration pass through the dense model serves them all; with what has each see its own pruned blocks, as
            presets do, or needs a pass for each, they are pruned one after another, as by runs of their own.

    Returns:
        the report, or a list of them for a list of patterns.

    Raises:
        LlmpruneError: one of its kinds, before any work wherever that is possible; `out` then does not exist. Once a
            block is done, what is done is kept for `resume`.
    """
    output = Output(overwrite, resume, compressed)
    if isinstance(options.get("pattern"), list | tuple):
        return _prune_several(model, out, tokenizer, output, options)
    recipe = Recipe.of(options)
    with joined() as team, repeatable(recipe.deterministic), host_by_default():
        return _prune(model, out, tokenizer, recipe, output, team)


def _prune_several(
    model: Any, out: str | Path | None, tokenizer: Any, output: Output, options: dict[str, Any]
) -> list[Report]:
    if not isinstance(model, str | Path) or out is None:
        raise RecipeError("several patterns need a model on disk and an output folder: prune('org/model', 'out', ...)")
    _require_no_tokenizer(tokenizer)
    others = {name: value for name, value in options.items() if name != "pattern"}
    return prune_patterns(model, Path(out), options["pattern"], output, others)


def _require_no_tokenizer(tokenizer: Any) -> None:
    if tokenizer is not None:
        raise RecipeError("a tokenizer goes with a loaded model: one on disk has its own")


def _prune(model: Any, out: str | Path | None, tokenizer: Any, recipe: Recipe, output: Output, team: Team) -> Report:
    if not isinstance(model, str | Path):
        if team.size > 1:
            raise RecipeError("a loaded model is pruned by one process: save it, and prune its folder")
        if out is not None or output != Output():
            raise RecipeError("a loaded model is pruned in place: leave out `out`, and call save_pretrained afterwards")
        return _prune_in_place(model, tokenizer, recipe)
    _require_no_tokenizer(tokenizer)
    if out is None:
        raise RecipeError("an output folder is needed: prune(model, out, ...)")
    place = Path(out)
    return prune_apart(model, {place: recipe.for_model(model)}, output, team)[place]


def _prune_in_place(model: Any, tokenizer: Any, recipe: Recipe) -> Report:
    recipe.require_in_place()
    host = Resident(model)
    plan = make_plan(host, recipe)
    tokens = draw_tokens(host, recipe, lambda: tokenizer)
    warn_of_small_share(plan, recipe)
    if recipe.dense_stream:
        require_in_memory(plan.all_sites())
    for site in plan.all_sites():
        require_finite(site.name, host.weight(site))
    report = Report.begin(model.name_or_path or type(model).__name__, recipe.to_json(), host, plan, tokens)
    store = InMemory(host, report, once=recipe.dense_stream or recipe.needs is Gradient)
    branch = Branch(recipe, plan, report, store, host.weight)
    chooser = Chooser(branch.team, host, tokens, host.home, [recipe])
    try:
        with current(host.device):
            run_of(recipe).of(branch, host, tokens, host.home, chooser).prune()
    except BaseException:
        store.go_back()  # every block is as it was, or pruned
        raise
    return report
