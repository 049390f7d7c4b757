"""Prune one architecture with the real program and hold the result against plain transformers and plain torch."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import llmprune
import tiny
import zoo
from llmprune.errors import LlmpruneError
from llmprune.model import streamed_logits
from llmprune.model.blocks import find_blocks
from llmprune.report import Report, SiteReport

SHARD = "20KB"  # less than a block of any of these models
SPARSITY = 0.5
METHODS = ("magnitude", "wanda")
_SLICE = re.compile(r"(.+)\[(\d+)\]")  # an expert's part of a fused parameter

Verdict = str  # "pass", "refused", "wrong" or "not built"


class Wrong(Exception):
    """What llmprune made is not what it should be."""


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
    verdict: Verdict = "wrong"
    detail: str = ""
    streams: bool = False
    sites: dict[str, int] = field(default_factory=dict)
    covered: float = 0.0
    covered_blocks: float = 0.0
    dense: dict[str, list[str]] = field(default_factory=dict)


def check(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Row:
    """Return the row of an architecture; `folder` is empty and takes its checkpoints."""
    row = Row(name)
    try:
        tiny.save(zoo.model(name, dtype), folder / "dense", SHARD)
        logits = tiny.logits(tiny.load(folder / "dense"), token_ids())
        _require(bool(logits.isfinite().all()) and float(logits.float().std()) > 0.01, "the logits say nothing")
    except Exception as error:  # of transformers, whatever it raises
        row.verdict, row.detail = "not built", _one_line(error)
        return row
    try:
        _check(row, folder, logits)
        row.verdict = "pass"
    except LlmpruneError as error:
        row.verdict, row.detail = "refused", str(error).replace(str(folder), "MODEL")
    except Exception as error:  # a traceback is no clear refusal
        row.detail = _one_line(error)
    return row


def _check(row: Row, folder: Path, logits: Tensor) -> None:
    dense, ids = folder / "dense", token_ids()
    row.streams = torch.equal(streamed_logits(dense, ids), logits)
    _require(row.streams, "streamed logits differ from the model's own")
    for method in METHODS:
        out = folder / method
        report = llmprune.prune(dense, out, method=method, pattern=SPARSITY, calibration=ids)
        pruned = tiny.load(out)
        _describe(row, report, pruned)
        _require(bool(report.sites), "nothing was pruned")
        _require_only_zeros(dense, out, report)
        for site in report.sites:
            _require_pattern(stored_weight(pruned, site.name), site, per_row=method == "wanda")
        found = tiny.logits(pruned, ids)
        _require(torch.equal(streamed_logits(out, ids), found), f"{method}: reloaded logits differ from the streamed")
        _require(not torch.equal(found, logits), f"{method}: pruning changed no logits")
        _require_in_place(dense, method, pruned)
    require_wanda(tiny.load(dense), tiny.load(folder / "wanda"), report, ids)


def token_ids() -> Tensor:
    """Return random ordinary tokens [sequences, length], longer than any sliding window."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(*zoo.ORDINARY_TOKENS, (3, 24), generator=generator)


def stored_weight(model: nn.Module, name: str) -> Tensor:
    """Return the weight of a site as the model stores it."""
    if match := _SLICE.fullmatch(name):
        return model.get_parameter(match[1])[int(match[2])]
    return model.get_parameter(name)


def _require_only_zeros(dense: Path, pruned: Path, report: Report) -> None:
    """Same tensors, every element as it was or zero, and as many new zeros as the report tells of."""
    before, after = tiny.tensors(dense), tiny.tensors(pruned)
    _require(list(before) == list(after), "the output has other tensor names")
    zeros = 0
    for name, old in before.items():
        new = after[name]
        _require((old.dtype, old.shape) == (new.dtype, new.shape), f"{name} changed its dtype or shape")
        emptied = (new == 0) & (old != 0)
        _require(tiny.same_bytes(new, old.masked_fill(emptied, 0)), f"{name} changed otherwise than by zeros")
        zeros += int(emptied.sum())
    _require(zeros == report.zeros, f"the output has {zeros} new zeros, the report tells of {report.zeros}")


def _require_pattern(weight: Tensor, site: SiteReport, per_row: bool) -> None:
    empty_OI = weight == 0 if tuple(weight.shape) == site.shape else (weight == 0).T
    _require(tuple(empty_OI.shape) == site.shape, f"{site.name} has shape {list(weight.shape)}")
    asked = int(site.shape[1] * SPARSITY)
    exact = bool((empty_OI.sum(1) == asked).all() or (weight.ndim == 2 and (empty_OI.sum(0) == asked).all()))
    if not per_row:
        exact = int(empty_OI.sum()) == int(empty_OI.numel() * SPARSITY)
    _require(exact, f"{site.name} is not exactly at the pattern")


def _require_in_place(dense: Path, method: str, pruned: nn.Module) -> None:
    """The same model pruned in memory has the same weights."""
    model = tiny.load(dense)
    llmprune.prune(model, method=method, pattern=SPARSITY, calibration=token_ids())
    expected = pruned.state_dict()
    for name, tensor in model.state_dict().items():
        _require(tiny.same_bytes(tensor, expected[name]), f"{method}: {name} is another when pruned in memory")


def require_wanda(dense: Any, pruned: Any, report: Report, ids: Tensor) -> int:
    """Raise Wrong unless the masks are those of Wanda (arXiv:2306.11695, eq. 1) on the whole model, by plain hooks.

    Block after block: the inputs are those of the model whose earlier blocks are pruned. Returns the number of sites
    that hooks see; an expert's slice is not one.
    """
    blocks_name, blocks = find_blocks(dense)
    linear = {
        f"{name}.weight": module for name, module in dense.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    seen = 0
    for index, block in enumerate(blocks):
        here = [s.name for s in report.sites if s.name.startswith(f"{blocks_name}.{index}.") and s.name in linear]
        norms = _input_norms(dense, {name: linear[name] for name in here}, ids)
        for name, norm_I in norms.items():
            transposed = isinstance(linear[name], Conv1D)
            weight, kept = linear[name].weight.detach(), pruned.get_parameter(name) != 0
            score_OI = (weight.T if transposed else weight).abs() * norm_I
            _require_lowest(name, score_OI, kept.T if transposed else kept)
        seen += len(norms)
        block.load_state_dict(pruned.get_submodule(f"{blocks_name}.{index}").state_dict())
    return seen


def _input_norms(model: Any, modules: dict[str, nn.Module], ids: Tensor) -> dict[str, Tensor]:
    """Return the norm of every input feature, over all tokens, of the modules that are called."""
    squares: dict[str, Tensor] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x_TI = args[0].detach().reshape(-1, args[0].shape[-1]).double()
            squares[name] = squares.get(name, 0) + x_TI.square().sum(0)

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in modules.items()]
    tiny.logits(model, ids)
    for handle in handles:
        handle.remove()
    return {name: total.sqrt() for name, total in squares.items()}


def _require_lowest(name: str, score_OI: Tensor, kept_OI: Tensor) -> None:
    largest_removed_O = score_OI.masked_fill(kept_OI, 0).amax(1)
    smallest_kept_O = score_OI.masked_fill(~kept_OI, float("inf")).amin(1)
    _require(bool((largest_removed_O <= smallest_kept_O * 1.001).all()), f"{name}: the mask is not Wanda's")


def _describe(row: Row, report: Report, pruned: nn.Module) -> None:
    modules, (blocks_name, blocks) = dict(pruned.named_modules()), find_blocks(pruned)
    row.sites = dict(Counter(_kind(site.name, modules) for site in report.sites))
    row.covered = report.site_parameters / report.parameters
    row.covered_blocks = report.site_parameters / sum(parameter.numel() for parameter in blocks.parameters())
    row.dense = {}
    for name, reason in report.left_dense.items():
        place = re.sub(r"\[\d+\]$", "[*]", re.sub(rf"^{re.escape(blocks_name)}\.\d+\.", "", name))
        places = row.dense.setdefault(reason, [])
        if place not in places:
            places.append(place)


def _kind(name: str, modules: dict[str, nn.Module]) -> str:
    if _SLICE.fullmatch(name):
        return "expert slice"
    module = modules.get(name.removesuffix(".weight"))
    return "Conv1D" if isinstance(module, Conv1D) else "Linear" if isinstance(module, nn.Linear) else "other"


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise Wrong(what)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:160]}"
