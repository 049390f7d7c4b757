"""`llmprune eval`."""

from pathlib import Path
from typing import Any

import click

from llmprune.commands.shared import given, imports, json_option, of_model, print_json, show, where
from llmprune.errors import RecipeError, saying_what_is_kept

_NOBODY = "none"
_OF_TEXT = ("dense", "length", "windows", "streamed", "sparse", "save", "revision")


@click.command(name="eval")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--data",
    metavar="SPEC,...",
    help="wikitext2, c4, ptb, demo, a Hub data set, or a file; several with commas  [default: wikitext2]",
)
@click.option("--dense", metavar="MODEL", help="Compare predictions with it; or none  [default: the first of several]")
@click.option("--length", type=int, help="Tokens a window  [default: 2048, at most the model's context]")
@click.option("--windows", type=int, help="Only the first windows, for a quick look.")
@click.option("--streamed/--in-memory", default=None, help="One block at a time  [default: if it does not fit]")
@click.option("--sparse", is_flag=True, default=None, help="Keep layers sparse where that is faster, on the CPU.")
@click.option("--tasks", metavar="NAME,...", help="Tasks of lm-evaluation-harness (an extra), without --data alone.")
@click.option("--include-path", metavar="FOLDER", help="Where YAML files of your own tasks are.")
@click.option("--limit", type=int, help="Examples a task, for a quick look; for text use --windows.")
@click.option("--save", is_flag=True, help="Add the figures to llmprune.json, for the report and the model card.")
@where
@of_model
@json_option
def evaluate(models: tuple[str, ...], data: str | None, tasks: str | None, as_json: bool, **options: Any) -> None:
    """Measure the perplexity of MODELs by the papers' convention, and their distance to the dense one."""
    task_options = {name: options.pop(name) for name in ("include_path", "limit")}
    results = []
    if tasks is None:
        _require_tasks(task_options)
    elif data is None:
        _require_text(options)
    else:
        _require_known(tasks, task_options["include_path"])
    if tasks is None or data is not None:
        results.append(_perplexities(models, specs(data), given(options)))
    if tasks is not None:
        for_tasks = {name: value for name, value in options.items() if name not in _OF_TEXT}
        saved = "figures on the text were added to llmprune.json" if options["save"] else ""
        with saying_what_is_kept(lambda: saved):
            results.append(_task_scores(models, tasks, given(for_tasks | task_options)))
    if as_json:
        print_json({name: value for result in results for name, value in result.to_json().items()})
    else:
        for result in results:
            show(result, as_json=False)


def specs(data: str | None) -> list[str | None]:
    """Return the texts that `--data` names; a file whose name holds a comma is one."""
    if data is None or Path(data).exists():
        return [data]
    return [part.strip() for part in data.split(",")]


def _perplexities(models: tuple[str, ...], data: list[str | None], options: dict[str, Any]) -> Any:
    with imports():
        from llmprune_eval.comparison import compare
        from llmprune_eval.perplexity import evaluate as run

    dense = options.pop("dense", None)
    if len(models) == len(data) == 1:
        return run(models[0], data[0], dense=None if dense == _NOBODY else dense, **options)
    if options.pop("revision", None) is not None:
        raise RecipeError("--revision goes with one model: give folders, or evaluate one at a time")
    return compare(models, data, dense=False if dense == _NOBODY else dense, **options)


def _task_scores(models: tuple[str, ...], tasks: str, options: dict[str, Any]) -> Any:
    with imports():
        from llmprune_eval.zeroshot import evaluate_tasks

    return evaluate_tasks(models, _names(tasks), **options)


def _require_known(tasks: str, include_path: str | None) -> None:
    """Refuse tasks that do not exist before the texts are worked on."""
    with imports():
        from llmprune_eval.zeroshot import known_tasks

    known_tasks(_names(tasks), include_path)


def _names(tasks: str) -> list[str]:
    return [task.strip() for task in tasks.split(",")]


def _require_tasks(options: dict[str, Any]) -> None:
    """Refuse options that mean nothing for text."""
    for name, value in options.items():
        if value is not None:
            advice = "; for a part of a text use --windows" if name == "limit" else ""
            raise RecipeError(f"--{name.replace('_', '-')} goes with --tasks: give --tasks too{advice}")


def _require_text(options: dict[str, Any]) -> None:
    """Refuse options that mean nothing for tasks, where there is no text to measure perplexity on."""
    for name in _OF_TEXT:
        if options.get(name):
            raise RecipeError(f"--{name} means nothing for --tasks: give --data too, or leave it out")
