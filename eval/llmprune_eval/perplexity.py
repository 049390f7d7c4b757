"""Perplexity by the convention of the pruning papers, and the distance to the dense model.

A window's loss is the mean cross-entropy of its length - 1 targets; the perplexity is the exponential of the windows'
mean loss, weighted by their lengths.
"""

import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from llmprune import data as documents
from llmprune.calibration import batches, check
from llmprune.documents import Documents
from llmprune.errors import DataError, NumericalError
from llmprune.locate import DEMO
from llmprune.planning import context_length, window_length
from llmprune.runs import add_evaluations, require_output
from llmprune.team.joining import joined
from llmprune.team.launch import launch
from llmprune.team.team import in_turn
from llmprune_eval.scores import Scores, mean_scores, score_windows
from llmprune_eval.subjects import Place, Subject
from llmprune_eval.windows import Amount, Windows, cut, fitting_batch

DEFAULT_DATA = "wikitext2"


@dataclass(frozen=True)
class Evaluation:
    """A perplexity and all that is needed to compare it with another one.

    Attributes:
        tokens: in all windows together; each window of n tokens has n - 1 targets.
        bits_per_byte: cross-entropy per byte of the text; None where the data came as token ids.
        seconds: of the forward passes.
        streamed: whether one block at a time was in memory.
        sparse_layers: layers that ran sparse.
        dense: the dense model that the fields below refer to; None, as they are then, where there was none.
        kl_divergence: mean of KL(dense || model) over the predicted tokens, in nats.
        top1_agreement: share of the predicted tokens for which both models rank the same one first.
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
    streamed: bool = False
    sparse_layers: int = 0
    dense: str | None = None
    dense_perplexity: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        streamed = ", streamed" if self.streamed else ""
        streamed += f", {self.sparse_layers} sparse layers" if self.sparse_layers else ""
        lines = [
            f"{self.model} on {self.data}: perplexity {self.perplexity:.4f}{bits}",
            f"  {self.windows} windows of {self.length} tokens ({self.tokens} tokens), {self.dtype} on {self.device}"
            f"{streamed}, {self.seconds:.1f} s",
            f"  {self.convention}",
        ]
        if self.dense is not None:
            lines.append(
                f"  to {self.dense} (perplexity {self.dense_perplexity:.4f}): KL divergence {self.kl_divergence:.4f} "
                f"nats a token, top-1 agreement {self.top1_agreement:.2%}"
            )
        return "\n".join(lines)


def evaluate(
    model: Any,
    data: Any = None,
    *,
    dense: Any = None,
    length: int | None = None,
    windows: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    streamed: bool | None = None,
    sparse: bool = False,
    tokenizer: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    save: bool = False,
) -> Evaluation:
    """Measure the perplexity of a model, and with `dense` how far its predictions are from that model's.

    Args:
        model: a folder, a Hub id, `demo`, or a loaded `PreTrainedModel` (then `device` and `dtype` are its own).
        data: what `llmprune.data.read` reads; None is `wikitext2`, or the shipped excerpt for `demo`.
        dense: the model that `model` was pruned from, given in the same ways.
        length: tokens a window; None is 2048, or the model's context where that is shorter.
        windows: measure on the first of the text's windows only, for a quick look; None is all of them.
        batch_size: windows a forward; None sizes it to the vocabulary.
        streamed: hold one block at a time in memory; None does so for a checkpoint that does not fit.
        sparse: keep layers of a checkpoint sparse where that is faster, as `llmprune.sparsify` does; not of `dense`.
        tokenizer: for a loaded model and text.
        save: add the result to the `llmprune.json` of the output folder `model`.

    Raises:
        LlmpruneError: one of its kinds.
    """
    place = Place.of(device, dtype, streamed, trust_remote_code, sparse)
    amount = Amount(length, windows, batch_size)
    subject = Subject(model, place, tokenizer, revision)
    if save:
        require_output(subject.folder)
    text = read_text(model, data)
    reference = None if dense is None else Subject(dense, replace(place, sparse=False), tokenizer)
    found = measure(subject, text, reference, amount)
    if save and launch().rank == 0:
        add_evaluations(subject.folder, [found.to_json()])
    return found


def measure(subject: Subject, text: Documents, dense: Subject | None, amount: Amount) -> Evaluation:
    """Measure one model on one text.

    Raises:
        DataError: the text does not fit the model, or both models do not share a vocabulary.
        NumericalError: the model's outputs are not finite.
    """
    windows = cut_for(subject, text, amount)
    if dense is not None and not windows.same_ids(cut_for(dense, text, amount)):
        raise DataError(f"{subject.name} and {dense.name} cut {text.name} into other tokens: leave the dense model out")
    batches_BL = batches(windows.tokens, amount.batch_size or fitting_batch(windows, subject.vocabulary))
    started = time.perf_counter()
    with joined() as team:
        mine = team.share(batches_BL)
        found = score_windows(mine, subject.logits(mine), dense.logits(mine) if dense else None)
        scores = mean_scores(batches_BL, in_turn(team.gather(found)), dense is not None)
    seconds = time.perf_counter() - started
    return _evaluation(subject, dense, windows, scores, seconds)


def cut_for(subject: Subject, text: Documents, amount: Amount) -> Windows:
    """Return the windows of a text for a model, checked to fit it.

    Raises:
        DataError: they do not.
    """
    context = context_length(subject.config)
    tokenizer = None if text.kind == "input_ids" else subject.tokenizer
    windows = cut(text, tokenizer, window_length(amount.length, context), amount.windows)
    check(windows.tokens, vocabulary=subject.vocabulary, context=context)
    return windows


def read_text(model: Any, data: Any) -> Documents:
    """Return the text that `data` names; None is WikiText-2, or its shipped excerpt for the demo model."""
    default = DEMO if isinstance(model, str) and model == DEMO else DEFAULT_DATA
    return documents.read(default if data is None else data, "evaluation")


def _evaluation(
    subject: Subject, dense: Subject | None, windows: Windows, scores: Scores, seconds: float
) -> Evaluation:
    return Evaluation(
        model=subject.name,
        data=windows.tokens.name,
        perplexity=perplexity_of(subject.name, scores.loss),
        bits_per_byte=windows.bits_per_byte(scores.loss),
        windows=len(windows.tokens.rows),
        length=windows.longest,
        tokens=sum(len(row) for row in windows.tokens.rows),
        dtype=str(subject.dtype).removeprefix("torch."),
        device=str(subject.device),
        convention=windows.tokens.note,
        seconds=seconds,
        streamed=subject.streamed,
        sparse_layers=subject.sparse_layers,
        dense=dense.name if dense else None,
        dense_perplexity=None
        if scores.dense_loss is None or not dense
        else perplexity_of(dense.name, scores.dense_loss),
        kl_divergence=scores.kl_divergence,
        top1_agreement=scores.top1_agreement,
    )


def perplexity_of(name: str, loss: float) -> float:
    """Return the perplexity of a mean loss in nats a token.

    Raises:
        NumericalError: it is not finite.
    """
    if not math.isfinite(loss):
        raise NumericalError(f"{name} gives NaN or infinite outputs: try --dtype float32")
    try:
        return math.exp(loss)
    except OverflowError:
        raise NumericalError(
            f"{name} has a mean loss of {loss:.4g} nats, too large for a perplexity: it is broken"
        ) from None
