"""Whole runs on a GPU that is the host: nothing meets what lies on another device, and the result is the CPU's."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import llmprune
import tiny
from llmprune.checkpoint import Source
from llmprune.forecast.dense import kept_blocks
from llmprune.model import Outline, Streamed, memory
from llmprune.model.skeleton import Loader
from llmprune.recipe import Recipe
from pretended_gpu import pretended_gpu

IDS = tiny.ids(4, 24)
RUNS: dict[str, dict[str, Any]] = {
    "fast": {"preset": "fast"},
    "fast 2:4": {"preset": "fast", "pattern": "2:4"},
    "balanced": {"preset": "balanced"},
    "balanced 2:4": {"preset": "balanced", "pattern": "2:4"},
    "best": {"preset": "best", "tune_epochs": 1, "method_options": {"iterations": 4, "stages": 2, "refit": 1}},
    **{method: {"method": method} for method in ("wanda", "sparsegpt", "dsnot", "taylor", "sparseswaps")},
    "rows": {"method": "wanda", "comparison_group": "row", "pattern": "60%"},
    "one after another": {"method": "sparsegpt", "true_sequential": True},
    "owl": {"method": "wanda", "allocation": "owl"},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.model("llama", torch.bfloat16, num_hidden_layers=2)
    return tiny.save(made, tmp_path_factory.mktemp("gpu") / "llama")


@pytest.mark.parametrize("run", RUNS)
def test_a_run_gives_what_the_cpu_gives(run: str, llama: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibration": IDS, **RUNS[run]}
    on_cpu = llmprune.prune(llama, tmp_path / "cpu", device="cpu", **options)
    with pretended_gpu() as gpu:
        on_gpu = llmprune.prune(llama, tmp_path / "gpu", device="cuda", **options)
    assert gpu.done.total > 100 and not on_gpu.retries and on_gpu.most_runs == on_cpu.most_runs
    assert on_gpu.zeros == on_cpu.zeros
    expected = {site.name: site.error for site in on_cpu.sites}
    assert {site.name: site.error for site in on_gpu.sites} == pytest.approx(expected, rel=0.3)
    assert sum(site.error for site in on_gpu.sites) == pytest.approx(sum(expected.values()), rel=0.1)
    assert llmprune.inspect(tmp_path / "gpu").verified


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt2"])
def test_other_architectures_run(family: str, tmp_path: Path) -> None:
    source = tiny.save(tiny.model(family, torch.bfloat16), tmp_path / "model")
    with pretended_gpu():
        report = llmprune.prune(source, tmp_path / "out", preset="fast", calibration=IDS, device="cuda")
    assert report.zeros > 0 and llmprune.inspect(tmp_path / "out").verified


def test_hidden_states_that_do_not_fit_wait_in_pinned_memory(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs, to_host = [], []
    for share in (0.4, 0.0):
        monkeypatch.setattr(memory, "_HIDDEN_SHARE", share)
        with pretended_gpu() as gpu:
            llmprune.prune(llama, tmp_path / str(share), preset="fast", calibration=IDS, device="cuda")
        outputs.append(tiny.tensors(tmp_path / str(share)))
        to_host.append(gpu.done.to_host)
        assert gpu.done.pageable <= gpu.done.to_gpu  # what goes to the host is pinned
    assert to_host[1] > 1.2 * to_host[0]
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])


@pytest.mark.parametrize("room", [0.1, 0.0])
def test_blocks_that_an_allocation_has_seen_are_read_once_where_they_fit(
    room: float, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loaded = Loader.load, list[str]()

    def counted(loader: Loader, names: list[str], *rest: Any, **options: Any) -> None:
        loaded.extend(names)
        load(loader, names, *rest, **options)

    monkeypatch.setattr(Loader, "load", counted)
    monkeypatch.setattr(memory, "_BLOCKS_SHARE", room)
    options: dict[str, Any] = {"method": "sparsegpt", "allocation": "fisher", "calibration": IDS}
    with pretended_gpu():
        llmprune.prune(llama, tmp_path / "out", device="cuda", **options)
    assert loaded.count("model.layers.0.mlp.up_proj.weight") == (1 if room else 3)
    assert llmprune.inspect(tmp_path / "out").verified


@pytest.mark.parametrize(("room", "kept"), [(100.0, 1.0), (5.0, 0.5), (0.0, 0.0)])  # room for so many blocks
def test_a_plan_knows_of_blocks_that_are_kept(room: float, kept: float, llama: Path) -> None:
    blocks = sum(tensor.nbytes for name, tensor in tiny.tensors(llama).items() if ".layers." in name)
    with pretended_gpu("meta", gibibytes=room * blocks / 2**30):
        host = Outline(llama, json.loads((llama / "config.json").read_text()), torch.device("cuda"), torch.bfloat16)
        recipe = Recipe.of({"preset": "balanced"})
        assert sum(part.amount for part in kept_blocks(host, recipe)) == pytest.approx(kept * blocks, abs=16)
        assert kept_blocks(host, Recipe.of({"preset": "fast"})) == []


def test_pruned_blocks_are_not_kept(llama: Path) -> None:
    with pretended_gpu():
        host = Streamed(Source.open(llama), torch.device("cuda"))
        block = host.blocks[0]
        with host.keeping():
            host.load(block)
            host.free(block)
        assert next(block.module.parameters()).is_meta
        host.load(block)
        weight = next(block.module.parameters())
        weight.data.zero_()
        host.free(block)
        host.load(block)
        assert next(block.module.parameters()).data.any()


def on_the_gpu(model: Any) -> Any:
    """Return a model whose tensors have gone to the GPU, which `Module.to` has no way to do here."""
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if isinstance(tensor, torch.nn.Parameter):
                module._parameters[name] = torch.nn.Parameter(tensor.data.to("cuda"), requires_grad=False)
            elif tensor is not None:
                module._buffers[name] = tensor.to("cuda")
    return model


@pytest.mark.parametrize("way", ["apart", "together", "in place"])
def test_clocks_and_counts_are_those_of_the_gpu_that_was_asked_for(
    way: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's are of the current GPU, the first one if nobody says otherwise: there they would be idle, and take memory."""
    current, asked = [torch.device("cuda", 7)], list[torch.device]()

    @contextmanager
    def made_current(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def synchronize(*_: Any) -> None:
        asked.append(current[-1])

    def allocated(*_: Any) -> int:
        asked.append(current[-1])
        return 0

    options: dict[str, Any] = {"method": "wanda", "calibration": IDS}
    with pretended_gpu():
        monkeypatch.setattr(torch.cuda, "device", made_current)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        for name in ("memory_allocated", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda *device: 0 if device else allocated())
        if way == "in place":
            llmprune.prune(on_the_gpu(tiny.load(llama)), **options)
        else:
            pattern: Any = "50%" if way == "apart" else ["50%", "2:4"]
            llmprune.prune(llama, tmp_path / "out", pattern=pattern, device="cuda", **options)
        monkeypatch.undo()
    assert len(asked) > 10 and set(asked) == {torch.device("cuda", 0)} and len(current) == 1
