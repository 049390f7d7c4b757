"""Sparse layers in models: the swap, the gate that decides it, generation, and the commands around it."""

import copy
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmprune
import tiny
from llmprune.checkpoint.compressed import compress
from llmprune.cli import cli
from llmprune.errors import LlmpruneError, RecipeError, UnsupportedModelError
from llmprune.sparse import gate
from llmprune.sparse.bench import _prompt_length, bench, linear_bytes, twin
from llmprune.sparse.forms import Dense, Form, Packed, Step
from llmprune.sparse.gate import Timing, Verdict, judge
from llmprune.sparse.linear import SparseLinear
from llmprune.sparse.running import generate
from llmprune_kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")


def half_zero(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name and "lm_head" not in name:
                parameter.masked_fill_(parameter.abs() < parameter.abs().float().median(), 0)
    return model


def model(family: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Any:
    return half_zero(tiny.model(family, dtype))


def sparse_layers(made: nn.Module) -> list[str]:
    return [name for name, layer in made.named_modules() if isinstance(layer, SparseLinear)]


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Keep what is measured in a test out of the user's cache; the library stays loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llmprune" / "gate.json"


def timings(dense: float, bitmask: float, expand: float) -> Any:
    """Return what stands in for a measurement: the same seconds whatever is asked."""

    def measure(weights: Any, packed: Any, tokens: int, machine: Any) -> Timing:
        return timing(tokens, dense, bitmask, expand)

    return measure


def timing(tokens: int, dense: float, bitmask: float, expand: float) -> Timing:
    return Timing(tokens, {"dense": dense, "bitmask": bitmask, "expand": expand})


@pytest.fixture
def sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_measure", timings(2.0, 1.0, 3.0))


@pytest.fixture
def dense_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_measure", timings(1.0, 2.0, 3.0))


def near(found: Tensor, expected: Tensor) -> None:
    scale = float(expected.float().abs().max())
    limit = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[expected.dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=limit * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "opt", "qwen3-moe"])
@pytest.mark.usefixtures("sparse_wins")
def test_a_sparse_model_computes_what_the_dense_one_does(family: str, dtype: torch.dtype) -> None:
    dense = model(family, dtype)
    made = twin(dense)
    result = llmprune.sparsify(made)
    assert sparse_layers(made) and not sparse_layers(dense)
    near(tiny.logits(made, tiny.ids(2)), tiny.logits(dense, tiny.ids(2)))
    assert sum(choice.layers for choice in result.choices if choice.kernel == "bitmask") == len(sparse_layers(made))
    assert bool(result.experts) == (family == "qwen3-moe")
    assert result.sparse_layers >= len(sparse_layers(made))


@pytest.mark.usefixtures("sparse_wins")
def test_what_has_too_few_zeros_or_is_tied_stays_dense() -> None:
    made = model()
    result = llmprune.sparsify(made)
    assert type(made.lm_head) is nn.Linear
    assert [choice.reason for choice in result.choices if choice.kernel == "dense"] == ["too few zeros"]
    tied = model("llama-tied")
    tied.get_input_embeddings().weight.data.masked_fill_(torch.rand(160, 64) < 0.6, 0)
    llmprune.sparsify(tied)
    assert type(tied.lm_head) is nn.Linear


@pytest.mark.usefixtures("dense_wins")
def test_where_dense_is_faster_the_model_stays_dense() -> None:
    made = model()
    result = llmprune.sparsify(made)
    assert not sparse_layers(made)
    assert {choice.kernel for choice in result.choices} == {"dense"}


def test_a_layer_that_loses_becomes_dense_again(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = model()
    made = twin(dense)
    monkeypatch.setattr(gate, "_measure", timings(2.0, 1.0, 3.0))
    llmprune.sparsify(made)
    monkeypatch.setattr(gate, "_measure", timings(1.0, 2.0, 3.0))
    llmprune.sparsify(made, batch=5)  # not measured yet
    assert not sparse_layers(made)
    assert torch.equal(tiny.logits(made, tiny.ids(2)), tiny.logits(dense, tiny.ids(2)))


@pytest.mark.usefixtures("sparse_wins")
def test_densify_restores_every_bit() -> None:
    dense = model("opt")
    made = twin(dense)
    llmprune.sparsify(made)
    llmprune.densify(made)
    assert not sparse_layers(made)
    assert all(torch.equal(made.state_dict()[name], tensor) for name, tensor in dense.state_dict().items())
    assert list(made.state_dict()) == list(dense.state_dict())


@pytest.mark.usefixtures("sparse_wins")
def test_the_state_dict_is_the_dense_one_both_ways() -> None:
    dense, other = model(), half_zero(tiny.model("llama", torch.bfloat16, seed=1))
    made = twin(dense)
    llmprune.sparsify(made)
    assert sorted(made.state_dict()) == sorted(dense.state_dict())
    assert all(torch.equal(made.state_dict()[name], tensor) for name, tensor in dense.state_dict().items())
    made.load_state_dict(other.state_dict())
    near(tiny.logits(made, tiny.ids(2)), tiny.logits(other, tiny.ids(2)))
    dense.load_state_dict(made.state_dict())
    assert torch.equal(tiny.logits(dense, tiny.ids(2)), tiny.logits(other, tiny.ids(2)))


def test_a_state_dict_of_another_shape_is_refused() -> None:
    layer = nn.Linear(64, 32, bias=False).requires_grad_(False)
    made = SparseLinear([packed(layer.weight)], None)
    with pytest.raises(RuntimeError, match="weight"):
        made.load_state_dict({"weight": torch.zeros(32, 63)})


def packed(weight: Tensor) -> Form:
    return Packed.of(weight)


@pytest.mark.usefixtures("sparse_wins")
def test_saving_a_sparse_model_saves_the_dense_one(tmp_path: Path) -> None:
    dense = model()
    made = twin(dense)
    llmprune.sparsify(made)
    made.save_pretrained(tmp_path / "out")
    found = tiny.load(tmp_path / "out")
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in dense.state_dict().items())


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.usefixtures("sparse_wins")
def test_generation_is_that_of_the_dense_model(batch: int) -> None:
    dense = model(dtype=torch.float32)
    made = twin(dense)
    llmprune.sparsify(made)
    options = {"max_new_tokens": 8, "do_sample": False}
    found, expected = (each.generate(tiny.ids(batch, 6), **options) for each in (made, dense))
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("sparse_wins")
def test_compile_sees_one_whole_graph() -> None:
    made = model(dtype=torch.float32)
    llmprune.sparsify(made)
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    assert torch.equal(tiny.logits(compiled, tiny.ids(2)), tiny.logits(made, tiny.ids(2)))


@pytest.mark.usefixtures("sparse_wins")
def test_a_sparse_model_is_copied_cast_and_refuses_what_no_kernel_serves() -> None:
    made = model()
    llmprune.sparsify(made)
    assert torch.equal(tiny.logits(copy.deepcopy(made), tiny.ids(1)), tiny.logits(made, tiny.ids(1)))
    made.to(torch.float32)
    assert tiny.logits(made, tiny.ids(1)).dtype is torch.float32
    with pytest.raises(UnsupportedModelError, match=r"call llmprune\.densify\(model\) first"):
        made.to(torch.float64)


@pytest.mark.usefixtures("sparse_wins")
def test_a_sparse_layer_looks_like_a_linear_one() -> None:
    made = model("opt")
    weight = made.model.decoder.layers[0].fc1.weight.detach().clone()
    llmprune.sparsify(made)
    layer = made.model.decoder.layers[0].fc1
    assert torch.equal(layer.weight, weight) and layer.bias is not None
    assert (layer.in_features, layer.out_features) == (64, 96)
    assert "in_features=64, out_features=96, bytes=0.57, bitmask from 1" in repr(layer)


def test_the_gate_measures_once_and_remembers(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    weight = model().model.layers[0].mlp.up_proj.weight.detach()
    monkeypatch.setattr(gate, "_measure", timings(2.0, 1.0, 3.0))
    first = judge([[packed(weight)]], lambda: [weight])
    monkeypatch.setattr(gate, "_measure", None)
    assert judge([[packed(weight)]], lambda: [weight]) == first
    empty_cache.write_text("cut sho")
    with pytest.raises(TypeError):  # a damaged cache is no cache: it measures again
        judge([[packed(weight)]], lambda: [weight])
    for damage in (
        b"\xff",
        b"[" * 99999,
        b"[]",
        b'{"a": {"tokens": 1, "seconds": {}}}',
        b'{"a": {"tokens": 1, "seconds": null}}',
    ):
        empty_cache.write_bytes(damage)
        assert gate._read() == {}


def test_the_gate_really_measures(empty_cache: Path) -> None:
    weight = model().model.layers[0].mlp.up_proj.weight.detach()
    verdict = judge([[packed(weight)] * 2], lambda: [weight] * 2, (1, 4))
    assert [timing.tokens for timing in verdict.timings] == [1, 4]
    assert all(list(timing.seconds) == ["dense", "bitmask", "expand"] for timing in verdict.timings)
    assert all(0 < value < 1 for timing in verdict.timings for value in timing.seconds.values())
    assert len(json.loads(empty_cache.read_text())) == 2


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    weight = torch.eye(32)
    assert judge([[packed(weight)]], lambda: [weight], (1,)).timings


def test_the_verdict_follows_from_the_timings() -> None:
    verdict = Verdict((timing(1, 2, 1, 9), timing(16, 2, 3, 9), timing(64, 9, 8, 7), timing(256, 9, 9, 9)))
    fastest = [verdict.fastest(tokens) for tokens in (1, 2, 14, 60, 1000)]
    assert fastest == ["bitmask", "bitmask", "dense", "expand", "bitmask"]
    assert verdict.steps([Packed.kernels]) == (
        Step(1, 0, "bitmask"), Step(64, 0, "expand"), Step(256, 0, "bitmask"),
    )  # fmt: skip
    assert verdict.steps([Packed.kernels, Dense.kernels])[1] == Step(16, 1, "dense")


def test_runtime_sparse_keeps_the_layers_sparse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gate, "_measure", timings(2.0, 1.0, 3.0))
    dense = tiny.load(tiny.save(model(), tmp_path / "dense"))
    compress(tmp_path / "dense", tmp_path / "small")
    with pytest.warns(UserWarning, match="runtime"):
        made = AutoModelForCausalLM.from_pretrained(
            tmp_path / "small", dtype="auto", quantization_config=llmprune.SparseConfig("sparse")
        )
    expected = twin(dense)
    llmprune.sparsify(expected)
    assert sparse_layers(made) == sparse_layers(expected)
    assert torch.equal(tiny.logits(made, tiny.ids(2)), tiny.logits(expected, tiny.ids(2)))
    assert linear_bytes(made) < 0.75 * linear_bytes(dense)  # the head is dense


def load_sparse(folder: Path) -> Any:
    with pytest.warns(UserWarning, match="runtime"):
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", quantization_config=llmprune.SparseConfig("sparse")
        )


@pytest.mark.usefixtures("sparse_wins")
def test_a_tied_layer_of_a_file_that_holds_it_twice_stays_dense(tmp_path: Path) -> None:
    made = model("llama-tied")
    made.get_input_embeddings().weight.data.masked_fill_(torch.rand(160, 64) < 0.6, 0)
    made.save_pretrained(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    compress(tmp_path / "dense", tmp_path / "small")
    found = load_sparse(tmp_path / "small")
    assert type(found.lm_head) is nn.Linear and found.lm_head.weight is found.get_input_embeddings().weight
    assert sparse_layers(found)


@pytest.mark.usefixtures("sparse_wins")
def test_what_gains_too_little_is_not_kept_sparse(tmp_path: Path) -> None:
    made = tiny.model("llama", torch.bfloat16)
    for layer in made.model.layers:
        layer.mlp.up_proj.weight.data.masked_fill_(torch.rand(layer.mlp.up_proj.weight.shape) < 0.09, 0)
    made.save_pretrained(tmp_path / "dense")
    assert compress(tmp_path / "dense", tmp_path / "small").packed == len(made.model.layers)
    assert not sparse_layers(load_sparse(tmp_path / "small"))


def test_a_packed_tensor_of_another_shape_does_not_become_a_sparse_layer(tmp_path: Path) -> None:
    made = model()
    made.save_pretrained(tmp_path / "dense")
    compress(tmp_path / "dense", tmp_path / "small")
    for name in ("config.json", "config.dense.json"):
        config = json.loads((tmp_path / "small" / name).read_text())
        (tmp_path / "small" / name).write_text(json.dumps(config | {"intermediate_size": 80}))
    try:
        found = load_sparse(tmp_path / "small")
    except RuntimeError as error:  # of transformers, as for a dense file; 5.17 says nothing
        assert "mismatch" in str(error)
    else:
        assert all(type(layer.mlp.up_proj) is nn.Linear for layer in found.model.layers)


@pytest.mark.usefixtures("sparse_wins")
def test_inputs_are_taken_as_a_linear_layer_takes_them() -> None:
    made = model()
    llmprune.sparsify(made)
    layer = made.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    with pytest.raises(RuntimeError, match="columns"):
        layer(torch.randn(3, 65).to(layer.weight.dtype))
    with pytest.raises(RuntimeError, match="the input is"):
        layer(x.double())
    low = SparseLinear([packed(layer.weight.bfloat16())], None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low(x), low(x.bfloat16()))


def test_layers_that_stay_sparse_read_the_file_where_it_is_mapped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Loading copies nothing, and where the kernels' timings are known makes nothing dense on the way."""
    monkeypatch.setattr(gate, "_measure", timings(2.0, 1.0, 3.0))
    model().save_pretrained(tmp_path / "dense")
    compress(tmp_path / "dense", tmp_path / "small")
    sparse = {"dtype": "auto", "quantization_config": llmprune.SparseConfig("sparse")}
    with pytest.warns(UserWarning, match="runtime"):
        first = AutoModelForCausalLM.from_pretrained(tmp_path / "small", **sparse)
        monkeypatch.setattr(Packed, "expand", lambda self: pytest.fail("a weight was made dense"))
        made = AutoModelForCausalLM.from_pretrained(tmp_path / "small", **sparse)
    assert sparse_layers(made) == sparse_layers(first)
    stored = (tmp_path / "small" / "model.safetensors").stat().st_size
    layers = [layer for layer in made.modules() if isinstance(layer, SparseLinear)]
    masks, values, _ = zip(*(layer.forms[0].tensors for layer in layers), strict=True)
    spread = max(tensor.data_ptr() for tensor in values) - min(tensor.data_ptr() for tensor in masks)
    assert 0 < spread < stored  # all lie in one mapping


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(each) for each in arguments], catch_exceptions=True)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    llmprune.prune("demo", out, method="magnitude", pattern="2:4")
    return out


def test_the_commands_in_a_row(pruned: Path, tmp_path: Path) -> None:
    small, back = tmp_path / "small", tmp_path / "back"
    done = run("compress", pruned, small, "--json")
    assert done.exit_code == 0, done.output
    sizes = json.loads(done.stdout)
    assert sizes["packed_bytes"] < 0.58 * sizes["dense_bytes"]
    assert sizes["compressed_file_bytes"] == sum(path.stat().st_size for path in small.glob("*.safetensors"))
    assert run("decompress", small, back).exit_code == 0
    assert {path.name: path.read_bytes() for path in back.iterdir()} == {
        path.name: path.read_bytes() for path in pruned.iterdir()
    }
    texts = [json.loads(run("generate", each, "The river", "--max-new-tokens", 5, "--json", "--dense").stdout)["text"]
             for each in (pruned, small)]  # fmt: skip
    assert texts[0] == texts[1] and texts[0].startswith("The river")


@pytest.mark.usefixtures("sparse_wins")
def test_generate_says_what_it_did(pruned: Path) -> None:
    pieces: list[str] = []
    generated = generate(pruned, "The river", max_new_tokens=4, on_text=pieces.append)
    assert generated.sparse_layers == 42 and generated.new_tokens == 4
    assert "".join(pieces).strip() and generated.text.endswith("".join(pieces).rstrip().split(" ")[-1])
    done = run("generate", pruned, "The river", "--max-new-tokens", 4)
    assert "4 tokens" in done.stderr and "42 sparse layers" in done.stderr


@pytest.mark.usefixtures("sparse_wins")
def test_bench_reports_both_sides(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.sparse.bench._STREAMED_BYTES", 1 << 20)
    done = run("bench", pruned, "--prompt-tokens", 8, "--new-tokens", 2, "--rounds", 2, "--batch", 2, "--json")
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)
    assert row["batch"] == 2 and row["sparse"] and row["decode_speedup"] > 0
    assert {choice["kernel"] for choice in row["choices"]} <= {"bitmask", "dense"}
    for side in (row["dense"], row["sparse"]):
        assert side["decode"]["p20"] <= side["decode"]["median"] <= side["decode"]["p80"]
        assert side["roofline"] == pytest.approx(2 * row["bandwidth_bytes_per_s"] / side["linear_bytes"])
    text = run("bench", pruned, "--prompt-tokens", 4, "--new-tokens", 1, "--rounds", 1).stdout
    assert "decode tokens/s" in text and "linear layers" in text


@pytest.mark.usefixtures("sparse_wins")
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batches_of_any_size_run(batch: int) -> None:
    dense = model(dtype=torch.float32)
    made = twin(dense)
    llmprune.sparsify(made, batch=batch)
    near(tiny.logits(made, tiny.ids(batch, 3)), tiny.logits(dense, tiny.ids(batch, 3)))


@pytest.mark.usefixtures("sparse_wins")
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_offloading_by_accelerate_keeps_working(family: str) -> None:
    from accelerate import cpu_offload

    dense = model(family, torch.float32)
    made = twin(dense)
    llmprune.sparsify(made)
    cpu_offload(made, torch.device("cpu"))
    near(tiny.logits(made, tiny.ids(2)), tiny.logits(dense, tiny.ids(2)))


def test_what_is_offloaded_stays_as_it_is(sparse_wins: None) -> None:
    from accelerate import cpu_offload

    dense = model(dtype=torch.float32)
    made = copy.deepcopy(dense)
    cpu_offload(made, torch.device("cpu"))
    result = llmprune.sparsify(made)
    assert not result.sparse_layers and all("meta" in choice.reason for choice in result.choices)
    assert torch.equal(tiny.logits(made, tiny.ids(2)), tiny.logits(dense, tiny.ids(2)))


@pytest.mark.usefixtures("sparse_wins")
def test_a_compiled_model_and_one_that_was_moved_compute_the_same() -> None:
    dense = model(dtype=torch.float32)
    made = twin(dense)
    llmprune.sparsify(made)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    near(tiny.logits(compiled, tiny.ids(2)), tiny.logits(dense, tiny.ids(2)))
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(made.to("cpu").generate(tiny.ids(2, 6), **options), dense.generate(tiny.ids(2, 6), **options))


def test_a_dense_model_is_not_compared_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.sparse.bench._STREAMED_BYTES", 1 << 20)
    setting = ("--prompt-tokens", 4, "--new-tokens", 1, "--rounds", 1)
    text = run("bench", "demo", *setting).stdout
    assert "nothing is sparse here" in text and "ratio" not in text and "too few zeros" in text
    row = json.loads(run("bench", "demo", *setting, "--json").stdout)
    assert row["sparse"] is None and row["decode_speedup"] is None and row["dense"]["decode"]["median"] > 0


@pytest.mark.usefixtures("sparse_wins")
def test_bench_draws_both_sides(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.sparse.bench._STREAMED_BYTES", 1 << 20)
    picture = tmp_path / "speeds.svg"
    setting = ("--prompt-tokens", 4, "--new-tokens", 1, "--rounds", 1)
    done = run("bench", pruned, *setting, "--plot", picture)
    assert done.exit_code == 0, done.output
    root = ElementTree.parse(picture).getroot()
    bars = root.findall("{http://www.w3.org/2000/svg}rect")[1:]
    assert len(bars) == 4 and all(float(bar.attrib["width"]) > 0 for bar in bars)


def test_bench_asks_for_a_place_for_its_picture_before_it_measures(tmp_path: Path) -> None:
    for name, words in (("speeds.png", "ends in .svg"), ("nowhere/speeds.svg", "make it first"), (".", "is a folder")):
        done = run("bench", "demo", "--plot", tmp_path / name)
        assert isinstance(done.exception, RecipeError) and words in str(done.exception) and not done.stdout
    assert list(tmp_path.iterdir()) == []


def test_bench_fits_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _prompt_length(None, 32, 256) == 224
    assert _prompt_length(None, 32, None) == _prompt_length(None, 32, 4096) == 512
    with pytest.raises(RecipeError, match="500 prompt tokens and 32 new ones are more than the model's context of 256"):
        bench("demo", prompt_tokens=500)


def test_generate_stops_at_the_context(tmp_path: Path) -> None:
    prompt = "river " * 120
    done = run("generate", "demo", prompt)
    assert "the model's context of 256 tokens is full" in done.stderr
    found = json.loads(run("generate", "demo", prompt, "--json").stdout)
    assert found["context"] == 256 and 0 < found["new_tokens"] < 64


def refuses_to_load(*_: object, **__: object) -> None:
    raise AssertionError("weights were loaded before the options were checked")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "demo", "river " * 300), "the model's context is 256: shorten it"),
        (
            ("generate", "demo", "x", "--max-new-tokens", 100000),
            "100000 new ones are more than the model's context of 256",
        ),
        (("bench", "demo", "--prompt-tokens", 100000), "100000 prompt tokens and 32 new ones are more than"),
        (("bench", "demo", "--new-tokens", 256), "more than the model's context of 256"),
        (("generate", "demo", "x", "--device", "cuda:77"), "device 'cuda:77' is not available here"),
        (("bench", "demo", "--device", "nowhere"), "device 'nowhere' is not available here"),
        (("generate", "nofolder", "x"), "'nofolder'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_weights_are_loaded(
    arguments: tuple[Any, ...], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmprune.sparse.running.load", refuses_to_load)
    monkeypatch.setattr("llmprune.sparse.bench.load", refuses_to_load)
    done = run(*arguments)
    assert isinstance(done.exception, LlmpruneError) and message in str(done.exception)
    assert done.stdout == "" and "\n" not in str(done.exception)


def test_bench_and_generate_take_a_device(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.sparse.bench._STREAMED_BYTES", 1 << 20)
    assert (
        run("bench", pruned, "--device", "cpu", "--prompt-tokens", 4, "--new-tokens", 1, "--rounds", 1).exit_code == 0
    )
    texts = [
        run("generate", pruned, "The river", "--max-new-tokens", 3, *device).stdout
        for device in ((), ("--device", "cpu"))
    ]
    assert texts[0] == texts[1] and texts[0].startswith("The river")


def test_one_line_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="new_tokens is 0: it must be at least 1"):
        bench("demo", new_tokens=0)
    for arguments in (("compress", tmp_path / "no", tmp_path / "out"), ("generate", tmp_path / "no", "x")):
        error = run(*arguments).exception
        assert isinstance(error, LlmpruneError) and "no such folder" in str(error)


def test_without_kernels_nothing_is_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    made = model()
    result = llmprune.sparsify(made)
    assert not sparse_layers(made) and {choice.reason for choice in result.choices} == {"no compiled kernels"}
