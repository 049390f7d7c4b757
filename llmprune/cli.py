"""The command line: `llmprune prune`, `eval`, `inspect`, `push`.

Every option is a field of `llmprune.Recipe` or a parameter of the Python function of the same name. Errors are one
line on stderr and exit status 2; with `--json`, stdout holds one JSON object and nothing else.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from llmprune.commands.evaluate import evaluate
from llmprune.commands.push import push
from llmprune.commands.report import report
from llmprune.commands.sensitivity import sensitivity
from llmprune.commands.shared import json_option, of_model, print_json, show, where
from llmprune.commands.sweep import sweep
from llmprune.errors import LlmpruneError, RecipeError


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
@where
@of_model
@json_option
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
    result = run(model, out, overwrite=overwrite, **(in_file | given))
    if as_json:
        print_json({"out": str(out), **result.to_json()})
    else:
        click.echo(f"{result}\n  written to    {out}")


@cli.command()
@click.argument("model")
@of_model
@json_option
def inspect(model: str, as_json: bool, **options: Any) -> None:
    """Show the zeros of every tensor of MODEL and which N:M it truly satisfies; exit 1 if llmprune.json lies."""
    from llmprune.inspection import inspect as run

    inspection = run(model, **{name: value for name, value in options.items() if value is not None})
    show(inspection, as_json)
    if inspection.verified is False:
        sys.exit(1)


cli.add_command(evaluate)
cli.add_command(push)
cli.add_command(report)
cli.add_command(sensitivity)
cli.add_command(sweep)


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
