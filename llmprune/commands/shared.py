"""Options that several commands have, and how a result is printed."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def options(*bundled: Callable[[F], F]) -> Callable[[F], F]:
    """Bundle options that several commands share."""

    def decorate(command: F) -> F:
        for option in reversed(bundled):
            command = option(command)
        return command

    return decorate


where = options(
    click.option("--device", help="auto, cpu, cuda, cuda:1, ...  [default: auto]"),
    click.option("--dtype", help="auto (as stored), float32, float16, bfloat16  [default: auto]"),
    click.option("--batch-size", type=int, help="Sequences a forward  [default: sized to the memory]"),
)
of_model = options(
    click.option("--revision", help="Branch, tag or commit of a Hub model."),
    click.option("--trust-remote-code", is_flag=True, default=None, help="Run code that comes with the model."),
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the user gave, so that defaults stay those of the Python function."""
    return {name: value for name, value in values.items() if value is not None and value != ()}


def show(result: Any, as_json: bool) -> None:
    """Print a result as text, or as one JSON object."""
    if as_json:
        print_json(result.to_json())
    else:
        click.echo(str(result))


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on a line."""
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))
