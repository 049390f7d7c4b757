"""`llmprune prune`."""

from pathlib import Path
from typing import Any

import click

from llmprune.commands.shared import imports, json_option, of_model, print_json, recipe_options, what, where


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@what
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a model folder; give up an unfinished run.")
@click.option("--resume", is_flag=True, help="Continue an unfinished run at OUT, if there is one.")
@click.option("--compressed", is_flag=True, help="Write OUT without its zeros, as `llmprune compress` does.")
@where
@of_model
@json_option
def prune(
    model: str,
    out: Path,
    recipe: str | None,
    overwrite: bool,
    resume: bool,
    compressed: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Prune MODEL into the folder OUT, one block in memory at a time."""
    with imports():
        from llmprune.pruning import prune as run

    chosen = recipe_options(recipe, options)
    output = {"overwrite": overwrite, "resume": resume, "compressed": compressed}
    if "," in str(pattern := chosen.get("pattern", "")) or isinstance(pattern, list):
        several(model, out, output, as_json, chosen)
        return
    report = run(model, out, **output, **chosen)
    if as_json:
        print_json({"out": str(out), **report.to_json()})
    else:
        click.echo(f"{report}\n  written to    {out}")


def several(model: str, out: Path, output: dict[str, bool], as_json: bool, options: dict[str, Any]) -> None:
    """Prune to several patterns, each into a folder of its own below OUT."""
    with imports():
        from llmprune.pruning import prune as run
        from llmprune.several import summary

    pattern = options.pop("pattern")
    patterns = pattern if isinstance(pattern, list) else [part.strip() for part in pattern.split(",") if part.strip()]
    reports = run(model, out, pattern=patterns, **output, **options)
    if as_json:
        print_json({"results": [{"out": str(report.out), **report.to_json()} for report in reports]})
    else:
        click.echo(summary(reports))
