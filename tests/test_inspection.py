"""`llmprune.inspect`: what a checkpoint truly holds, and whether it keeps what its llmprune.json promises."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmprune
import tiny
from llmprune.checkpoint import source
from llmprune.errors import CheckpointError
from llmprune.inspection import Inspection, TensorReport

INDEX = "model.safetensors.index.json"
SITE = {
    "llama": "model.layers.1.mlp.down_proj.weight",
    "llama-tied": "model.layers.0.self_attn.q_proj.weight",
    "gpt2": "transformer.h.1.mlp.c_fc.weight",
    "opt": "model.decoder.layers.2.fc1.weight",
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a tiny dense model of a family."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def saved(family: str) -> Path:
        return tiny.save(tiny.model(family), folder / family)

    return saved


def pruned(model: Path, out: Path, pattern: str = "50%") -> Path:
    llmprune.prune(model, out, method="magnitude", pattern=pattern)
    return out


def edit_tensor(folder: Path, name: str, edit: Callable[[Tensor], object]) -> None:
    path = folder / json.loads((folder / INDEX).read_text("utf-8"))["weight_map"][name]
    tensors = load_file(path)
    edit(tensors[name])
    save_file(tensors, path, {"format": "pt"})


def edit_report(folder: Path, edit: Callable[[dict[str, list[dict[str, object]]]], None]) -> None:
    path = folder / "llmprune.json"
    report = json.loads(path.read_text("utf-8"))
    edit(report)
    path.write_text(json.dumps(report), "utf-8")


def tensor(inspection: Inspection, name: str) -> TensorReport:
    (found,) = [report for report in inspection.tensors if report.name == name]
    return found


def stored_name(folder: Path, name: str) -> str:
    names = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
    return name if name in names else name.removeprefix("transformer.")


def shift_groups(weight: Tensor) -> None:
    """Keep the count of zeros, but move them across the borders of the groups along the inputs."""
    weight.copy_(weight.roll(1, dims=1))


@pytest.mark.parametrize("pattern", ["50%", "2:4", "4:8"])
@pytest.mark.parametrize("family", SITE)
def test_what_prune_wrote_is_verified(dense: Callable[[str], Path], tmp_path: Path, family: str, pattern: str) -> None:
    inspection = llmprune.inspect(pruned(dense(family), tmp_path / "out", pattern))
    assert inspection.verified is True and inspection.faults == []
    assert inspection.sparsity(sites_only=True) == 0.5
    assert 0 < inspection.sparsity(sites_only=False) < 0.5
    assert "all promises of llmprune.json kept" in str(inspection)


@pytest.mark.parametrize("family", SITE)
def test_a_pattern_is_found_along_the_inputs(dense: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    inspection = llmprune.inspect(pruned(dense(family), tmp_path / "out", "2:4"))
    sites = [report for report in inspection.tensors if report.site]
    assert sites and all("2:4" in report.tight_patterns() for report in sites)
    assert not any(report.tight_patterns() for report in inspection.tensors if not report.site)


def test_a_plain_model_promises_nothing(dense: Callable[[str], Path]) -> None:
    inspection = llmprune.inspect(dense("llama"))
    assert inspection.verified is None and inspection.sparsity(sites_only=True) == 0
    assert "no llmprune.json" in str(inspection)
    assert json.loads(json.dumps(inspection.to_json()))["verified"] is None


@pytest.mark.parametrize("family", SITE)
def test_a_tensor_made_dense_afterwards_is_a_fault(dense: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    out = pruned(dense(family), tmp_path / "out")
    name = stored_name(out, SITE[family])
    edit_tensor(out, name, lambda weight: weight.fill_(1.0))
    inspection = llmprune.inspect(out)
    (fault,) = inspection.faults
    assert inspection.verified is False and fault.startswith(f"{name}: has 0 zeros")
    assert "BROKEN" in str(inspection) and fault in str(inspection)


def test_zeros_that_no_longer_form_the_pattern_are_a_fault(dense: Callable[[str], Path], tmp_path: Path) -> None:
    out = pruned(dense("llama"), tmp_path / "out", "2:4")
    edit_tensor(out, SITE["llama"], shift_groups)
    assert llmprune.inspect(out).faults == [f"{SITE['llama']}: is not 2:4"]


def test_a_promise_for_a_tensor_that_is_not_there_is_a_fault(dense: Callable[[str], Path], tmp_path: Path) -> None:
    out = pruned(dense("llama"), tmp_path / "out")
    edit_report(out, lambda report: report["sites"][0].update(name="nowhere"))
    assert llmprune.inspect(out).faults == ["nowhere: promised, but the checkpoint has no such tensor"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"sites": [{"name": "a"}]}', '{"sites": 5}'])
def test_a_damaged_report_is_named(dense: Callable[[str], Path], tmp_path: Path, text: str) -> None:
    out = pruned(dense("llama"), tmp_path / "out")
    (out / "llmprune.json").write_text(text, "utf-8")
    with pytest.raises(CheckpointError, match=r"llmprune\.json is damaged"):
        llmprune.inspect(out)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("elements", [1, 1000, 10_000])
def test_the_size_of_the_pieces_does_not_matter(
    dense: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, elements: int
) -> None:
    out = pruned(dense(family), tmp_path / "out", "2:4")
    whole = llmprune.inspect(out)
    monkeypatch.setattr(source, "_CHECK_ELEMENTS", elements)
    assert llmprune.inspect(out) == whole


def test_conv1d_is_grouped_along_its_inputs_and_not_as_it_is_stored(
    dense: Callable[[str], Path], tmp_path: Path
) -> None:
    out = pruned(dense("gpt2"), tmp_path / "out", "2:4")
    name = stored_name(out, SITE["gpt2"])
    stored_IO = tiny.tensors(out)[name]
    assert torch.equal((stored_IO.T.reshape(-1, 4) != 0).sum(1), torch.full((stored_IO.numel() // 4,), 2))
    edit_tensor(out, name, lambda weight: weight.copy_(weight.roll(1, dims=0)))
    assert llmprune.inspect(out).faults == [f"{name}: is not 2:4"]


def test_negative_zeros_are_counted(dense: Callable[[str], Path], tmp_path: Path) -> None:
    out = pruned(dense("llama"), tmp_path / "out")
    assert all(report.negative_zeros == 0 for report in llmprune.inspect(out).tensors)
    edit_tensor(out, SITE["llama"], lambda weight: weight[0].fill_(-0.0))
    report = tensor(llmprune.inspect(out), SITE["llama"])
    assert report.negative_zeros == 96 and report.zeros >= 96


def test_the_tightest_pattern_of_every_width_is_told(dense: Callable[[str], Path], tmp_path: Path) -> None:
    out = pruned(dense("llama"), tmp_path / "out")

    def keep_one_of_eight(weight: Tensor) -> None:
        weight.zero_()
        weight[:, ::8] = 1

    edit_tensor(out, "model.layers.0.self_attn.q_proj.weight", keep_one_of_eight)
    report = tensor(llmprune.inspect(out), "model.layers.0.self_attn.q_proj.weight")
    assert report.patterns == ("1:4", "1:8", "2:16", "4:32", "8:64")
    assert report.tight_patterns() == ["1:8", "2:16", "4:32", "8:64"]
    assert (report.shape, report.dtype, report.count, report.zeros) == ((64, 64), "F32", 4096, 3584)


def test_a_broken_pattern_of_an_unusual_width_is_found(dense: Callable[[str], Path], tmp_path: Path) -> None:
    out = pruned(dense("llama"), tmp_path / "out", "1:2")
    assert llmprune.inspect(out).verified
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_tensor(out, name, lambda weight: weight.copy_(weight.sort(dim=1).values))
    inspection = llmprune.inspect(out)
    assert inspection.verified is False
    assert inspection.faults == [f"{name}: is not 1:2"]
