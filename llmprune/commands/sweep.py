"""`llmprune sweep`."""

from pathlib import Path
from typing import Any

import click

from llmprune.commands.shared import given, imports, json_option, of_model, show, where


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--methods", required=True, metavar="NAME,...", help="As --method of prune.")
@click.option("--patterns", required=True, metavar="PATTERN,...", help="As --pattern of prune: N:M keeps N of M.")
@click.option("--data", metavar="SPEC", help="What to measure on, as for eval.")
@click.option("--length", type=int, help="Tokens a window and a calibration sequence.")
@click.option("--windows", type=int, help="Only the first windows, for a quick look.")
@click.option("--streamed/--in-memory", default=None, help="Measure with one block at a time in memory.")
@click.option("--calibration", metavar="SPEC", help="As for prune.")
@click.option("--samples", type=int, help="Calibration sequences  [default: 128]")
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--separate", is_flag=True, help="A calibration pass for each, through its own pruned blocks.")
@click.option("--speed/--no-speed", default=True, help="Measure how fast each decodes on the CPU  [default: do]")
@where
@of_model
@json_option
def sweep(model: str, out: Path, methods: str, patterns: str, as_json: bool, **options: Any) -> None:
    """Prune MODEL by every method to every pattern from one calibration pass, below OUT, and measure each.

    The pass goes through the dense model; with --separate each result sees what its own pruned blocks put out.
    """
    with imports():
        from llmprune_eval.sweep import sweep as run

    show(run(model, out, methods=_parts(methods), patterns=_parts(patterns), **given(options)), as_json)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]
