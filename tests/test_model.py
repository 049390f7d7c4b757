"""One block in memory at a time computes what the whole model computes, bit for bit, and errors leave no trace."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from llmprune.checkpoint import Source
from llmprune.errors import CheckpointError, NumericalError, UnsupportedModelError
from llmprune.model import Lanes, Resident, Streamed, load_causal_lm, streamed_logits
from llmprune.model.blocks import find_blocks
from llmprune.model.sites import Stage

CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj.weight"


def lanes_of(host: Resident, batches: Sequence[Tensor], stages: Sequence[Stage] | None = None) -> Lanes:
    return Lanes(host.model, stages or [*host.blocks, host.head], batches, CPU, host.device_of)


def llama(folder: Path, **changes: Any) -> Path:
    return tiny.save(tiny.model("llama", **changes), folder)


def run_through(host: Streamed) -> None:
    """Do what a run does to every stage."""
    host.open(CPU)
    for stage in [*host.blocks, host.head]:
        host.load(stage)
        host.free(stage)


def untouched(model: nn.Module) -> bool:
    return not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_streamed_logits_are_those_of_the_whole_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder, ids = tiny.save(tiny.model(family, dtype), tmp_path / "m"), tiny.ids(3, 24)
    logits = streamed_logits(folder, ids)
    assert logits.dtype == dtype
    assert torch.equal(logits, tiny.logits(tiny.load(folder), ids))


def test_the_sliding_window_of_the_mixed_model_matters(tmp_path: Path) -> None:
    """Guard of the test above: with full attention everywhere the logits would be others."""
    model, ids = tiny.model("gemma2"), tiny.ids(2, 24)
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
    wide = tiny.model("gemma2", sliding_window=tiny.CONTEXT)
    assert not torch.equal(tiny.logits(model, ids), tiny.logits(wide, ids))


def test_load_causal_lm_is_the_same_model(tmp_path: Path) -> None:
    folder, ids = llama(tmp_path / "m"), tiny.ids(2)
    assert torch.equal(tiny.logits(load_causal_lm(Source.open(folder), CPU), ids), streamed_logits(folder, ids))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_base_model_names_are_understood(family: str, tmp_path: Path) -> None:
    """The first GPT-2 and OPT checkpoints name their tensors without the prefix of the causal model."""
    model, ids = tiny.model(family, tie_word_embeddings=True), tiny.ids(2)
    folder = tiny.save_base(model, tmp_path / "m")
    assert torch.equal(streamed_logits(folder, ids), tiny.logits(model, ids))


def test_lanes_are_visited_in_order_and_end_with_the_models_logits() -> None:
    host, batches = Resident(tiny.model("llama")), [tiny.ids(2, 24), tiny.ids(1, 9), tiny.ids(3, 17)]
    seen: list[tuple[int, tuple[int, ...]]] = []
    with lanes_of(host, batches) as lanes:
        for index, stage in enumerate([*host.blocks, host.head]):
            handle = stage.module.register_forward_pre_hook(
                lambda module, args, at=index: seen.append((at, args[0].shape[:2]))
            )
            lanes.advance(index)
            handle.remove()
        outputs = lanes.outputs()
    shapes = [tuple(batch.shape) for batch in batches]
    assert seen == [(stage, shape) for stage in range(tiny.BLOCKS + 1) for shape in shapes]
    for batch, output in zip(batches, outputs, strict=True):
        assert torch.equal(output.logits, tiny.logits(host.model, batch))


def test_running_a_stage_leaves_the_lanes_where_they_are() -> None:
    host, ids = Resident(tiny.model("llama")), tiny.ids(2)
    with lanes_of(host, [ids]) as lanes:
        assert torch.equal(lanes.run(0, 0), lanes.run(0, 0))
        for index in range(tiny.BLOCKS + 1):
            lanes.advance(index)
        logits = lanes.outputs()[0].logits
    assert torch.equal(logits, tiny.logits(host.model, ids))


def test_lanes_that_are_left_early_leave_no_trace() -> None:
    host = Resident(tiny.model("llama"))
    with lanes_of(host, [tiny.ids(2), tiny.ids(2, 7)]) as lanes:
        lanes.advance(0)
    assert untouched(host.model)
    tiny.logits(host.model, tiny.ids(1))


@pytest.mark.parametrize(
    ("place", "stages_before"),
    [("model.embed_tokens", 0), ("model.layers.0.mlp", 0), ("model.layers.1.self_attn.o_proj", 1), ("model.norm", 2)],
    ids=["glue before the blocks", "first block", "second block", "glue after the blocks"],
)
@pytest.mark.parametrize("grad", [True, False])
def test_an_error_reaches_the_caller_and_restores_everything(place: str, stages_before: int, grad: bool) -> None:
    host = Resident(tiny.model("llama"))
    host.model.train()

    def fail(module: nn.Module, args: Any) -> None:
        raise ZeroDivisionError(place)

    host.model.get_submodule(place).register_forward_pre_hook(fail)
    reached = 0
    with torch.set_grad_enabled(grad):
        with (
            pytest.raises(ZeroDivisionError, match=place),
            lanes_of(host, [tiny.ids(2), tiny.ids(1, 9)], host.blocks) as lanes,
        ):
            for index in range(tiny.BLOCKS):
                lanes.advance(index)
                reached += 1
        assert torch.is_grad_enabled() == grad
    assert reached == stages_before
    assert untouched(host.model)
    assert all(module.training for module in host.model.modules())


def test_grad_mode_is_off_inside_and_restored_after() -> None:
    host = Resident(tiny.model("llama"))
    with torch.enable_grad():
        with lanes_of(host, [tiny.ids(2)]) as lanes:
            assert not torch.is_grad_enabled()
            assert not lanes.run(0, 0).requires_grad
        assert torch.is_grad_enabled()


def test_a_forward_that_somebody_else_replaced_is_given_back() -> None:
    host = Resident(tiny.model("llama"))
    block = host.blocks[0].module
    mine = block.forward
    block.forward = mine
    with lanes_of(host, [tiny.ids(2)]) as lanes:
        lanes.advance(0)
    assert vars(block)["forward"] is mine


def test_dropout_is_off_inside_the_lanes() -> None:
    host = Resident(tiny.model("gpt2").train())
    with lanes_of(host, [tiny.ids(2)]) as lanes:
        assert torch.equal(lanes.run(0, 0), lanes.run(0, 0))
    assert host.model.training


def test_blocks_out_of_order_are_refused() -> None:
    host = Resident(tiny.model("llama"))
    with (
        pytest.raises(UnsupportedModelError, match=r"model\.layers\.2: .*once each and in order"),
        lanes_of(host, [tiny.ids(2)], host.blocks[::-1]) as lanes,
    ):
        lanes.advance(0)
    assert untouched(host.model)


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "model.layers"), ("gpt2", "transformer.h"), ("opt", "model.decoder.layers"), ("gemma2", "model.layers")],
)
def test_the_blocks_are_found(family: str, name: str) -> None:
    found, blocks = find_blocks(tiny.model(family))
    assert found == name
    assert len(blocks) == (4 if family == "gemma2" else tiny.BLOCKS)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Sequential: found no list of decoder blocks"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("thing", [object(), nn.Linear(2, 2)])
def test_what_is_no_transformers_model_is_refused(thing: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="is no transformers model"):
        Resident(thing)


def test_a_quantized_model_is_refused() -> None:
    model = tiny.model("llama")
    model.config.quantization_config = {"bits": 4}
    with pytest.raises(UnsupportedModelError, match="is quantized"):
        Resident(model)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_freed_stages_hold_no_weights(family: str, tmp_path: Path) -> None:
    host = Streamed(Source.open(tiny.save(tiny.model(family), tmp_path / "m")), CPU)
    host.open(CPU)
    assert all(parameter.is_meta for block in host.blocks for parameter in block.module.parameters())
    for block in host.blocks:
        host.load(block)
        assert not any(parameter.is_meta for parameter in block.module.parameters())
        host.free(block)
        assert all(parameter.is_meta for parameter in block.module.parameters())


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_the_ends_can_be_loaded_again_after_being_freed(family: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    host = Streamed(Source.open(tiny.save(model, tmp_path / "m")), CPU)
    host.open(CPU)
    for stage in (host.embedding, host.head, host.embedding, host.head):
        host.load(stage)
        assert torch.equal(
            stage.module.get_parameter("weight"), model.get_submodule(stage.name).get_parameter("weight")
        )
        host.free(stage)


@pytest.mark.parametrize("name", [UP, "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    folder = tiny.rewrite(llama(tmp_path / "m"), **{name: None})
    with pytest.raises(CheckpointError, match=f"lacks the tensor {name}"):
        Streamed(Source.open(folder), CPU)


@pytest.mark.parametrize("name", [UP, "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_a_wrong_shape_is_named(name: str, tmp_path: Path) -> None:
    folder = tiny.rewrite(llama(tmp_path / "m"), **{name: torch.ones(3, 5)})
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[3, 5\]"):
        Streamed(Source.open(folder), CPU)


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("model.norm.weight", None, "lacks the tensor"),
        ("model.layers.1.self_attn.q_proj.weight", None, "lacks the tensor"),
        ("model.layers.1.self_attn.q_proj.weight", torch.ones(3, 5), r"has shape \[3, 5\]"),
        (EXPERT, None, "does not fit the model's config"),
        (EXPERT, torch.ones(3, 5), "does not fit the model's config"),
    ],
)
def test_a_model_of_fused_experts_names_what_is_wrong(
    name: str, value: Tensor | None, says: str, tmp_path: Path
) -> None:
    folder = tiny.rewrite(tiny.save(tiny.model("qwen3-moe"), tmp_path / "m"), **{name: value})
    place = "model.layers.1.mlp.experts" if name == EXPERT else name
    with pytest.raises(CheckpointError, match=f"{place}.*{says}|{says} {place}"):
        run_through(Streamed(Source.open(folder), CPU))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", UP),
        ("llama", "model.layers.2.input_layernorm.weight"),
        ("llama", "model.norm.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("llama", "lm_head.weight"),
        ("llama-tied", "model.embed_tokens.weight"),
        ("gpt2", "transformer.wpe.weight"),
    ],
)
def test_a_weight_that_is_not_finite_is_named(family: str, name: str, value: float, tmp_path: Path) -> None:
    folder = tiny.save(tiny.model(family), tmp_path / "m")
    damaged = tiny.tensors(folder)[name].clone()
    damaged.view(-1)[-1] = value
    host = Streamed(Source.open(tiny.rewrite(folder, **{name: damaged})), CPU)
    with pytest.raises(NumericalError, match=f"{name} holds NaN or infinity"):
        run_through(host)


def test_an_fp8_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    folder = llama(tmp_path / "m")
    eighths = tiny.tensors(folder)[UP].to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=f"{UP} is stored as F8_E4M3"):
        Streamed(Source.open(tiny.rewrite(folder, **{UP: eighths})), CPU)
