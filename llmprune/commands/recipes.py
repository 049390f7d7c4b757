"""`llmprune recipes`."""

import click

from llmprune.commands.shared import json_option, print_json


@click.command()
@json_option
def recipes(as_json: bool) -> None:
    """Print each preset in full, as the recipe file that does the same."""
    from llmprune.presets import as_yaml, in_full

    if as_json:
        print_json(in_full())
    else:
        click.echo(as_yaml(), nl=False)
