"""Where the decoder blocks of a model are, and what comes before and after them."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from llmprune.errors import UnsupportedModelError
from llmprune.model.sites import Stage

# Towers of multimodal models: their blocks see no text.
_OTHER_TOWERS = re.compile(r"vision|visual|image|audio|speech|embed_tokens_extend")


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the decoder blocks and their name, such as `model.layers`.

    They are the largest outermost ModuleList of the model's text decoder.

    Raises:
        UnsupportedModelError: there is no such list.
    """
    names = {id(module): name for name, module in model.named_modules()}
    lists = [found for found in _outermost_lists(_decoder(model)) if not _OTHER_TOWERS.search(names[id(found)])]
    if not lists:
        raise UnsupportedModelError(f"{type(model).__name__}: found no list of decoder blocks (a torch ModuleList)")
    blocks = max(lists, key=_parameters)
    return names[id(blocks)], blocks


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
