"""Perplexity by the convention of the pruning papers.

The text is tokenized in one call with the tokenizer's default special tokens and cut into windows that do not
overlap; the tail is dropped. A window's loss is the mean cross-entropy of its length - 1 targets; the perplexity is
the exponential of the windows' mean loss, weighted by their lengths.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmprune import data as documents
from llmprune.calibration import Tokens, batches, check, text_tokens
from llmprune.checkpoint import Source
from llmprune.documents import Documents
from llmprune.errors import DataError, NumericalError
from llmprune.locate import DEMO, locate
from llmprune.model import load_causal_lm, load_tokenizer, read_config
from llmprune.planning import context_length, window_length
from llmprune.progress import Progress
from llmprune.recipe import DTYPES, require_dtype, require_whole, resolve_device

DEFAULT_DATA = "wikitext2"
MOST_WINDOWS = {"c4": 256}  # as SparseGPT's and Wanda's code
_LOGIT_BYTES = 256 << 20  # of fp32 logits at a time
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Evaluation:
    """A perplexity and all that is needed to compare it with another one.

    Attributes:
        tokens: in all windows together; each window of n tokens has n - 1 targets.
        bits_per_byte: cross-entropy per byte of the text; None where the data came as token ids.
        seconds: of the forward passes.
    """

    model: str
    data: str
    perplexity: float
    bits_per_byte: float | None
    windows: int
    length: int
    tokens: int
    dtype: str
    device: str
    convention: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        return (
            f"{self.model} on {self.data}: perplexity {self.perplexity:.4f}{bits}\n"
            f"  {self.windows} windows of {self.length} tokens ({self.tokens} tokens), {self.dtype} on {self.device}, "
            f"{self.seconds:.1f} s\n  {self.convention}"
        )


def evaluate(
    model: Any,
    data: Any = None,
    *,
    length: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Measure the perplexity of a model.

    Args:
        model: a folder, a Hub id, `demo`, or a loaded `PreTrainedModel` (then `device` and `dtype` are its own).
        data: what `llmprune.data.read` reads; None is `wikitext2`, or the shipped excerpt for `demo`.
        length: tokens a window; None is 2048, or the model's context where that is shorter.
        batch_size: windows a forward; None sizes it to the vocabulary.
        tokenizer: for a loaded model and text.

    Raises:
        LlmpruneError: one of its kinds.
    """
    require_whole("length", length, 2)
    require_whole("batch_size", batch_size, 1)
    require_dtype(dtype)
    source = Source.open(locate(model, revision)) if isinstance(model, str | Path) else None
    config = read_config(source.folder, source.config, trust_remote_code) if source else model.config
    text = documents.read(
        data if data is not None else DEMO if source and model == DEMO else DEFAULT_DATA, "evaluation"
    )
    if source and text.kind != "input_ids":
        tokenizer = load_tokenizer(source.folder, trust_remote_code)
    context = context_length(config)
    windows, tokens_in_text = _windows(text, tokenizer, window_length(length, context))
    place = resolve_device(device)
    network = load_causal_lm(source, place, DTYPES.get(dtype), trust_remote_code) if source else model
    vocabulary = network.get_input_embeddings().weight.shape[0]
    check(windows, vocabulary=vocabulary, context=context)
    started = time.perf_counter()
    loss = mean_loss(network, batches(windows, batch_size or _fitting_batch(windows, vocabulary)))
    return Evaluation(
        model=str(model) if isinstance(model, str | Path) else network.name_or_path or type(network).__name__,
        data=windows.name,
        perplexity=_perplexity(loss),
        bits_per_byte=_bits_per_byte(loss, text, tokens_in_text),
        windows=len(windows.rows),
        length=max(len(row) for row in windows.rows),
        tokens=sum(len(row) for row in windows.rows),
        dtype=str(network.dtype).removeprefix("torch."),
        device=str(network.device),
        convention=windows.note,
        seconds=time.perf_counter() - started,
    )


def mean_loss(network: Any, batches_BL: list[Tensor]) -> float:
    """Return the windows' mean cross-entropy in nats, weighted by their lengths; dropout is off meanwhile.

    Raises:
        NumericalError: the model's outputs are not finite.
    """
    training = network.training
    network.eval()
    try:
        total = _summed_loss(network, batches_BL)
    finally:
        network.train(training)
    if not math.isfinite(total):
        raise NumericalError(f"{type(network).__name__} gives NaN or infinite outputs: try --dtype float32")
    return total / sum(batch.numel() for batch in batches_BL)


@torch.no_grad()
def _summed_loss(network: Any, batches_BL: list[Tensor]) -> float:
    total = 0.0
    with Progress(sum(len(batch) for batch in batches_BL), "evaluating", "window") as bar:
        for batch_BL in batches_BL:
            ids_BL = batch_BL.to(network.device)
            logits_BLV = network(input_ids=ids_BL, use_cache=False).logits
            for logits_LV, ids_L in zip(logits_BLV, ids_BL, strict=True):
                loss = functional.cross_entropy(logits_LV[:-1].float(), ids_L[1:].to(logits_LV.device))
                total += loss.item() * len(ids_L)
            bar.step(len(batch_BL))
    return total


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        raise NumericalError(
            f"the mean loss of {loss:.4g} nats is too large for a perplexity: the model is broken"
        ) from None


def _windows(text: Documents, tokenizer: Any, length: int) -> tuple[Tokens, int]:
    """Return the windows, and the tokens of the whole text."""
    if text.kind == "input_ids":
        rows = [torch.tensor(row, dtype=torch.int64) for row in text.rows]
        if any(len(row) < 2 for row in rows):
            raise DataError(f"{text.name} has a row of fewer than 2 tokens, which leaves nothing to predict")
        note = "each row of token ids is one window, used as given"
        return Tokens(rows, text.name, "", note), sum(len(row) for row in rows)
    ids = text_tokens(text, tokenizer)
    rows = list(ids[: len(ids) // length * length].view(-1, length))[: MOST_WINDOWS.get(text.name)]
    if not rows:
        raise DataError(f"{text.name} has {len(ids)} tokens, less than one window of {length}: use --length {len(ids)}")
    joined = f"rows joined with {text.separator!r}" if len(text.rows) > 1 else "text as it stands"
    left = len(ids) - len(rows) * length
    note = f"{joined}, one tokenizer call, windows of {length} that do not overlap, tail of {left} tokens dropped"
    return Tokens(rows, text.name, "", note), len(ids)


def _bits_per_byte(loss: float, text: Documents, tokens: int) -> float | None:
    """Spread the loss per token over the bytes of the whole text, the dropped tail included."""
    if text.kind == "input_ids":
        return None
    size = len(text.separator.join(text.rows).encode())
    return loss / math.log(2) * tokens / size


def _fitting_batch(windows: Tokens, vocabulary: int) -> int:
    length = max(len(row) for row in windows.rows)
    return max(1, min(_BATCH_TOKENS, _LOGIT_BYTES // (4 * vocabulary)) // length)
