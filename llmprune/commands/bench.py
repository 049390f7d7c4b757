"""`llmprune bench`."""

from typing import Any

import click

from llmprune.commands.shared import given, json_option, of_model, show


@click.command()
@click.argument("model")
@click.option("--prompt-tokens", type=int, default=512, show_default=True)
@click.option("--new-tokens", type=int, default=32, show_default=True)
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences at a time.")
@click.option("--rounds", type=int, default=5, show_default=True)
@of_model
@json_option
def bench(model: str, as_json: bool, **options: Any) -> None:
    """Compare MODEL on the CPU dense and sparse: tokens a second, memory, and the kernel that runs for each shape."""
    from llmprune.sparse.bench import bench as run

    show(run(model, **given(options)), as_json)
