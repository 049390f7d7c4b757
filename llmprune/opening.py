"""What happens before the first result of a model on disk: open it, check all that can be, draw the tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from llmprune.budget import Chooser
from llmprune.calibration import Tokens
from llmprune.checkpoint import Source
from llmprune.checkpoint.compressed import least_sparsity
from llmprune.checkpoint.place import require_places
from llmprune.errors import RecipeError
from llmprune.locate import locate
from llmprune.model import Streamed, load_tokenizer
from llmprune.model.memory import home_device
from llmprune.model.streamed import stored_dtype
from llmprune.planning import Plan, draw_tokens, make_plan, warn_of_small_share
from llmprune.recipe import Recipe
from llmprune.team.team import Team


@dataclass(frozen=True)
class Output:
    """What `prune` is told of its output folders."""

    overwrite: bool = False
    resume: bool = False
    compressed: bool = False


@dataclass(frozen=True)
class Opened:
    """What all results of a model have in common.

    Attributes:
        name: the model's, as the user gave it.
        source: its files.
        host: the model, of which nothing is loaded yet.
        plans: for each output folder the stages and their sites.
        tokens: the calibration tokens; None where no method needs them.
        home: device on which hidden states wait between stages.
        chooser: chooses the sites' patterns.
    """

    name: str
    source: Source
    host: Streamed
    plans: dict[Path, Plan]
    tokens: Tokens | None
    home: torch.device
    chooser: Chooser


def open_model(model: str | Path, recipes: Mapping[Path, Recipe], widest: Recipe, output: Output, team: Team) -> Opened:
    """Open a model, once all that can be checked has been for every output folder.

    Args:
        recipes: for each output folder.
        widest: the one of them whose calibration serves all.

    Raises:
        LlmpruneError: as `llmprune.prune`.
    """
    source = Source.open(locate(model, widest.revision))
    if team.leads:
        require_places(source, list(recipes), output.overwrite, output.resume, output.compressed)
    host = Streamed(source, widest.place(), widest.compute_dtype(), widest.trust_remote_code)
    plans = {out: make_plan(host, recipe) for out, recipe in recipes.items()}
    if output.compressed:
        for recipe in recipes.values():
            _require_zeros_enough(recipe, stored_dtype(source).itemsize)
    tokens = draw_tokens(host, widest, lambda: load_tokenizer(source.folder, widest.trust_remote_code))
    warn_of_small_share(next(iter(plans.values())), widest)
    rows = team.share(tokens.rows) * (2 if widest.dense_stream else 1) if tokens else []
    home = home_device(widest.place(), rows, host.config, host.dtype)
    chooser = Chooser(team, host, tokens, home, list(recipes.values()))
    return Opened(str(model), source, host, plans, tokens, home, chooser)


def _require_zeros_enough(recipe: Recipe, size: int) -> None:
    """Refuse to compress what would not become smaller: a bit for each weight has to be saved first."""
    if recipe.target().sparsity <= least_sparsity(size):
        raise RecipeError(
            f"{recipe.pattern} leaves too few zeros for a compressed output to be smaller, which takes more than "
            f"{least_sparsity(size):.1%}: leave out --compressed"
        )
