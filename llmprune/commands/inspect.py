"""`llmprune inspect`."""

import sys
from typing import Any

import click

from llmprune.commands.shared import given, imports, json_option, of_model, show


@click.command()
@click.argument("model")
@of_model
@json_option
def inspect(model: str, as_json: bool, **options: Any) -> None:
    """Show the zeros of every tensor of MODEL and which N:M it truly satisfies; exit 1 if llmprune.json lies."""
    with imports():
        from llmprune.inspection import inspect as run

    inspection = run(model, **given(options))
    show(inspection, as_json)
    if inspection.verified is False:
        sys.exit(1)
