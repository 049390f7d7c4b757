"""Histograms of the weights before and after, from the checkpoints themselves."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune import hub
from llmprune.allocation import kind_of
from llmprune.checkpoint.unpacked import open_dense
from llmprune.errors import LlmpruneError
from llmprune.locate import locate
from llmprune.model import Streamed
from llmprune.model.sites import tensor_of

BINS = 60
_REACH = 4.0  # standard deviations to either side


@dataclass(frozen=True)
class Histogram:
    """Counts of weights that are not zero, `BINS` of them between `edges`; `before` is None where it is not known."""

    kind: str
    edges: list[float]
    before: list[float] | None
    after: list[float]


def histograms(folder: Path, run: dict[str, Any]) -> list[Histogram]:
    """Return a histogram for each kind of site, of the first million weights or so of each of its matrices.

    The base model is read where it lies on this machine; it is not downloaded.
    """
    sites = {tensor_of(site["name"]) for site in run["sites"]}
    with hub.offline():
        after = _samples(folder, sites)
        before = _samples_of_base(run, sites)
    kinds = dict.fromkeys(kind_of(site["name"]) for site in run["sites"])
    return [_histogram(kind, before.get(kind), after[kind]) for kind in kinds if kind in after]


def _samples_of_base(run: dict[str, Any], sites: set[str]) -> dict[str, list[Tensor]]:
    try:
        return _samples(locate(run["model"], run["recipe"].get("revision")), sites)
    except LlmpruneError:  # moved, deleted, or on the Hub only: the page says so
        return {}


def _samples(folder: Path, sites: set[str]) -> dict[str, list[Tensor]]:
    source = open_dense(folder)
    host = Streamed(source, torch.device("cpu"))
    found: dict[str, list[Tensor]] = defaultdict(list)
    for key in source.entries:
        name = host.parameter_of(key)
        if name in sites:
            found[kind_of(name)].append(next(source.chunks(key)).float())
    return dict(found)


def _histogram(kind: str, before: list[Tensor] | None, after: list[Tensor]) -> Histogram:
    width = _REACH * float(torch.cat([part.flatten() for part in before or after]).std()) or 1.0
    edges = torch.linspace(-width, width, BINS + 1, dtype=torch.float32).tolist()
    return Histogram(kind, edges, None if before is None else _counts(before, width), _counts(after, width))


def _counts(parts: list[Tensor], width: float) -> list[float]:
    counts = torch.zeros(BINS, dtype=torch.float32)
    for part in parts:
        counts += torch.histc(part[part != 0], BINS, -width, width)
    found: list[float] = counts.tolist()
    return found
