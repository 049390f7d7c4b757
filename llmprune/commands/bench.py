"""`llmprune bench`."""

from pathlib import Path
from typing import Any

import click

from llmprune.commands.shared import given, imports, json_option, of_model, show


@click.command()
@click.argument("model")
@click.option("--prompt-tokens", type=int, help="Of each sequence  [default: 512, or what the context leaves]")
@click.option("--new-tokens", type=int, default=32, show_default=True)
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences at a time.")
@click.option("--rounds", type=int, default=5, show_default=True)
@click.option("--device", help="auto, cpu, cuda, cuda:1, ...  [default: auto]")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.svg", help="Draw the speeds into a file.")
@click.option("--save", is_flag=True, help="Add the figures to the llmprune.json of the output folder MODEL.")
@of_model
@json_option
def bench(model: str, plot: Path | None, save: bool, as_json: bool, **options: Any) -> None:
    """Compare MODEL dense and sparse: tokens a second, memory, and the kernel that runs for each shape."""
    with imports():
        from llmprune.runs import add_speed, replace_text, require_file, require_output
        from llmprune.sparse.bench import bench as run

    if save:
        require_output(model)
    if plot is not None:
        require_file(plot, ".svg")
    found = run(model, **given(options))
    if plot is not None:
        replace_text(plot, found.plot())
    if save:
        add_speed(model, found.to_json())
    show(found, as_json)
