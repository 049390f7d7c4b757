"""Prune a model with several methods to several patterns, and measure each: a table, and the best for their size."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmprune.checkpoint import Source
from llmprune.errors import RecipeError
from llmprune.locate import locate
from llmprune.model import Outline
from llmprune.model.streamed import stored_dtype
from llmprune.planning import make_plan
from llmprune.pruning import prune
from llmprune.recipe import Recipe
from llmprune.runs import add_evaluations, read_run
from llmprune.team.joining import joined
from llmprune.team.team import Team
from llmprune_eval.pages import sweep_page
from llmprune_eval.perplexity import measure, read_text
from llmprune_eval.subjects import Place, Subject
from llmprune_eval.windows import Amount

RESULT, PAGE = "sweep.json", "sweep.html"


@dataclass(frozen=True)
class Row:
    """One pruned model.

    Attributes:
        left: share of all parameters that are not zero.
        seconds: of pruning.
        best: no other row has as few parameters left and a lower perplexity.
    """

    method: str
    pattern: str
    left: float
    perplexity: float
    kl_divergence: float
    top1_agreement: float
    output_error: float
    seconds: float
    out: str
    best: bool = False


@dataclass(frozen=True)
class Sweep:
    """The dense model's perplexity on `data`, and every pruned model's."""

    model: str
    data: str
    dense: float
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.model}: perplexity {self.dense:.2f} dense, on {self.data}",
            f"{'method':14}{'pattern':>8}{'left':>10}{'perplexity':>12}{'KL':>9}{'top-1':>9}{'seconds':>9}  best",
        ]
        for row in self.rows:
            lines.append(
                f"{row.method:14}{row.pattern:>8}{row.left:>10.2%}{row.perplexity:>12.2f}{row.kl_divergence:>9.4f}"
                f"{row.top1_agreement:>9.2%}{row.seconds:>9.1f}  {'*' if row.best else ''}".rstrip()
            )
        return "\n".join([*lines, "* no other has as few weights left and a lower perplexity"])


def sweep(
    model: str | Path,
    out: str | Path,
    *,
    methods: Sequence[str],
    patterns: Sequence[str],
    data: Any = None,
    length: int | None = None,
    windows: int | None = None,
    streamed: bool | None = None,
    **options: Any,
) -> Sweep:
    """Prune a model by every method to every pattern, on the same calibration tokens, and measure each.

    Args:
        out: a folder: every pruned model stays in one below it, and a sweep that was stopped goes on there.
        methods, patterns: as in `llmprune.Recipe`.
        data, length, windows, streamed: as in `llmprune.evaluate`.
        options: the other fields of `llmprune.Recipe`, for all of them.

    Raises:
        LlmpruneError: one of its kinds.
    """
    if not methods or not patterns:
        raise RecipeError("a sweep needs at least one method and one pattern")
    amount = Amount(length, windows, options.get("batch_size"))
    recipes = [options | {"method": method, "pattern": pattern} for method in methods for pattern in patterns]
    _require_feasible(model, recipes)
    with joined() as team:
        result = _measured(model, Path(out), recipes, data, amount, streamed, team)
        if team.leads:
            (Path(out) / RESULT).write_text(json.dumps(result.to_json(), indent=2) + "\n", "utf-8")
            (Path(out) / PAGE).write_text(sweep_page(result), "utf-8")
    return result


def _measured(
    model: str | Path,
    out: Path,
    recipes: Sequence[dict[str, Any]],
    data: Any,
    amount: Amount,
    streamed: bool | None,
    team: Team,
) -> Sweep:
    options = recipes[0]
    trusted = bool(options.get("trust_remote_code", False))
    place = Place.of(options.get("device", "auto"), options.get("dtype", "auto"), streamed, trusted)
    text, dense = read_text(model, data), Subject(model, place, revision=options.get("revision"))
    base = measure(dense, text, None, amount)
    rows = []
    for recipe in recipes:
        folder = out / f"{recipe['method']}-{recipe['pattern'].replace(':', 'of').replace('%', '')}"
        _prune_once(model, folder, recipe, there=team.tell(folder.exists()))
        found = measure(Subject(folder, place), text, dense, amount)
        if team.leads:
            add_evaluations(folder, [found.to_json()])
        rows.append(_row(folder, found.perplexity, found.kl_divergence or 0.0, found.top1_agreement or 0.0))
    return Sweep(str(model), base.data, base.perplexity, _marked(rows))


def _require_feasible(model: str | Path, recipes: Sequence[dict[str, Any]]) -> None:
    """Raise, before any work, what would stop one of the runs: a wrong option, a pattern that does not fit."""
    first = Recipe.of(recipes[0])
    source = Source.open(locate(model, first.revision))
    host = Outline(source.folder, source.config, torch.device("cpu"), stored_dtype(source), first.trust_remote_code)
    for recipe in recipes:
        make_plan(host, Recipe.of(recipe))


def _prune_once(model: str | Path, folder: Path, recipe: dict[str, Any], there: bool) -> None:
    """Prune into `folder`, unless it is there: then of a run with this recipe that has finished."""
    if not there:
        prune(model, folder, resume=True, **recipe)
        return
    done = read_run(folder)
    wanted = Recipe.of(recipe).for_model(model).to_json()
    if done["recipe"] != json.loads(json.dumps(wanted)) or done["model"] != str(model):
        raise RecipeError(f"{folder} is of another recipe: choose another folder for the sweep, or delete it")


def _row(folder: Path, perplexity: float, kl: float, agreement: float) -> Row:
    run = read_run(folder)
    recipe, errors = run["recipe"], [site["error"] for site in run["sites"]]
    return Row(
        method=recipe["method"],
        pattern=recipe["pattern"],
        left=1.0 - run["sparsity"]["all_parameters"],
        perplexity=perplexity,
        kl_divergence=kl,
        top1_agreement=agreement,
        output_error=sum(errors) / len(errors),
        seconds=sum(run["timings"].values()),
        out=str(folder),
    )


def _marked(rows: list[Row]) -> list[Row]:
    """Return the rows, those marked that no other row beats."""
    return [
        Row(**asdict(row) | {"best": not any(r.left <= row.left and r.perplexity < row.perplexity for r in rows)})
        for row in rows
    ]
