"""`llmprune plan`."""

from typing import Any

import click

from llmprune.commands.shared import imports, json_option, of_model, recipe_options, show, what, where


@click.command()
@click.argument("model")
@what
@where
@of_model
@click.option("--ranks", type=int, default=1, help="Processes that share the work, as under torchrun  [default: 1]")
@json_option
def plan(model: str, recipe: str | None, ranks: int, as_json: bool, **options: Any) -> None:
    """Show what pruning MODEL would do and need: matrices, memory, disk, time.

    No weights are loaded: a config.json is enough.
    """
    with imports():
        from llmprune.preview import plan as run

    show(run(model, ranks=ranks, **recipe_options(recipe, options)), as_json)
