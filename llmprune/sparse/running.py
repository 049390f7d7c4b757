"""A checkpoint, dense or compressed, in memory and ready to generate text."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmprune.checkpoint import Source
from llmprune.checkpoint.unpacked import open_dense
from llmprune.errors import CheckpointError, DataError, RecipeError
from llmprune.locate import locate
from llmprune.model.configuration import read_config
from llmprune.model.skeleton import quiet
from llmprune.model.tokenizer import load_tokenizer
from llmprune.options import require_whole, resolve_device
from llmprune.planning import context_length
from llmprune.sparse.sparsify import sparsify

_NEW_TOKENS = 64  # where nobody says


@dataclass(frozen=True)
class Generated:
    """A continued prompt, and how long the new tokens took; `context` is the model's, where that ended the text."""

    text: str
    new_tokens: int
    seconds: float
    sparse_layers: int
    context: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return asdict(self)


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    sparse: bool = True,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Generated:
    """Continue a prompt with a model, greedily.

    Args:
        model: a folder, dense or compressed, a Hub id, or `demo`.
        max_new_tokens: None is 64, or what the model's context leaves.
        sparse: run layers sparse where that is no slower.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        on_text: is called with each piece of text as it comes, the prompt first.

    Raises:
        LlmpruneError: the model or its tokenizer cannot be loaded, there is no such device, or, before any weights are
            loaded, the prompt and the new tokens are more than the model's context.
    """
    place = resolve_device(device)
    if max_new_tokens is not None:
        require_whole("max_new_tokens", max_new_tokens, 1)
    source = open_dense(locate(model, revision))
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    inputs = tokenizer(prompt, return_tensors="pt").to(place)
    given = inputs["input_ids"].shape[1]
    context = context_length(read_config(source.folder, source.config, trust_remote_code))
    room = _room(given, context, max_new_tokens)
    loaded = load(source, trust_remote_code).to(place)
    layers = sparsify(loaded).sparse_layers if sparse else 0
    if on_text:
        on_text(prompt)
    began = time.perf_counter()
    ids = loaded.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=room,
        do_sample=False,
        streamer=_streamer(tokenizer, on_text) if on_text else None,
    )[0]
    seconds = time.perf_counter() - began
    new = len(ids) - given
    ended = context if new == room < (max_new_tokens or _NEW_TOKENS) else None
    return Generated(tokenizer.decode(ids, skip_special_tokens=True), new, seconds, layers, ended)


def _room(given: int, context: int | None, asked: int | None) -> int:
    """Return how many tokens to write behind the given ones: those asked for, or what fits into the model's context."""
    if context is None:
        return asked or _NEW_TOKENS
    if given >= context:
        raise DataError(f"the prompt has {given} tokens, the model's context is {context}: shorten it")
    if asked is not None and given + asked > context:
        raise RecipeError(
            f"{given} prompt tokens and {asked} new ones are more than the model's context of {context}: ask for at most "
            f"{context - given} new ones"
        )
    return asked or min(_NEW_TOKENS, context - given)


def load(source: Source, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> Any:
    """Return the model of a checkpoint that `open_dense` has opened, with dense layers on the CPU.

    Raises:
        CheckpointError, UnsupportedModelError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    read_config(source.folder, source.config, trust_remote_code)
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                source.folder, dtype=dtype or "auto", trust_remote_code=trust_remote_code, local_files_only=True
            )
    except RuntimeError as error:  # what transformers makes of a tensor that does not fit or cannot be unpacked
        cause = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{source.folder} cannot be loaded ({cause}): download it again") from None
    model.eval()
    return model


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    """Return what `generate` of transformers hands new tokens to; it passes them on as text."""
    from transformers import TextStreamer

    streamer: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: on_text(text)
    return streamer
