"""Options that several commands have, and how a result is printed."""

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pkgutil import iter_modules
from typing import Any, TypeVar

import click

from llmprune.errors import RecipeError

# The names of the files, as importing `llmprune.methods` takes torch.
METHODS = ", ".join(sorted(method.name for method in iter_modules([str(files("llmprune") / "methods")])))

F = TypeVar("F", bound=Callable[..., Any])


def share_or_auto(text: str) -> float | str:
    """Read a number, or the word `auto`; which numbers are allowed is checked with the recipe."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise click.BadParameter(f"'{text}' is neither a number nor 'auto'") from None


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
what = options(
    click.option(
        "--preset",
        help="fast, balanced or best: see `llmprune recipes`; other options win over it, "
        "and what their method or pattern cannot use is left out.",
    ),
    click.option("--method", help=f"{METHODS}  [default: sparsegpt]"),
    click.option(
        "--pattern",
        help="50% or 0.5 (unstructured), or N:M: N KEPT of every M; of prune, several with commas make OUT/50%, OUT/2of4, "
        "..., in one calibration pass through the dense model, or with presets and the like one after another  "
        "[default: 50%]",
    ),
    click.option(
        "--comparison-group", help="Compare per row, layer, block (128 columns) or model  [default: the paper's]"
    ),
    click.option("--method-option", multiple=True, metavar="NAME=VALUE", help="Hyper-parameter, e.g. damp=0.1."),
    click.option(
        "--calibration", metavar="SPEC", help="c4, wikitext2, ptb, demo, a Hub data set, or a file  [default: c4]"
    ),
    click.option("--samples", type=int, help="Calibration sequences  [default: 128]"),
    click.option("--length", type=int, help="Tokens a sequence  [default: 2048, at most the model's context]"),
    click.option("--seed", type=int, help="[default: 0]"),
    click.option(
        "--true-sequential", is_flag=True, default=None, help="Let each site see the block's earlier ones pruned."
    ),
    click.option(
        "--dense-target",
        type=share_or_auto,
        metavar="SHARE",
        help="Share of the dense model's outputs to fit to, 0 to 1, or auto: by the tokens for each input  [default: 0]",
    ),
    click.option("--tune-epochs", type=int, help="Passes to tune what survives of each pruned block  [default: 0]"),
    click.option("--tune-rate", type=float, help="Step size of that, relative to the weights  [default: 0.2]"),
    click.option(
        "--allocation",
        metavar="WAY",
        help="Share a sparsity out over matrices: uniform, owl, error or fisher (finest), or by the curves in the "
        "sensitivity.json that `llmprune sensitivity MODEL --out FOLDER` writes  [default: uniform]",
    ),
    click.option(
        "--allocation-range", type=float, metavar="SHARE", help="How far a matrix may deviate  [default: 0.15]"
    ),
    click.option(
        "--sparsity", multiple=True, metavar="GLOB=SHARE", help="Of these matrices, e.g. '*.down_proj.*=40%'."
    ),
    click.option(
        "--autocast", is_flag=True, default=None, help="Calibrate float32 models in bfloat16 where that is faster."
    ),
    click.option("--deterministic", is_flag=True, default=None, help="Use only operations that repeat to the bit."),
    click.option("--include", multiple=True, metavar="GLOB", help="Prune these tensors too, e.g. lm_head.weight."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these tensors dense, e.g. '*.0.mlp.*'."),
    click.option("--recipe", type=click.Path(), metavar="FILE.yaml", help="Options in a file; the command line wins."),
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


@contextmanager
def imports() -> Iterator[None]:
    """Import torch and transformers, whose objects stay for good, without the search for garbage among them."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the user gave, so that defaults stay those of the Python function."""
    return {name: value for name, value in values.items() if value is not None and value != ()}


def recipe_options(recipe: str | None, values: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a recipe file, overruled by those of the command line."""
    from llmprune.recipefiles import read_recipe

    asked = given(values)
    if "method_option" in asked:
        asked["method_options"] = _pairs("method-option", asked.pop("method_option"), "damp=0.1")
    if "sparsity" in asked:
        asked["sparsities"] = _pairs("sparsity", asked.pop("sparsity"), "*.down_proj.*=40%")
    in_file = read_recipe(recipe) if recipe else {}
    if "method_options" in asked:
        asked["method_options"] = in_file.get("method_options", {}) | asked["method_options"]
    return in_file | asked


def _pairs(option: str, texts: tuple[str, ...], example: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, value = _pair(option, text, example)
        if name in pairs:
            raise RecipeError(f"--{option} '{name}' is given twice, as {pairs[name]} and {value}: leave one out")
        pairs[name] = value
    return pairs


def _pair(option: str, text: str, example: str) -> tuple[str, str]:
    name, equals, value = text.rpartition("=") if option == "sparsity" else text.partition("=")
    if not equals:
        raise RecipeError(f"--{option} '{text}' must read NAME=VALUE, for example {example}")
    return name, value


def show(result: Any, as_json: bool) -> None:
    """Print a result as text, or as one JSON object."""
    if as_json:
        print_json(result.to_json())
    else:
        click.echo(str(result))


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on a line."""
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))
