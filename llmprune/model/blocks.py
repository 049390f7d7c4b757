"""Where the decoder blocks of a model are, and what comes before and after them."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from llmprune.errors import UnsupportedModelError
from llmprune.model.sites import Stage

# Towers of multimodal models: their blocks see no text.
_OTHER_TOWERS = re.compile(r"vision|visual|image|audio|speech|embed_tokens_extend")

# Models that run their blocks more than once in one forward: what a block is fed is not settled when it is pruned.
_LOOPING = {"hrm_text"}


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the decoder blocks and their name, such as `model.layers`.

    They are the largest outermost ModuleList of the model's text decoder.

    Raises:
        UnsupportedModelError: there is no such list, its blocks are only a part of each layer, or they are run
            several times.
    """
    names = {id(module): name for name, module in model.named_modules()}
    decoder = _decoder(model)
    lists = {names[id(found)]: found for found in _outermost_lists(decoder)}
    blocks = {name: found for name, found in lists.items() if not _OTHER_TOWERS.search(name)}
    if not blocks:
        raise UnsupportedModelError(_nothing_found(model, names[id(decoder)], decoder, list(lists)))
    largest = max(blocks, key=lambda name: _parameters(blocks[name]))
    _require_whole(type(model).__name__, largest, blocks)
    _require_one_visit(model, largest)
    return largest, blocks[largest]


class Stages(NamedTuple):
    """The stages of a model: its blocks, with their common name, and what comes before and after them."""

    blocks_name: str
    blocks: list[Stage]
    embedding: Stage
    head: Stage


def find_stages(model: Any) -> Stages:
    """Return the stages of a model.

    Raises:
        UnsupportedModelError: as `find_blocks` and `find_ends` do.
    """
    name, blocks = find_blocks(model)
    return Stages(name, [Stage(f"{name}.{index}", block) for index, block in enumerate(blocks)], *find_ends(model))


def find_ends(model: Any) -> tuple[Stage, Stage]:
    """Return the input embedding and the output head.

    Raises:
        UnsupportedModelError: the model has no output head.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no input embedding or no output head")
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    return Stage(names[id(embedding)], embedding), Stage(names[id(head)], head)


def _decoder(model: nn.Module) -> nn.Module:
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else None
    return decoder if isinstance(decoder, nn.Module) and any(_outermost_lists(decoder)) else model


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _nothing_found(model: nn.Module, name: str, decoder: nn.Module, towers: list[str]) -> str:
    where = f"in {name}" if name else "anywhere in it"
    parts = ", ".join(f"{part} ({type(module).__name__})" for part, module in decoder.named_children()) or "no parts"
    passed = f"; passed over as no text decoder: {', '.join(towers)}" if towers else ""
    return (
        f"{type(model).__name__}: found no list of decoder blocks (a torch ModuleList) {where}; "
        f"looked at {parts}{passed}"
    )


def _require_whole(model: str, name: str, lists: dict[str, nn.ModuleList]) -> None:
    """Refuse models such as XLM, which keep the attentions and the MLPs of their layers in separate lists."""
    parent, blocks = name.rpartition(".")[0], lists[name]
    for other, found in lists.items():
        beside = other != name and other.rpartition(".")[0] == parent and len(found) == len(blocks)
        if beside and any(isinstance(module, nn.Linear) for module in found.modules()):
            raise UnsupportedModelError(
                f"{model} splits its layers into {name} and {other}: llmprune prunes whole blocks"
            )


def _require_one_visit(model: Any, name: str) -> None:
    if getattr(getattr(model, "config", None), "model_type", None) in _LOOPING:
        raise UnsupportedModelError(
            f"{type(model).__name__} runs its blocks {name} several times in one forward: their inputs change with "
            "every pruned block, so llmprune cannot prune them one after another"
        )
