"""`llmprune bench`."""

from pathlib import Path
from typing import Any

import click

from llmprune.commands.shared import given, json_option, of_model, show


@click.command()
@click.argument("model")
@click.option("--prompt-tokens", type=int, help="Of each sequence  [default: 512, or what the context leaves]")
@click.option("--new-tokens", type=int, default=32, show_default=True)
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences at a time.")
@click.option("--rounds", type=int, default=5, show_default=True)
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.svg", help="Draw the speeds into a file.")
@of_model
@json_option
def bench(model: str, plot: Path | None, as_json: bool, **options: Any) -> None:
    """Compare MODEL on the CPU dense and sparse: tokens a second, memory, and the kernel that runs for each shape."""
    from llmprune.sparse.bench import bench as run

    measured = run(model, **given(options))
    if plot is not None:
        plot.write_text(measured.plot(), "utf-8")
    show(measured, as_json)
