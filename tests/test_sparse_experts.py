"""Fused experts kept sparse: the same outputs and state dict, swapped only where that is faster and right."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmprune
import tiny
from llmprune.checkpoint.compressed import compress
from llmprune.errors import UnsupportedModelError
from llmprune.sparse import experts, stacks
from llmprune.sparse.bench import linear_bytes, twin
from llmprune.sparse.experts import sparsify_experts
from llmprune.sparse.stacks import SparseExperts
from llmprune_kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
RUN = ("mixtral", "qwen3-moe", "olmoe", "deepseek-v3", "gpt-oss")


def model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    made = tiny.model(family, dtype)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 3:
                parameter.masked_fill_(parameter.abs() < parameter.abs().float().median(), 0)
            elif "gate" not in name:
                parameter[parameter.abs() < 0.001] = 0
    return made


def sparse_experts(made: Any) -> list[str]:
    return [name for name, module in made.named_modules() if isinstance(module, SparseExperts)]


@pytest.fixture
def sparse_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(experts, "_seconds", lambda *sides: (2.0, 1.0))


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    limit = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[expected.dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=limit * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", RUN)
@pytest.mark.usefixtures("sparse_wins")
def test_sparse_experts_compute_what_dense_ones_do(family: str, dtype: torch.dtype) -> None:
    dense = model(family, dtype)
    made = twin(dense)
    (choice,) = sparsify_experts(made, 2)
    assert (choice.kernel, choice.experts, choice.modules) == ("bitmask", 4, len(sparse_experts(made)))
    assert sparse_experts(made) and not sparse_experts(dense)
    assert choice.bytes[1] < 0.8 * choice.bytes[0]  # offsets weigh in these tiny matrices
    for name in sparse_experts(made):  # by module: in a whole model rounding may turn a token to another expert
        for tokens in (1, 9):
            inputs = experts._inputs(dense.get_submodule(name), tokens)
            with torch.no_grad():
                near(made.get_submodule(name)(*inputs), dense.get_submodule(name)(*inputs))


@pytest.mark.parametrize("family", RUN)
@pytest.mark.usefixtures("sparse_wins")
def test_a_sparse_mixture_computes_what_the_dense_one_does(family: str) -> None:
    dense = model(family)
    made = twin(dense)
    sparsify_experts(made, 1)
    near(tiny.logits(made, tiny.ids(2)), tiny.logits(dense, tiny.ids(2)))
    near(tiny.logits(copy.deepcopy(made), tiny.ids(1, 1)), tiny.logits(dense, tiny.ids(1, 1)))


@pytest.mark.parametrize("family", RUN)
@pytest.mark.usefixtures("sparse_wins")
def test_the_state_dict_and_densify_are_exact(family: str) -> None:
    dense, other = model(family, torch.bfloat16), model(family, torch.bfloat16)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    made = twin(dense)
    sparsify_experts(made, 1)
    expected = dense.state_dict()
    assert sorted(made.state_dict()) == sorted(expected)
    assert all(tiny.same_bytes(made.state_dict()[name], tensor) for name, tensor in expected.items())
    made.load_state_dict(other.state_dict())
    assert all(tiny.same_bytes(made.state_dict()[name], tensor) for name, tensor in other.state_dict().items())
    llmprune.densify(made)
    assert not sparse_experts(made)
    assert torch.equal(tiny.logits(made, tiny.ids(2)), tiny.logits(other, tiny.ids(2)))


@pytest.mark.usefixtures("sparse_wins")
def test_they_are_cast_generate_and_refuse_what_no_kernel_serves() -> None:
    dense = model("mixtral")
    made = twin(dense)
    sparsify_experts(made, 1)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(made.generate(tiny.ids(2, 6), **options), dense.generate(tiny.ids(2, 6), **options))
    assert tiny.logits(made.to(torch.bfloat16), tiny.ids(1)).dtype is torch.bfloat16
    with pytest.raises(UnsupportedModelError, match=r"call llmprune\.densify\(model\) first"):
        made.to(torch.float64)
    wrong = made.state_dict() | {"model.layers.0.mlp.experts.down_proj": torch.zeros(4, 3, 3)}
    with pytest.raises(RuntimeError, match="down_proj"):
        made.load_state_dict(wrong)


@pytest.mark.parametrize(("family", "reason"), [("llama4", "no sparse kernel"), ("dbrx", "no sparse kernel")])
@pytest.mark.usefixtures("sparse_wins")
def test_experts_outside_the_interface_stay_dense_and_say_so(family: str, reason: str) -> None:
    made = model(family)
    found = sparsify_experts(made, 1)
    assert found and all(choice.kernel == "dense" and reason in choice.reason for choice in found)
    assert not sparse_experts(made) and "dense (no sparse kernel" in str(found[0])


def test_where_dense_is_faster_or_another_result_comes_out_they_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model("mixtral")
    monkeypatch.setattr(experts, "_seconds", lambda *sides: (1.0, 2.0))
    (choice,) = sparsify_experts(made, 1)
    assert (choice.kernel, choice.reason, choice.seconds) == ("dense", "measured faster", (1.0, 2.0))
    monkeypatch.setattr(stacks, "bitmask_linear", lambda x, *rest: x.new_zeros(*x.shape[:-1], len(rest[0])))
    (choice,) = sparsify_experts(made, 1)
    assert "something else" in choice.reason
    monkeypatch.setattr(stacks.SparseMatrix, "__torch_function__", classmethod(lambda *a, **k: NotImplemented))
    (choice,) = sparsify_experts(made, 1)
    assert "does not run sparse: TypeError" in choice.reason
    (choice,) = sparsify_experts(tiny.model("mixtral"), 1)
    assert choice.reason == "too few zeros"


def test_the_gate_of_experts_really_measures() -> None:
    (choice,) = sparsify_experts(model("olmoe"), 1)
    assert choice.seconds is not None and all(0 < seconds < 5 for seconds in choice.seconds)
    assert choice.kernel == ("bitmask" if choice.seconds[1] < choice.seconds[0] else "dense")


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
def test_a_compressed_mixture_is_kept_sparse(
    family: str, sparse_wins: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tiny.load(tiny.save(model(family, torch.bfloat16), tmp_path / "dense"))
    compress(tmp_path / "dense", tmp_path / "small")
    with pytest.warns(UserWarning, match="runtime"):
        made = AutoModelForCausalLM.from_pretrained(
            tmp_path / "small", dtype="auto", quantization_config=llmprune.SparseConfig("sparse")
        )
    assert sparse_experts(made) and linear_bytes(made) < linear_bytes(dense)
    assert all(tiny.same_bytes(made.state_dict()[name], tensor) for name, tensor in dense.state_dict().items())
