"""Prune one architecture with the real program and hold the result against plain transformers and plain torch."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import llmprune
import tiny
import zoo
from llmprune.errors import LlmpruneError
from llmprune.model import streamed_logits
from llmprune.model.blocks import find_blocks
from llmprune.report import Report, SiteReport
from zoo.wanda import require, require_wanda

SHARD = "20KB"  # less than a block of any of these models
SPARSITY = 0.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
METHODS = ("magnitude", "wanda")
_SLICE = re.compile(r"(.+)\[(\d+)\]")  # an expert's part of a fused parameter

Verdict = str  # "pass", "refused", "wrong" or "not built"


@dataclass
class Row:
    """What came of one architecture.

    Attributes:
        detail: why it is not a pass.
        sites: pruned matrices by kind.
        covered: share of all parameters, and of those in the blocks, that is in pruned matrices.
        dense: matrices left dense, by reason and place in the block.
    """

    name: str
    dtype: str
    verdict: Verdict = "wrong"
    detail: str = ""
    streams: bool = False
    sites: dict[str, int] = field(default_factory=dict)
    covered: float = 0.0
    covered_blocks: float = 0.0
    dense: dict[str, list[str]] = field(default_factory=dict)


def check(name: str, folder: Path, dtype: str = "fp32") -> Row:
    """Return the row of an architecture; `folder` is empty and takes its checkpoints."""
    row = Row(name, dtype)
    try:
        tiny.save(zoo.model(name, DTYPES[dtype]), folder / "dense", SHARD)
        logits = tiny.logits(_load(folder / "dense", dtype), token_ids())
        require(bool(logits.isfinite().all()) and float(logits.float().std()) > 0.01, "the logits say nothing")
    except Exception as error:  # of transformers, whatever it raises
        row.verdict, row.detail = "not built", _one_line(error)
        return row
    try:
        _check(row, folder, logits)
        row.verdict = "pass"
    except LlmpruneError as error:
        row.verdict, row.detail = "refused", str(error).replace(str(folder / "dense"), "MODEL")
    except Exception as error:  # a traceback is no clear refusal
        row.detail = _one_line(error)
    return row


def _check(row: Row, folder: Path, logits: Tensor) -> None:
    source, ids = folder / "dense", token_ids()
    row.streams = torch.equal(streamed_logits(source, ids), logits)
    require(row.streams, "streamed logits differ from the model's own")
    for method in METHODS:
        out = folder / method
        report = llmprune.prune(source, out, method=method, pattern=SPARSITY, calibration=ids)
        dense, pruned = _load(source, row.dtype), _load(out, row.dtype)
        _describe(row, report, pruned)
        require(bool(report.sites), "nothing was pruned")
        _require_patterns(report, pruned, per_row=method == "wanda")
        _require_only_zeros(tiny.tensors(source), tiny.tensors(out), _new_zeros(report, dense, pruned))
        found = tiny.logits(pruned, ids)
        require(torch.equal(streamed_logits(out, ids), found), f"{method}: reloaded logits differ from the streamed")
        require(not torch.equal(found, logits), f"{method}: pruning changed no logits")
        faults = llmprune.inspect(out).faults
        require(not faults, f"{method}: inspect finds {faults[:1]}")
        if method == "wanda":
            require_wanda(_load(source, row.dtype), pruned, report, ids)
        llmprune.prune(dense, method=method, pattern=SPARSITY, calibration=ids)
        _require_same(dense, pruned, method)


def _load(folder: Path, dtype: str) -> Any:
    """Return a model as plain transformers loads it, all of it."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], output_loading_info=True)
    model, found = loaded
    missing = sorted(found["missing_keys"])
    require(not missing, f"transformers does not find {missing[:1]} in the checkpoint that it wrote")
    return model.eval()


def token_ids() -> Tensor:
    """Return random ordinary tokens [sequences, length], longer than any sliding window."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(*zoo.ORDINARY_TOKENS, (3, 24), generator=generator)


def stored_weight(model: nn.Module, site: SiteReport) -> Tensor:
    """Return the weight of a site as the model stores it."""
    match = _SLICE.fullmatch(site.name)
    if match is None:
        return model.get_parameter(site.name)
    stored = model.get_parameter(match[1])
    return stored.reshape(-1, site.shape[0] * site.shape[1] // stored.shape[-1], stored.shape[-1])[int(match[2])]


def _new_zeros(report: Report, dense: nn.Module, pruned: nn.Module) -> int:
    pairs = ((stored_weight(dense, site), stored_weight(pruned, site)) for site in report.sites)
    return sum(int(before.count_nonzero()) - int(after.count_nonzero()) for before, after in pairs)


def _require_only_zeros(before: dict[str, Tensor], after: dict[str, Tensor], zeros: int) -> None:
    """Same tensors, every element as it was or zero, and no more new zeros than the sites have."""
    require(list(before) == list(after), "the output has other tensor names")
    found = 0
    for name, old in before.items():
        new = after[name]
        require((old.dtype, old.shape) == (new.dtype, new.shape), f"{name} changed its dtype or shape")
        emptied = (new == 0) & (old != 0)
        require(tiny.same_bytes(new, old.masked_fill(emptied, 0)), f"{name} changed otherwise than by zeros")
        found += int(emptied.sum())
    require(found == zeros, f"the output has {found} new zeros, its sites have {zeros}")


def _require_patterns(report: Report, pruned: nn.Module, per_row: bool) -> None:
    for site in report.sites:
        weight = stored_weight(pruned, site)
        views = [view for view in (weight, weight.T) if tuple(view.shape) == site.shape]  # either, if it is square
        exact = any(_is_exact(view == 0, per_row) for view in views)
        require(exact and int((weight == 0).sum()) == site.zeros, f"{site.name} is not exactly at the pattern")


def _is_exact(empty_OI: Tensor, per_row: bool) -> bool:
    if per_row:
        return bool((empty_OI.sum(1) == int(empty_OI.shape[1] * SPARSITY)).all())
    return int(empty_OI.sum()) == int(empty_OI.numel() * SPARSITY)


def _require_same(model: nn.Module, expected: nn.Module, method: str) -> None:
    weights = expected.state_dict()
    for name, tensor in model.state_dict().items():
        require(tiny.same_bytes(tensor, weights[name]), f"{method}: {name} is another when pruned in memory")


def _describe(row: Row, report: Report, pruned: nn.Module) -> None:
    modules, (blocks_name, blocks) = dict(pruned.named_modules()), find_blocks(pruned)
    row.sites = dict(Counter(_kind(site.name, modules) for site in report.sites))
    row.covered = report.site_parameters / report.parameters
    row.covered_blocks = report.site_parameters / sum(parameter.numel() for parameter in blocks.parameters())
    row.dense = {}
    for name, reason in report.left_dense.items():
        if name.startswith(f"{blocks_name}."):
            places = row.dense.setdefault(re.sub(r"^one with .*", "shared with an earlier block", reason), [])
            places += [place for place in [_place(name, blocks_name)] if place not in places]


def _place(name: str, blocks_name: str) -> str:
    """Return a name within a block, the same for all experts."""
    inside = name.removeprefix(f"{blocks_name}.").partition(".")[2]
    return re.sub(r"\[\d+\]", "[*]", re.sub(r"\.\d+\.", ".*.", inside))


def _kind(name: str, modules: dict[str, nn.Module]) -> str:
    if _SLICE.fullmatch(name):
        return "expert slice"
    module = modules.get(name.removesuffix(".weight"))
    return "Conv1D" if isinstance(module, Conv1D) else "Linear" if isinstance(module, nn.Linear) else "other"


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:160]}"
