"""`llmprune sensitivity`."""

from pathlib import Path
from typing import Any

import click

from llmprune.commands.shared import given, imports, json_option, show, where


@click.command()
@click.argument("model")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for JSON and a page; a stopped run goes on there.")
@click.option("--sparsities", metavar="SHARE,...", help="[default: 0.3,0.5,0.7]")
@click.option("--method", help="[default: magnitude]")
@click.option("--data", metavar="SPEC", help="What to measure on, as for eval.")
@click.option("--windows", type=int, help="Windows to measure on  [default: 32]")
@click.option("--length", type=int, help="Tokens a window  [default: 2048, at most the model's context]")
@click.option("--calibration", metavar="SPEC", help="As for prune, for methods that need it.")
@click.option("--samples", type=int, help="Calibration sequences  [default: 128]")
@click.option("--seed", type=int, help="[default: 0]")
@where
@json_option
def sensitivity(model: str, sparsities: str | None, as_json: bool, **options: Any) -> None:
    """Show how much each block and each kind of matrix of MODEL minds being pruned alone."""
    with imports():
        from llmprune_eval.sensitivity import sensitivity as run

    chosen = given(options)
    if sparsities is not None:
        chosen["sparsities"] = _shares(sparsities)
    show(run(model, **chosen), as_json)


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(_share(part.strip()) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"'{text}' must read like 0.3,0.5 or 30%,50%", param_hint="--sparsities") from None


def _share(text: str) -> float:
    return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
