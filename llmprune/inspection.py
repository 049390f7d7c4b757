"""What a checkpoint really holds: the zeros of every tensor, and the patterns they form."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune.checkpoint import Source
from llmprune.checkpoint.sink import REPORT
from llmprune.errors import CheckpointError, PatternError
from llmprune.locate import locate
from llmprune.model import Streamed
from llmprune.model.sites import Site, sites_of
from llmprune.patterns import NM, Unstructured, parse

GROUP_SIZES = (4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class TensorReport:
    """One stored tensor.

    Attributes:
        patterns: every N:M, M a power of two up to 128, that the tensor truly satisfies, the tightest N for each M.
        negative_zeros: zeros with a sign bit, which some sparse kernels take for values.
        site: whether it holds weights that llmprune prunes by default.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    zeros: int
    negative_zeros: int
    sparsity: float
    patterns: tuple[str, ...]
    site: bool

    def tight_patterns(self) -> list[str]:
        """Return the patterns that explain the tensor's zeros, leaving out those that hold by chance."""
        return [text for text in self.patterns if parse(text).sparsity > 0.99 * self.sparsity]


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's tensors, and whether they keep what its `llmprune.json` promises."""

    model: str
    tensors: list[TensorReport]
    faults: list[str]
    promised: bool

    @property
    def verified(self) -> bool | None:
        """True if every promise is kept, None if the checkpoint makes none."""
        return not self.faults if self.promised else None

    def sparsity(self, sites_only: bool) -> float:
        """Return the share of zeros in the sites, or in all parameters."""
        counted = [tensor for tensor in self.tensors if tensor.site or not sites_only]
        return sum(tensor.zeros for tensor in counted) / max(sum(tensor.count for tensor in counted), 1)

    def to_json(self) -> dict[str, Any]:
        """Return the inspection as plain values."""
        return {
            "model": self.model,
            "sparsity": {"sites": self.sparsity(True), "all_parameters": self.sparsity(False)},
            "parameters": {
                "sites": sum(tensor.count for tensor in self.tensors if tensor.site),
                "all": sum(tensor.count for tensor in self.tensors),
            },
            "verified": self.verified,
            "faults": self.faults,
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }

    def __str__(self) -> str:
        width = max(len(tensor.name) for tensor in self.tensors)
        lines = [f"{'tensor':{width}}  {'shape':>14}  sparsity  satisfies"]
        for tensor in self.tensors:
            shape = "x".join(map(str, tensor.shape))
            patterns = ", ".join(tensor.tight_patterns()) or ("unstructured" if tensor.zeros else "dense")
            lines.append(f"{tensor.name:{width}}  {shape:>14}  {tensor.sparsity:8.2%}  {patterns}")
        verdict = {True: "all promises of llmprune.json kept", False: "BROKEN", None: "no llmprune.json"}
        lines.append(f"zeros: {self.sparsity(True):.4%} of the sites, {self.sparsity(False):.4%} of all parameters")
        return "\n".join([*lines, f"verified: {verdict[self.verified]}", *self.faults])


def inspect(model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Inspection:
    """Count the zeros of every tensor of a checkpoint, one tensor in memory at a time, and check its promises.

    Args:
        model: a folder, a Hub id or `demo`.

    Raises:
        LlmpruneError: the checkpoint cannot be opened or read.
    """
    source = Source.open(locate(model, revision))
    host = Streamed(source, torch.device("cpu"), trust_remote_code=trust_remote_code)
    sites = {site.name: site for stage in host.blocks for site in sites_of(stage)}
    promises = _promises(source.folder)
    sizes = sorted({*GROUP_SIZES, *_promised_sizes(promises)})
    tensors = [_tensor_report(source, key, sites.get(host.parameter_of(key)), sizes) for key in source.entries]
    return Inspection(str(model), tensors, _broken(promises, tensors, host), bool(promises))


def _tensor_report(source: Source, key: str, site: Site | None, sizes: list[int]) -> TensorReport:
    entry = source.entries[key]
    inputs = 0 if site is not None and site.transposed else 1
    zeros = negative = 0
    tightest = {m: 0 for m in sizes if len(entry.shape) == 2 and entry.shape[inputs] % m == 0}
    for chunk in source.chunks(key, 1 if inputs else math.lcm(*tightest)):
        empty = chunk == 0
        zeros += int(empty.sum())
        if chunk.is_floating_point():
            negative += int((empty & torch.signbit(chunk)).sum())
        for m in tightest:
            tightest[m] = max(tightest[m], _most_kept(~empty, m, inputs))
    patterns = tuple(f"{n}:{m}" for m, n in tightest.items() if n < m)
    sparsity = zeros / max(entry.count, 1)
    return TensorReport(
        key, entry.shape, entry.dtype, entry.count, zeros, negative, sparsity, patterns, site is not None
    )


def _most_kept(kept: Tensor, m: int, dimension: int) -> int:
    """Return the most kept weights in any group of `m` along `dimension`."""
    groups = kept.unflatten(dimension, (-1, m)).sum(dimension + 1)
    return int(groups.max())


def _promises(folder: Path) -> list[dict[str, Any]]:
    path = folder / REPORT
    if not path.is_file():
        return []
    try:
        sites: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["sites"]
        return [{"name": s["name"], "pattern": s["pattern"], "zeros": int(s["zeros"])} for s in sites]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is damaged: delete it to inspect the weights alone") from None


def _broken(promises: list[dict[str, Any]], tensors: list[TensorReport], host: Streamed) -> list[str]:
    by_parameter = {host.parameter_of(tensor.name): tensor for tensor in tensors}
    faults = []
    for promise in promises:
        tensor = by_parameter.get(host.tied_to(promise["name"]))
        if tensor is None:
            faults.append(f"{promise['name']}: promised, but the checkpoint has no such tensor")
        elif tensor.zeros < promise["zeros"]:
            faults.append(f"{tensor.name}: has {tensor.zeros} zeros, {promise['zeros']} were promised")
        elif not _satisfies(tensor, promise["pattern"]):
            faults.append(f"{tensor.name}: is not {promise['pattern']}")
        elif tensor.negative_zeros:
            faults.append(f"{tensor.name}: holds {tensor.negative_zeros} negative zeros")
    return faults


def _promised_sizes(promises: list[dict[str, Any]]) -> list[int]:
    """Return the M of every N:M that was promised."""
    patterns = (_pattern(promise["pattern"]) for promise in promises)
    return [pattern.m for pattern in patterns if isinstance(pattern, NM)]


def _satisfies(tensor: TensorReport, text: str) -> bool:
    pattern = _pattern(text)
    if not isinstance(pattern, NM):
        return True  # the count of zeros, checked already, is all that was promised
    found = (parse(text) for text in tensor.patterns)
    return any(isinstance(nm, NM) and nm.m == pattern.m and nm.n <= pattern.n for nm in found)


def _pattern(text: str) -> Unstructured | NM | None:
    try:
        return parse(text)
    except PatternError:
        return None  # such as a share of a budget over the model
