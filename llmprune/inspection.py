"""What a checkpoint really holds: the zeros of every tensor, and the patterns they form."""

import math
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune.checkpoint import Source
from llmprune.checkpoint.sink import REPORT
from llmprune.checkpoint.unpacked import Unpacked, open_dense
from llmprune.errors import PatternError
from llmprune.locate import locate
from llmprune.model import Streamed
from llmprune.model.sites import Site, dense_parameters, is_router, outer_parameters, sites_of, tensor_of
from llmprune.patterns import NM, Unstructured, parse
from llmprune.runfile import read_run_file

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
    """A checkpoint's tensors, and whether they keep what its `llmprune.json` promises.

    Attributes:
        left_dense: tensors of two dimensions or more that were not pruned, or would not be, and why.
    """

    model: str
    tensors: list[TensorReport]
    left_dense: dict[str, str]
    faults: list[str]
    promised: bool

    @property
    def verified(self) -> bool | None:
        """True if every promise is kept, None if the checkpoint makes none; False also for a fault of the format."""
        return not self.faults if self.promised or self.faults else None

    def sparsity(self, sites_only: bool) -> float:
        """Return the share of zeros in the sites, or in all parameters."""
        counted = [tensor for tensor in self.tensors if tensor.site or not sites_only]
        return sum(tensor.zeros for tensor in counted) / max(sum(tensor.count for tensor in counted), 1)

    def share(self, pruned_only: bool) -> float:
        """Return the share of all parameters that are in sites, or in sites that hold zeros."""
        counted = [tensor for tensor in self.tensors if tensor.site and (tensor.zeros or not pruned_only)]
        return sum(tensor.count for tensor in counted) / max(sum(tensor.count for tensor in self.tensors), 1)

    def to_json(self) -> dict[str, Any]:
        """Return the inspection as plain values."""
        return {
            "model": self.model,
            "sparsity": {"sites": self.sparsity(True), "all_parameters": self.sparsity(False)},
            "parameters": {
                "sites": sum(tensor.count for tensor in self.tensors if tensor.site),
                "all": sum(tensor.count for tensor in self.tensors),
            },
            "share": {"sites": self.share(False), "pruned": self.share(True)},
            "left_dense": self.left_dense,
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
        lines.append(f"sites: {self.share(False):.2%} of all parameters, {self.share(True):.2%} in sites with zeros")
        reasons = Counter(self.left_dense.values()).most_common()
        lines += [f"left dense: {count} {reason}" for reason, count in reasons]
        return "\n".join([*lines, f"verified: {verdict[self.verified]}", *self.faults])


def inspect(model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Inspection:
    """Count the zeros of every tensor of a checkpoint, one tensor in memory at a time, and check its promises.

    Of a compressed checkpoint the bitmasks and values are read as they lie: nothing dense is written to disk.

    Args:
        model: a folder, dense or compressed, a Hub id or `demo`.

    Raises:
        LlmpruneError: the checkpoint cannot be opened or read.
    """
    source = open_dense(locate(model, revision))
    path = source.folder / REPORT
    run = read_run_file(path, "delete it to inspect the weights alone") if path.is_file() else {}
    host = Streamed(source, torch.device("cpu"), trust_remote_code=trust_remote_code)
    sites = {site.tensor: site for stage in host.blocks for site in sites_of(stage) if not is_router(site.tensor)}
    promises = _promises(run)
    sizes = sorted({*GROUP_SIZES, *_promised_sizes(promises)})
    tensors = [_tensor_report(source, key, sites.get(host.parameter_of(key)), sizes) for key in source.entries]
    faults = [*_wasted(source), *_broken(promises, tensors, host)]
    return Inspection(str(model), tensors, _left_dense(run, host), faults, bool(promises))


def _wasted(source: Source) -> list[str]:
    """Return what a compressed checkpoint stores though it is zero."""
    wasted = source.wasted() if isinstance(source, Unpacked) else {}
    return [f"{name}: stores {count} zeros as values, compress it again" for name, count in wasted.items()]


def _left_dense(run: dict[str, Any], host: Streamed) -> dict[str, str]:
    """Return what a run left dense as its report says, or what a run with default options would leave dense."""
    if run:
        return dict(run["left_dense"])
    ends = {site.tensor: "embedding" for site in sites_of(host.embedding)}
    ends |= {site.tensor: "output head" for site in sites_of(host.head)}
    inner = dict(pair for stage in host.blocks for pair in dense_parameters(stage))
    routers = (site.tensor for stage in host.blocks for site in sites_of(stage) if is_router(site.tensor))
    outer = outer_parameters(host.model, [host.embedding, *host.blocks, host.head])
    return ends | inner | outer | dict.fromkeys(routers, "router")


def _tensor_report(source: Source, key: str, site: Site | None, sizes: list[int]) -> TensorReport:
    entry = source.entries[key]
    inputs = -2 if site is not None and site.is_stored_transposed(entry.shape) else -1
    zeros = negative = 0
    tightest = {m: 0 for m in sizes if len(entry.shape) in (2, 3) and entry.shape[inputs] % m == 0}
    for chunk in source.chunks(key, math.lcm(*tightest) if inputs == -len(entry.shape) else 1):
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
    """Return the most kept weights in any group of `m` along `dimension`, counted from the last."""
    return int(kept.unflatten(dimension, (-1, m)).sum(dimension).max())


def _promises(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what was promised of each parameter; the promises of its experts are added up."""
    promises: dict[tuple[str, str], int] = {}
    for site in run.get("sites", []):
        key = tensor_of(site["name"]), site["pattern"]
        promises[key] = promises.get(key, 0) + site["zeros"]
    return [{"name": name, "pattern": pattern, "zeros": zeros} for (name, pattern), zeros in promises.items()]


def _broken(promises: list[dict[str, Any]], tensors: list[TensorReport], host: Streamed) -> list[str]:
    by_parameter: dict[str, list[TensorReport]] = defaultdict(list)
    for tensor in tensors:
        by_parameter[host.parameter_of(tensor.name)].append(tensor)
    return [fault for promise in promises for fault in _faults(promise, by_parameter[host.tied_to(promise["name"])])]


def _faults(promise: dict[str, Any], stored: list[TensorReport]) -> list[str]:
    """Compare a promise with the tensors that make up the parameter: one, or one for each of its experts."""
    if not stored:
        return [f"{promise['name']}: promised, but the checkpoint has no such tensor"]
    zeros = sum(tensor.zeros for tensor in stored)
    if zeros < promise["zeros"]:
        return [f"{promise['name']}: has {zeros} zeros, {promise['zeros']} were promised"]
    faults = [f"{t.name}: is not {promise['pattern']}" for t in stored if not _satisfies(t, promise["pattern"])]
    signed = [f"{t.name}: holds {t.negative_zeros} negative zeros" for t in stored if t.negative_zeros]
    return faults or signed


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
