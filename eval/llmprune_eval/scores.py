"""Measures of a language model's predictions: cross-entropy, and how far they are from another model's."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_CHUNK = 1 << 24  # logits of which copies in fp32 are held at once


@dataclass
class Scores:
    """Means over the predicted tokens, each window weighted by its length as in the papers' scripts.

    Attributes:
        loss: cross-entropy in nats a token.
        dense_loss: that of the dense model.
        kl_divergence: of the dense model's predictions to this one's, KL(dense || this), in nats a token.
        top1_agreement: share of the tokens for which both models rank the same one first.
    """

    loss: float = 0.0
    dense_loss: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None


Found = tuple[float, float, float, float]  # of a window: as the fields of `Scores`, zeros without a dense model


@torch.no_grad()
def score_windows(
    batches_BL: Sequence[Tensor], logits: Iterator[Tensor], dense_logits: Iterator[Tensor] | None = None
) -> list[list[Found]]:
    """Return what is found of the windows of each batch; the logits of both models are drawn batch by batch, in step.

    Args:
        batches_BL: token ids [windows, length] each.
        logits, dense_logits: [windows, length, vocabulary] for each batch.
    """
    found = []
    with ExitStack() as stack:
        for source in (logits, dense_logits):
            if source is not None:
                stack.enter_context(closing(source))  # type: ignore[type-var]
        dense: Iterable[Any] = repeat(None) if dense_logits is None else dense_logits
        for batch_BL, logits_BLV, dense_BLV in zip(batches_BL, logits, dense, strict=False):
            both = zip(batch_BL, logits_BLV, repeat(None) if dense_BLV is None else dense_BLV, strict=False)
            found.append([_window(*window) for window in both])
    return found


def mean_scores(batches_BL: Sequence[Tensor], found: Iterable[Sequence[Found]], dense: bool) -> Scores:
    """Return the means over all windows of what was found of the batches, in their order."""
    sums = [0.0, 0.0, 0.0, 0.0]
    for batch_BL, windows in zip(batches_BL, found, strict=True):
        for ids_L, values in zip(batch_BL, windows, strict=True):
            sums = [total + len(ids_L) * value for total, value in zip(sums, values, strict=True)]
    means = [total / sum(batch.numel() for batch in batches_BL) for total in sums]
    return Scores(*means) if dense else Scores(means[0])


def score(
    batches_BL: Sequence[Tensor], logits: Iterator[Tensor], dense_logits: Iterator[Tensor] | None = None
) -> Scores:
    """Return the means over all windows; see `score_windows`."""
    found = score_windows(batches_BL, logits, dense_logits)
    return mean_scores(batches_BL, found, dense_logits is not None)


def _window(ids_L: Tensor, logits_LV: Tensor, dense_LV: Tensor | None) -> Found:
    loss = _cross_entropy(logits_LV, ids_L)
    if dense_LV is None:
        return loss, 0.0, 0.0, 0.0
    kl, agreement = _distance(logits_LV[:-1], dense_LV[:-1].to(logits_LV.device))
    return loss, _cross_entropy(dense_LV, ids_L), kl, agreement


def _cross_entropy(logits_LV: Tensor, ids_L: Tensor) -> float:
    targets = ids_L[1:].to(logits_LV.device)
    return functional.cross_entropy(logits_LV[:-1].float(), targets).item()


def _distance(logits_PV: Tensor, dense_PV: Tensor) -> tuple[float, float]:
    """Return the mean KL divergence and the share of agreements over the positions P."""
    rows = max(1, _CHUNK // logits_PV.shape[-1])
    kl, agreements = 0.0, 0
    for found_PV, wanted_PV in zip(logits_PV.split(rows), dense_PV.split(rows), strict=True):
        found, wanted = functional.log_softmax(found_PV.float(), -1), functional.log_softmax(wanted_PV.float(), -1)
        kl += functional.kl_div(found, wanted, reduction="sum", log_target=True).item()
        agreements += int((found_PV.argmax(-1) == wanted_PV.argmax(-1)).sum())
    return kl / len(logits_PV), agreements / len(logits_PV)
