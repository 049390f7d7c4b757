"""The command line: `llmprune prune`, `eval`, `inspect`, and the commands of `llmprune.sparse`.

Every option is a field of `llmprune.Recipe` or a parameter of the Python function of the same name. Errors are one
line on stderr and exit status 2; with `--json`, stdout holds one JSON object and nothing else.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from llmprune.errors import LlmpruneError, RecipeError
from llmprune.sparse import commands

F = TypeVar("F", bound=Callable[..., Any])


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Bundle options that several commands share."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_where = _options(
    click.option("--device", help="auto, cpu, cuda, cuda:1, ...  [default: auto]"),
    click.option("--dtype", help="auto (as stored), float32, float16, bfloat16  [default: auto]"),
    click.option("--batch-size", type=int, help="Sequences a forward  [default: sized to the memory]"),
)
_model = _options(
    click.option("--revision", help="Branch, tag or commit of a Hub model."),
    click.option("--trust-remote-code", is_flag=True, default=None, help="Run code that comes with the model."),
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="llmprune", message="%(version)s")
def cli() -> None:
    """Prune Hugging Face causal language models, and prove how good they still are.

    MODEL is a folder, a Hub id such as org/name, or the word demo: a small trained model that comes with llmprune
    and needs no network.
    """


@cli.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--method", help="magnitude, random, sparsegpt, wanda  [default: sparsegpt]")
@click.option("--pattern", help="50% or 0.5 (unstructured), or N:M: N KEPT of every M  [default: 50%]")
@click.option("--comparison-group", help="Compare per row, layer, block (128 columns) or model  [default: the paper's]")
@click.option("--method-option", multiple=True, metavar="NAME=VALUE", help="Hyper-parameter, e.g. damp=0.1.")
@click.option(
    "--calibration", metavar="SPEC", help="c4, wikitext2, ptb, demo, a Hub data set, or a file  [default: c4]"
)
@click.option("--samples", type=int, help="Calibration sequences  [default: 128]")
@click.option("--length", type=int, help="Tokens a sequence  [default: 2048, at most the model's context]")
@click.option("--seed", type=int, help="[default: 0]")
@click.option(
    "--true-sequential", is_flag=True, default=None, help="Let each site see the block's earlier ones pruned."
)
@click.option("--include", multiple=True, metavar="GLOB", help="Prune these tensors too, e.g. lm_head.weight.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these tensors dense, e.g. '*.0.mlp.*'.")
@click.option("--recipe", type=click.Path(), metavar="FILE.yaml", help="Options in a file; the command line wins.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a model folder.")
@_where
@_model
@_json
def prune(model: str, out: Path, recipe: str | None, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Prune MODEL into the folder OUT, one block in memory at a time."""
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    if "method_option" in given:
        given["method_options"] = dict(_name_and_value(text) for text in given.pop("method_option"))
    from llmprune.pruning import prune as run
    from llmprune.recipe import read_recipe

    in_file = read_recipe(recipe) if recipe else {}
    if "method_options" in given:
        given["method_options"] = (in_file.get("method_options") or {}) | given["method_options"]
    report = run(model, out, overwrite=overwrite, **(in_file | given))
    if as_json:
        _print_json({"out": str(out), **report.to_json()})
    else:
        click.echo(f"{report}\n  written to    {out}")


@cli.command(name="eval")
@click.argument("model")
@click.option(
    "--data", metavar="SPEC", help="wikitext2, c4, ptb, demo, a Hub data set, or a file  [default: wikitext2]"
)
@click.option("--length", type=int, help="Tokens a window  [default: 2048, at most the model's context]")
@_where
@_model
@_json
def evaluate(model: str, as_json: bool, **options: Any) -> None:
    """Measure the perplexity of MODEL by the papers' convention."""
    from llmprune_eval.perplexity import evaluate as run

    _show(run(model, **{name: value for name, value in options.items() if value is not None}), as_json)


@cli.command()
@click.argument("model")
@_model
@_json
def inspect(model: str, as_json: bool, **options: Any) -> None:
    """Show the zeros of every tensor of MODEL and which N:M it truly satisfies; exit 1 if llmprune.json lies."""
    from llmprune.inspection import inspect as run

    inspection = run(model, **{name: value for name, value in options.items() if value is not None})
    _show(inspection, as_json)
    if inspection.verified is False:
        sys.exit(1)


for command in commands.COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Run the command line; errors become one line and status 2."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except (LlmpruneError, click.ClickException) as error:
        _fail(error.format_message() if isinstance(error, click.ClickException) else str(error))
    except (KeyboardInterrupt, click.Abort) as error:
        click.echo("llmprune: interrupted, nothing was written", err=True)
        sys.exit(143 if error.args == (signal.SIGTERM,) else 130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:  # a full disk, a name too long: the system's own words, without a traceback
        _fail(f"{error.filename or 'output'}: {error.strerror or error}")


def _fail(message: str) -> NoReturn:
    click.echo(f"llmprune: {' '.join(message.split())}", err=True)
    sys.exit(2)


def _stop(number: int, frame: object) -> None:
    """End as Ctrl-C does, so that nothing half-written is left."""
    raise KeyboardInterrupt(signal.SIGTERM)


def _name_and_value(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"--method-option '{text}' must read NAME=VALUE, for example damp=0.1")
    return name, value


def _show(result: Any, as_json: bool) -> None:
    if as_json:
        _print_json(result.to_json())
    else:
        click.echo(str(result))


def _print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))
