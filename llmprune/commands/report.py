"""`llmprune report`."""

from pathlib import Path

import click

from llmprune.commands.shared import json_option, print_json


@click.command()
@click.argument("outs", metavar="OUT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--to", type=click.Path(path_type=Path), help="The file to write  [OUT/report.html, or comparison.html]")
@json_option
def report(outs: tuple[Path, ...], to: Path | None, as_json: bool) -> None:
    """Show the run that wrote OUT as one HTML file, or compare several runs in one.

    Its figures also become PNG files, in a folder of the page's name: pip install 'llmprune[png]'.
    """
    from llmprune.page import png
    from llmprune.page.comparison import write_comparison
    from llmprune.page.run import write_page

    path = write_page(outs[0], to) if len(outs) == 1 else write_comparison(outs, to)
    if as_json:
        print_json({"report": str(path), "figures": str(path.with_suffix("")) if png.can_draw() else None})
        return
    click.echo(f"written to {path}")
    click.echo(f"figures in {path.with_suffix('')}" if png.can_draw() else png.MISSING)
