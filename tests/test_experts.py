"""Experts of a mixture: each is pruned from its own routed tokens, however the model and the file store them."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

import llmprune
import tiny
from llmprune import prune
from llmprune.checkpoint import Source
from llmprune.model import Streamed, streamed_logits
from llmprune.model.sites import sites_of

CPU = torch.device("cpu")
IDS = tiny.ids(4, 24)
Saved = Callable[..., Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Return a function that saves a tiny mixture of experts once."""
    folders: dict[Any, Path] = {}

    def save(family: str, dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in folders:
            folders[family, dtype] = tiny.save(tiny.model(family, dtype), tmp_path_factory.mktemp(family) / "m")
        return folders[family, dtype]

    return save


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(f'{{"input_ids": {row.tolist()}}}\n' for row in tiny.ids(8, 24, seed=3)))
    return path


def slices(folder: Path) -> dict[str, Tensor]:
    """Return every expert's matrix [outputs, inputs] of a checkpoint by its site's name."""
    model = tiny.load(folder)
    host = Streamed(Source.open(folder), CPU)
    return {
        site.name: site.view(model.get_parameter(site.tensor).data)
        for block in host.blocks
        for site in sites_of(block)
        if site.expert is not None
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", tiny.EXPERTS)
def test_streamed_logits_are_those_of_the_whole_model(family: str, dtype: torch.dtype, saved: Saved) -> None:
    folder = saved(family, dtype)
    assert torch.equal(streamed_logits(folder, IDS), tiny.logits(tiny.load(folder), IDS))


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
@pytest.mark.parametrize("family", tiny.EXPERTS)
def test_every_expert_is_pruned_exactly(
    family: str, pattern: str, saved: Saved, calibration: Path, tmp_path: Path
) -> None:
    source, out = saved(family), tmp_path / "out"
    report = prune(source, out, method="wanda", pattern=pattern, calibration=str(calibration), samples=8)
    assert report.coverage > 0.9
    pruned = slices(out)
    assert pruned.keys() == {site.name for site in report.sites if site.name.endswith("]")}
    for weight in pruned.values():
        assert int((weight == 0).sum()) == weight.numel() // 2
        if pattern == "2:4":
            assert bool(((weight != 0).unflatten(1, (-1, 4)).sum(2) == 2).all())
    layout = [{name: (t.shape, t.dtype) for name, t in tiny.tensors(folder).items()} for folder in (source, out)]
    assert layout[0] == layout[1]
    assert torch.equal(tiny.logits(tiny.load(out), IDS), streamed_logits(out, IDS))
    assert llmprune.inspect(out).verified


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "olmoe", "deepseek-v3", "gpt-oss", "llama4"])
def test_sparsegpt_beats_magnitude_on_the_tokens_each_expert_is_given(
    family: str, saved: Saved, calibration: Path, tmp_path: Path
) -> None:
    inputs = routed_inputs(tiny.load(saved(family)), tiny.ids(8, 24, seed=3))
    dense, errors = slices(saved(family)), {}
    for method in ("sparsegpt", "magnitude"):
        out = tmp_path / method
        prune(saved(family), out, method=method, pattern="2:4", calibration=str(calibration), samples=8)
        pruned = slices(out)
        errors[method] = {
            name: float(((dense[name] - pruned[name]) @ x.T).square().sum()) for name, x in inputs.items()
        }
    for name, x in inputs.items():
        assert errors["sparsegpt"][name] < errors["magnitude"][name] or not len(x), name


def routed_inputs(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Return what each expert of the first mixture in a model is given: [tokens, inputs] by the site's name."""
    path, experts = next((path, module) for path, module in model.named_modules() if path.endswith(".experts"))
    calls: list[tuple[Tensor, ...]] = []
    with experts.register_forward_pre_hook(lambda module, args: calls.append(args)):
        tiny.logits(model, ids)
    ((hidden, *routed),) = calls
    found = {}
    for expert in range(len(experts.down_proj)):
        if routed:
            x = hidden.reshape(-1, hidden.shape[-1])[(routed[0] == expert).any(-1)]
        else:  # Llama 4 gives every token to every expert, as zeros where it is not chosen
            x = hidden.view(len(experts.down_proj), -1, hidden.shape[-1])[expert]
            x = x[x.abs().sum(1) > 0]
        found[f"{path}.gate_up_proj[{expert}]"] = x
    return found


def test_starved_experts_are_reported_and_pruned_all_the_same(tmp_path: Path, calibration: Path) -> None:
    model = tiny.model("qwen3-moe")
    report = prune(
        tiny.save(model, tmp_path / "m"), tmp_path / "out", pattern="2:4", calibration=str(calibration), samples=1
    )
    experts = [site for site in report.sites if site.name.endswith("]")]
    starved = [site for site in experts if site.tokens < site.shape[1]]
    assert starved
    for site in experts:
        assert site.zeros == site.shape[0] * site.shape[1] // 2
        assert any("shrunk" in note for note in site.notes) == (site in starved)


def test_experts_can_be_excluded_by_the_name_of_their_tensor(saved: Saved, tmp_path: Path) -> None:
    report = prune(saved("mixtral"), tmp_path / "out", method="magnitude", exclude="*experts*")
    assert not any(site.name.endswith("]") for site in report.sites)
    assert report.left_dense["model.layers.0.mlp.experts.gate_up_proj"] == "excluded"


def test_a_run_that_leaves_most_of_the_model_dense_says_so(
    saved: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmprune.planning._SMALL_SHARE", 1.1)
    prune(saved("mixtral"), tmp_path / "asked-for", method="magnitude", exclude="*experts*")
    prune(saved("mixtral"), tmp_path / "out", method="magnitude")
    (line,) = [record.getMessage() for record in caplog.records]
    assert "of the parameters beside embeddings" in line


def test_routers_and_biases_stay_dense_and_are_listed(saved: Saved, tmp_path: Path) -> None:
    report = prune(saved("gpt-oss"), tmp_path / "out", method="magnitude")
    assert report.left_dense["model.layers.0.mlp.router.weight"] == "router"
    before, after = tiny.tensors(saved("gpt-oss")), tiny.tensors(tmp_path / "out")
    for name in before:
        if "bias" in name or "router" in name:
            assert tiny.same_bytes(before[name], after[name]), name


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_a_loaded_mixture_is_pruned_in_place_as_its_checkpoint_is(
    family: str, saved: Saved, calibration: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"method": "wanda", "pattern": "2:4", "calibration": str(calibration), "samples": 8}
    model = tiny.load(saved(family))
    implementation = model.config._experts_implementation
    prune(model, **options)
    assert model.config._experts_implementation == implementation
    prune(saved(family), tmp_path / "out", **options)
    assert torch.equal(tiny.logits(model, IDS), tiny.logits(tiny.load(tmp_path / "out"), IDS))


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_experts_that_accelerate_offloads_are_pruned_from_their_tokens(
    family: str, saved: Saved, calibration: Path
) -> None:
    """Their weights are in memory only while their module runs."""
    options: dict[str, Any] = {"method": "wanda", "pattern": "2:4", "calibration": str(calibration), "samples": 8}
    plain, offloaded = tiny.load(saved(family)), tiny.load(saved(family))
    expected = prune(plain, **options)
    cpu_offload(offloaded, execution_device=CPU)
    report = prune(offloaded, **options)
    assert [(site.name, site.tokens, site.error) for site in report.sites] == [
        (site.name, site.tokens, site.error) for site in expected.sites
    ]
    assert torch.equal(tiny.logits(offloaded, IDS), tiny.logits(plain, IDS))


def test_a_dense_target_tells_that_it_stops_at_experts(saved: Saved, calibration: Path) -> None:
    report = prune(
        tiny.load(saved("mixtral")), calibration=str(calibration), samples=8, true_sequential=True, dense_target=0.5
    )
    assert any("no dense target" in note for note in report.notes)


class _Experts(nn.Module):
    """Experts in modules of their own, as models that bring their code have them."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList([mlp, deepcopy(mlp)])

    def forward(self, x: Tensor) -> Tensor:
        one, other = x.tensor_split(2, dim=-2)
        return torch.cat([self.experts[0](one), self.experts[1](other)], dim=-2)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_report_tells_that_no_dense_target_follows_tokens_to_experts(family: str) -> None:
    model = tiny.model(family)
    if family == "llama":
        for block in model.model.layers:
            block.mlp = _Experts(block.mlp)
    report = prune(model, calibration=IDS, method="sparsegpt", true_sequential=True, dense_target=0.5)
    assert any(".experts" in site.name for site in report.sites)
    assert any("no dense target follows tokens" in note for note in report.notes)
