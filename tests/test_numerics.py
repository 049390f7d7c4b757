"""Numbers at their limits, through the whole program: exact counts and finite weights, or one line that names the place."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmprune
import tiny
from llmprune.errors import NumericalError
from llmprune.report import Report

IDS = tiny.ids(4, 16)
BLOCK = "model.layers.1"
UP, DOWN, NORM = f"{BLOCK}.mlp.up_proj.weight", f"{BLOCK}.mlp.down_proj.weight", f"{BLOCK}.input_layernorm.weight"

Edit = Callable[[Tensor], Any]


def model_with(folder: Path, edits: dict[str, Edit], dtype: torch.dtype = torch.float32) -> Path:
    model = tiny.model("llama", dtype)
    for name, edit in edits.items():
        edit(model.get_parameter(name).data)
    return tiny.save(model, folder / "source")


def prune(source: Path, **options: Any) -> Report:
    return llmprune.prune(source, source.with_name("out"), **{"calibration": IDS} | options)


def require_sound(report: Report, out: Path) -> None:
    """Exactly half of each matrix is zero, with no sign, all else is finite, and the report is plain JSON."""
    assert llmprune.inspect(out).verified
    tensors = tiny.tensors(out)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    for site in report.sites:
        assert site.zeros >= site.shape[0] * site.shape[1] // 2
        assert not bool(((tensors[site.name] == 0) & torch.signbit(tensors[site.name])).any())
    json.loads((out / "llmprune.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def dead(norm: Tensor) -> None:
    norm[10:20] = 0


def constant(norm: Tensor) -> None:
    norm.zero_()


def outlier(norm: Tensor) -> None:
    norm[7] = 1e4


def negative_zeros(weight: Tensor) -> None:
    weight[:, ::3] = -0.0


def denormal(weight: Tensor) -> None:
    weight.mul_(1e-39)


def all_zero(weight: Tensor) -> None:
    weight.zero_()


EXTREMES: dict[str, dict[str, Edit]] = {
    "inputs that are always zero": {NORM: dead},
    "no inputs but zeros": {NORM: constant},
    "a huge outlier": {NORM: outlier},
    "negative zeros": {UP: negative_zeros, DOWN: negative_zeros},
    "denormal weights": {UP: denormal},
    "a matrix of zeros": {UP: all_zero},
}


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("magnitude", torch.float32),
        ("wanda", torch.bfloat16),
        ("sparsegpt", torch.float32),
        ("sparsegpt", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_are_pruned_exactly(name: str, method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = model_with(tmp_path, EXTREMES[name], dtype)
    require_sound(prune(source, method=method), tmp_path / "out")


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_fewer_tokens_than_inputs_are_damped_step_by_step_and_the_report_says_so(
    pattern: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = model_with(tmp_path, {})
    report = prune(source, pattern=pattern, calibration=tiny.ids(1, 8), method_options={"damp": 0})
    require_sound(report, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    for site in written["sites"]:
        assert any("not positive definite at damping 0, raised to" in note for note in site["notes"])
    steps = [record for record in caplog.records if "not positive definite" in record.getMessage()]
    assert len(steps) >= 4 * tiny.BLOCKS
    assert {record.levelno for record in steps} == {logging.WARNING}
    assert "not positive definite at damping 0" in str(report)


def test_activations_that_overflow_float16_are_one_line_with_the_way_out(tmp_path: Path) -> None:
    source = model_with(tmp_path, {UP: lambda weight: weight.mul_(2e4)}, torch.float16)
    with pytest.raises(NumericalError, match=rf"{DOWN}: its calibration inputs .*--dtype (bfloat16|float32)") as caught:
        prune(source)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    require_sound(prune(source, dtype="float32"), tmp_path / "out")


def test_a_statistic_that_overflows_float32_is_one_line(tmp_path: Path) -> None:
    source = model_with(tmp_path, {NORM: lambda norm: norm.mul_(1e20)})
    with pytest.raises(NumericalError, match=rf"{BLOCK}\.self_attn\.q_proj\.weight: its calibration inputs"):
        prune(source)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "sparsegpt"},
        {"method": "admm"},
        {"method": "thanos"},
        {"method": "sparsegpt", "true_sequential": True, "dense_target": 0.5},
        {"method": "sparsegpt", "allocation": "error"},
    ],
    ids=str,
)
def test_a_statistic_whose_mean_overflows_float32_names_the_matrix(options: dict[str, Any], tmp_path: Path) -> None:
    source = model_with(tmp_path, {UP: lambda weight: weight.mul_(1e18)})
    with pytest.raises(NumericalError, match=rf"{DOWN}: .*not positive definite"):
        prune(source, **options)
    require_sound(prune(source, method="wanda"), tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_solution_beyond_the_stored_dtype_is_one_line(dtype: str, tmp_path: Path) -> None:
    """Inputs that are nearly the same: what is left has to make up for what is removed."""
    source = model_with(tmp_path, {DOWN: lambda weight: weight.fill_(6e4)}, torch.float16)
    says = rf"solution of {DOWN} holds NaN or infinity: its new weights are out of the range of torch\.float16"
    with pytest.raises(NumericalError, match=says):
        prune(source, dtype=dtype, calibration=tiny.ids(1, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
