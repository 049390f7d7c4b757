"""What a run will do, decided and checked before any work: which sites, which pattern; then, which tokens."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmprune import calibration, data, kernels, methods, overrides
from llmprune.allocation import Measured, Part, kind_of
from llmprune.calibration import Tokens
from llmprune.errors import DataError, PatternError, RecipeError
from llmprune.model.sites import Selection, Site, Stage, dense_parameters, is_router, outer_parameters, sites_of
from llmprune.model.ties import Ties
from llmprune.recipe import Recipe
from llmprune.statistics import Gradient

_SMALL_SHARE = 0.5  # of the parameters beside embeddings; below it a run warns that most of the model stays dense
DEFAULT_CALIBRATION = "c4"
DEFAULT_LENGTH = 2048  # the papers'

_log = logging.getLogger(__name__)


class Host(Protocol):
    """A model whose stages can be had one at a time: on disk (`Streamed`), in memory (`Resident`), or made up (`Outline`).

    Attributes:
        model: the transformers model, of which only what is loaded has weights.
        config: its configuration.
        dtype: of its weights.
        device: where stages are loaded.
        blocks, embedding, head: its stages.
    """

    model: Any
    config: Any
    dtype: torch.dtype
    device: torch.device
    blocks: list[Stage]
    embedding: Stage
    head: Stage

    def load(self, stage: Stage) -> None:
        """Bring a stage's weights into memory."""

    def free(self, stage: Stage) -> None:
        """Let go of them, unless the rest of the model shares them."""

    def keeping(self) -> AbstractContextManager[None]:
        """Return the context in which freed stages may stay in memory, as they will be loaded again, unchanged."""

    def device_of(self, stage: Stage) -> torch.device:
        """Return where a loaded stage's weights are."""

    def weight(self, site: Site) -> Tensor:
        """Return the matrix [outputs, inputs] of a site whose stage is loaded, as a view: writing to it prunes."""


@dataclass(frozen=True)
class Plan:
    """The stages that calibration visits, the sites to prune in each, and why other matrices stay dense."""

    stages: list[Stage]
    embedding: str
    head: str
    sites: dict[str, list[Site]]
    left_dense: dict[str, str]
    parameters: int  # of the whole model
    inner_parameters: int  # beside embeddings and head

    def all_sites(self) -> list[Site]:
        """Return the sites of all stages."""
        return [site for sites in self.sites.values() for site in sites]

    @property
    def coverage(self) -> float:
        """Share of the parameters beside embeddings and head that are in sites."""
        stages = self.sites.keys() - {self.embedding, self.head}
        return sum(site.numel for stage in stages for site in self.sites[stage]) / max(self.inner_parameters, 1)


def asks_autocast(host: Host, recipe: Recipe) -> bool:
    """Say whether calibration is asked to multiply in bfloat16; of models in 16 bits it does not, as they are that already."""
    return recipe.autocast and host.dtype == torch.float32


def multiplied_in(host: Host, recipe: Recipe) -> torch.dtype | None:
    """Return the dtype that calibration multiplies in, if not that of the weights."""
    asked = asks_autocast(host, recipe) and sums_inputs(recipe)
    return torch.bfloat16 if asked and kernels.multiplies_bfloat16(host.device) else None


def sums_inputs(recipe: Recipe) -> bool:
    """Say whether calibration sums up the inputs of matrices: not for methods that need none, or gradients."""
    return recipe.needs not in (None, Gradient)


def make_plan(host: Host, recipe: Recipe) -> Plan:
    """Choose the sites: the matrices of the blocks, but for routers, with what the recipe includes and excludes.

    Of tied tensors, which are one tensor under several names, only one is a site.

    Raises:
        RecipeError: nothing is left to prune, a glob matches nothing, an embedding is to be pruned by a method that
            needs to see inputs, or the sparsity is to be shared out by what was measured on another model.
        PatternError: the pattern does not fit a site.
    """
    selection = Selection(recipe.include, recipe.exclude)
    every = {stage.name: sites_of(stage) for stage in [host.embedding, *host.blocks, host.head]}
    selection.require_matches([site.tensor for sites in every.values() for site in sites])
    ends = {host.embedding.name: "embedding", host.head.name: "output head"}
    left_dense = {name: what for stage in host.blocks for name, what in dense_parameters(stage)}
    left_dense |= outer_parameters(host.model, [host.embedding, *host.blocks, host.head])
    ties = Ties(host.model.all_tied_weights_keys, ())
    chosen: dict[str, list[Site]] = {}
    taken = set[str]()
    for stage, sites in every.items():
        for site in sites:
            reason = ends.get(stage) or ("router" if is_router(site.tensor) else None)
            namesakes = [name for name in ties.names(site.tensor) if name != site.tensor]
            if other := next((name for name in namesakes if name in taken), None):
                left_dense[site.tensor] = f"one with {other}"
            elif selection.takes(site.tensor, by_default=reason is None):
                taken.add(site.tensor)
                left_dense |= {name: f"one with {site.tensor}" for name in namesakes}
                chosen.setdefault(stage, []).append(site)
            else:
                left_dense[site.tensor] = reason or "excluded"
    sites = [site for chosen_here in chosen.values() for site in chosen_here]
    _require_sense(host, recipe, chosen, sites)
    stages = [*host.blocks, host.head] if host.head.name in chosen else list(host.blocks)
    return Plan(stages, host.embedding.name, host.head.name, chosen, left_dense, *_parameters(host))


def parts_of(host: Host) -> dict[str, Part]:
    """Return where every site of the blocks belongs, by its name, but for routers: what `llmprune sensitivity` measures."""
    return {
        site.name: Part(str(index), kind_of(site.tensor), site.numel)
        for index, stage in enumerate(host.blocks)
        for site in sites_of(stage)
        if not is_router(site.tensor)
    }


def _parameters(host: Host) -> tuple[int, int]:
    """Count the parameters of the model, and those beside its embedding and its head."""
    outer = {id(p) for stage in (host.embedding, host.head) for p in stage.module.parameters()}
    counts = [(p.numel(), id(p) in outer) for p in host.model.parameters()]
    return sum(count for count, _ in counts), sum(count for count, is_outer in counts if not is_outer)


def context_length(config: Any) -> int | None:
    """Return the longest sequence a model was made for, where its configuration says so."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def window_length(asked: int | None, context: int | None) -> int:
    """Return the window length that was asked for, or the papers' 2048, or the context where that is shorter.

    Raises:
        DataError: more was asked for than the model's context.
    """
    if asked is None:
        return min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)
    if context is not None and asked > context:
        raise DataError(f"length {asked} is more than the model's context of {context} tokens: use --length {context}")
    return asked


def draw_tokens(host: Host, recipe: Recipe, tokenizer: Callable[[], Any]) -> Tokens | None:
    """Draw the calibration tokens that the method needs; `tokenizer` is called only if there is text to tokenize.

    Raises:
        DataError: the calibration data cannot be read or does not fit the model.
        RecipeError: it is too little to hold some of it out from block tuning.
    """
    if not recipe.calibrates:
        return None
    context = context_length(host.config)
    length = window_length(recipe.length, context)
    documents = data.read(DEFAULT_CALIBRATION if recipe.calibration is None else recipe.calibration, "calibration")
    reader = None if documents.kind == "input_ids" else tokenizer()
    tokens = calibration.sample(documents, reader, samples=recipe.samples, length=length, seed=recipe.seed)
    if recipe.tune_epochs and len(calibration.batches(tokens, recipe.batch_size or 1)) < 2:
        raise RecipeError(
            "tune_epochs holds out a tenth of the batches: ask for more samples, a smaller batch_size, or tune_epochs 0"
        )
    calibration.check(tokens, vocabulary=host.embedding.module.get_parameter("weight").shape[0], context=context)
    return tokens


def _require_sense(host: Host, recipe: Recipe, chosen: dict[str, list[Site]], sites: Sequence[Site]) -> None:
    """Raise what `make_plan` does for a recipe that cannot be followed in this model, whose chosen `sites` these are."""
    if not sites:
        cause = "--exclude takes every matrix away" if recipe.exclude else "the model's blocks hold no matrix"
        raise RecipeError(f"nothing is left to prune: {cause}")
    overrides.require_matches([site.tensor for site in sites], recipe.overrides, recipe.sparsities)
    if recipe.allocation_file:
        Measured.read(recipe.allocation_file).require_fit(parts_of(host).values())
    for site in chosen.get(host.embedding.name, ()):
        solver = recipe.at(site.tensor).solver()
        if solver.needs is not None:
            raise RecipeError(
                f"{site.name} is an embedding, for which {methods.name_of(solver)} has no inputs to see: use --method "
                "magnitude, or do not include it"
            )
    for site in sites:
        if why := recipe.at(site.tensor).target().misfit(*site.shape):
            raise PatternError(f"{site.name} {why}: use a pattern such as 50%, or --exclude '{site.name}'")


def warn_of_small_share(plan: Plan, recipe: Recipe) -> None:
    """Warn where most of the model stays dense, unless the recipe excludes matrices."""
    if plan.coverage < _SMALL_SHARE and not recipe.exclude:
        _log.warning(
            "only %.1f%% of the parameters beside embeddings are in matrices to prune: `left_dense` of the report "
            "tells what stays dense and why",
            100 * plan.coverage,
        )
