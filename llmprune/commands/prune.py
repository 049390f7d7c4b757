"""`llmprune prune`."""

from pathlib import Path
from typing import Any

import click

from llmprune.commands.shared import json_option, of_model, print_json, recipe_options, what, where


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
    from llmprune.pruning import prune as run

    output = {"overwrite": overwrite, "resume": resume, "compressed": compressed}
    report = run(model, out, **output, **recipe_options(recipe, options))
    if as_json:
        print_json({"out": str(out), **report.to_json()})
    else:
        click.echo(f"{report}\n  written to    {out}")
