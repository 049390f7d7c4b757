"""Measures of a language model's predictions: cross-entropy, and how far they are from another model's."""

from collections.abc import Iterable, Iterator
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


@torch.no_grad()
def score(batches_BL: list[Tensor], logits: Iterator[Tensor], dense_logits: Iterator[Tensor] | None = None) -> Scores:
    """Return the means over all windows; the logits of both models are drawn batch by batch, in step.

    Args:
        batches_BL: token ids [windows, length] each.
        logits, dense_logits: [windows, length, vocabulary] for each batch.
    """
    sums = [0.0, 0.0, 0.0, 0.0]
    with ExitStack() as stack:
        for source in (logits, dense_logits):
            if source is not None:
                stack.enter_context(closing(source))  # type: ignore[type-var]
        dense: Iterable[Any] = repeat(None) if dense_logits is None else dense_logits
        for batch_BL, logits_BLV, dense_BLV in zip(batches_BL, logits, dense, strict=False):
            for window, ids_L in enumerate(batch_BL):
                found = _window(ids_L, logits_BLV[window], None if dense_BLV is None else dense_BLV[window])
                sums = [total + len(ids_L) * value for total, value in zip(sums, found, strict=True)]
    means = [total / sum(batch.numel() for batch in batches_BL) for total in sums]
    return Scores(*means) if dense_logits is not None else Scores(means[0])


def _window(ids_L: Tensor, logits_LV: Tensor, dense_LV: Tensor | None) -> tuple[float, float, float, float]:
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
