"""The gate and the forms of GPUs, without a GPU: forms by their readable references, machines that are made up."""

import copy
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import llmprune
import tiny
from llmprune.errors import UnsupportedModelError
from llmprune.sparse import forms, linear, sparsify
from llmprune.sparse.bench import twin
from llmprune.sparse.forms import CuSparseLt, Dense, Form, Fragments, Pairs, Rows, Step, gpu_forms, is_two_four
from llmprune.sparse.gate import Timing, Verdict, judge
from llmprune.sparse.linear import SparseLinear
from llmprune.sparse.machine import Machine, machine_of
from llmprune_kernels import support
from llmprune_kernels.bitmask import rows_ops
from llmprune_kernels.two_four import ops

CPU = torch.device("cpu")
GPU_FORMS: list[type[Form]] = [Fragments, Pairs, Rows]


def pruned(weight_OI: Tensor, pattern: str) -> Tensor:
    if pattern == "2:4":
        groups = weight_OI.view(len(weight_OI), -1, 4)
        groups.scatter_(2, groups.float().abs().topk(2, -1, largest=False).indices, 0)
        return weight_OI
    return weight_OI.masked_fill_(torch.rand(weight_OI.shape, generator=torch.Generator().manual_seed(1)) < 0.5, 0)


def random_weight(
    outputs: int = 48, inputs: int = 96, dtype: torch.dtype = torch.bfloat16, pattern: str = "2:4"
) -> Tensor:
    return pruned(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)).to(dtype), pattern)


def model(pattern: str = "2:4", dtype: torch.dtype = torch.bfloat16) -> Any:
    made: Any = tiny.model("llama", dtype)
    with torch.no_grad():
        for name, layer in made.named_modules():
            if isinstance(layer, nn.Linear) and name != "lm_head":
                pruned(layer.weight, pattern)
    return made


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llmprune" / "gate.json"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Put a stand-in where torch has cuSPARSELt; return the algorithms it was asked for."""
    used: list[int] = []

    def multiply(packed: Tensor, x_IT: Tensor, transpose_result: bool, alg_id: int) -> Tensor:
        assert x_IT.shape[1] % 8 == 0 and transpose_result
        used.append(alg_id)
        return (packed @ x_IT).t()

    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight.clone())
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda packed, x_IT, transpose_result: 7)
    return used


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, library: list[int]) -> None:
    """Let weights on the CPU be taken for weights on a GPU with sparse tensor cores and cuSPARSELt."""
    for missing in ("sparse_cores_missing", "cusparselt_missing"):
        monkeypatch.setattr(forms, missing, lambda device: None)
    for module in (sparsify, linear):
        monkeypatch.setattr(module, "sparse_forms", gpu_forms)


def machine(seconds: dict[str, dict[int, float]], name: str = "a GPU, driver 1") -> Machine:
    """Return a machine on which kernels take these seconds, by their number of tokens."""

    def measure(candidates: Sequence[Callable[[int], Tensor]], count: int) -> list[float]:
        products = [candidate(count - 1) for candidate in candidates]
        return [seconds[kernel][len(product)] for kernel, product in zip(seconds, products, strict=True)]

    return Machine(name, measure)


def everywhere(**seconds: float) -> dict[str, dict[int, float]]:
    return {kernel: dict.fromkeys(range(4096), value) for kernel, value in seconds.items()}


@pytest.mark.parametrize("kind", GPU_FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forms_stand_for_the_dense_weight(kind: type[Form], dtype: torch.dtype) -> None:
    weight_OI, bias_O = random_weight(dtype=dtype), torch.randn(48).to(dtype)
    form = kind.of(weight_OI)
    assert torch.equal(form.expand(), weight_OI) and form.expand().dtype is dtype
    x = torch.randn(2, 3, 96).to(dtype)
    for kernel in kind.kernels:
        for bias in (None, bias_O):
            expected = nn.functional.linear(x, weight_OI, bias)
            torch.testing.assert_close(form.linear(x, kernel, 0, bias), expected, rtol=0.02, atol=0.02)
    assert form.nbytes() < 0.8 * weight_OI.nbytes


def test_an_empty_input_has_an_empty_product() -> None:
    for kind in GPU_FORMS:
        form = kind.of(random_weight())
        assert form.linear(torch.empty(0, 96, dtype=torch.bfloat16), kind.kernels[0], 0, None).shape == (0, 48)


def test_cusparselt_gets_rows_in_eights_and_its_algorithm(library: list[int]) -> None:
    weight_OI, x_TI = random_weight(), torch.randn(3, 96).bfloat16()
    form = CuSparseLt.of(weight_OI)
    assert form.search(x_TI, "cusparselt") == 7
    torch.testing.assert_close(form.linear(x_TI, "cusparselt", 7, None), x_TI @ weight_OI.t())
    assert torch.equal(form.expand(), weight_OI)
    assert library == [7, 0]


@pytest.mark.parametrize("kind", GPU_FORMS)
def test_operators_tell_torch_the_truth_and_know_the_gradient_of_their_input(kind: type[Form]) -> None:
    weight_OI, x_TI = random_weight(), torch.randn(3, 96).bfloat16().requires_grad_()
    form = kind.of(weight_OI)
    operator = {Fragments: ops.mma, Pairs: ops.pairs, Rows: rows_ops.linear}[kind]
    more = (48,) if kind is Fragments else ()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(operator, (x_TI, *form.tensors, *more), test_utils=tests)
    form.linear(x_TI, kind.kernels[0], 0, None).sum().backward()
    assert x_TI.grad is not None
    torch.testing.assert_close(x_TI.grad, torch.ones(3, 48).bfloat16() @ weight_OI)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_gets_the_forms_of_the_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_forms(random_weight()) == [Fragments, CuSparseLt]
    assert gpu_forms(random_weight(inputs=36)) == [Fragments]
    assert gpu_forms(random_weight(pattern="50%")) == gpu_forms(random_weight(dtype=torch.float32)) == [Rows]
    monkeypatch.setattr(forms, "sparse_cores_missing", lambda device: "none here")
    assert gpu_forms(random_weight()) == [Pairs, CuSparseLt]
    monkeypatch.setattr(forms, "cusparselt_missing", lambda device: "none here")
    assert gpu_forms(random_weight()) == [Pairs]
    assert gpu_forms(random_weight(inputs=36)) == [Rows]


def test_two_four_is_told_from_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "_AT_ONCE", 1)
    weight_OI = random_weight()
    assert is_two_four(weight_OI) and is_two_four(torch.zeros_like(weight_OI))
    weight_OI[47, 92:95] = 1
    assert not is_two_four(weight_OI)
    assert not is_two_four(random_weight(dtype=torch.float32)) and not is_two_four(torch.zeros(4, 6).bfloat16())


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert support.sparse_cores_missing(CPU) == "sparse tensor cores are those of NVIDIA GPUs"
    assert support.cusparselt_missing(CPU) == "cuSPARSELt is for GPUs"
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 7.5" in str(support.sparse_cores_missing(cuda))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(support, "triton_version", lambda: (3, 4))
    assert support.sparse_cores_missing(cuda) == "Triton 3.4 is too old: its Gluon is needed as of 3.6"
    monkeypatch.setattr(support, "triton_version", lambda: None)
    assert support.sparse_cores_missing(cuda) == support.triton_missing() == "Triton is not installed"


def test_each_machine_measures_once(cache: Path) -> None:
    weight_OI = random_weight(pattern="50%")
    packed = [[Rows.of(weight_OI)]]
    first = judge(packed, lambda: [weight_OI], (1, 8), machine(everywhere(dense=3.0, bitmask=1.0, expand=2.0)))
    assert first.fastest(1) == "bitmask"
    slower = everywhere(dense=1.0, bitmask=2.0, expand=3.0)
    assert judge(packed, lambda: [weight_OI], (1, 8), machine(slower)) == first
    assert judge(packed, lambda: [weight_OI], (1, 8), machine(slower, "a GPU, driver 2")).fastest(1) == "dense"
    keys = list(json.loads(cache.read_text()))
    assert len(keys) == 4 and "a GPU, driver 1 torch.bfloat16 (48, 96) 0.50 bitmask+expand 1" in keys


@pytest.mark.parametrize("damage", ["cut sho", "[]", '{"key": 3}', '{"key": {"tokens": 1}}'])
def test_a_damaged_cache_is_ignored_with_one_line(damage: str, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    weight_OI = random_weight()
    cache.parent.mkdir(parents=True)
    cache.write_text(damage)
    judge([[Rows.of(weight_OI)]], lambda: [weight_OI], (1,), machine(everywhere(dense=3.0, bitmask=1.0, expand=2.0)))
    assert set(caplog.messages) == {f"{cache} is damaged: kernels are measured anew"}
    assert len(json.loads(cache.read_text())) == 1


def test_a_kernel_that_fails_or_is_wrong_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weight_OI = random_weight()

    def multiply(self: Form, x_TI: Tensor, kernel: str, setting: int) -> Tensor:
        raise RuntimeError("ptxas has died\nof old age")

    monkeypatch.setattr(Rows, "multiply", multiply)
    monkeypatch.setattr(Rows, "expand", lambda self: weight_OI * 1.5)
    with caplog.at_level(logging.WARNING):
        verdict = judge([[Rows.of(weight_OI)]], lambda: [weight_OI], (4,), machine(everywhere(dense=3.0)))
    assert list(verdict.timings[0].seconds) == ["dense"] and verdict.steps([Rows.kernels]) == ()
    assert caplog.messages[0] == "sparse kernel bitmask is not used, as it fails here: ptxas has died"
    assert "sparse kernel expand is not used, as its results are off by" in caplog.messages[1]


@given(st.lists(st.lists(st.floats(1e-6, 1e-2), min_size=4, max_size=4), min_size=1, max_size=5))
def test_what_is_chosen_is_never_slower_than_dense(rows: list[list[float]]) -> None:
    kernels = ("dense", "mma_sp", "expand", "cusparselt")
    timings = [Timing(4**number, dict(zip(kernels, row, strict=True))) for number, row in enumerate(rows)]
    verdict = Verdict(tuple(timings))
    for timing in timings:
        assert timing.seconds[verdict.fastest(timing.tokens)] == min(timing.seconds.values())
    for timing in timings:
        kept = [kind for kind in (Fragments, CuSparseLt, Dense) if verdict.fastest(timing.tokens) in kind.kernels]
        steps = verdict.steps([kind.kernels for kind in kept])
        now = [step for step in steps if step.tokens <= timing.tokens][-1]
        assert timing.seconds[now.kernel] <= timing.seconds["dense"]


@pytest.mark.usefixtures("gpu")
def test_a_model_keeps_one_form_or_one_for_prompts_too(monkeypatch: pytest.MonkeyPatch, library: list[int]) -> None:
    seconds = everywhere(dense=2.0, mma_sp=1.0, expand=3.0, cusparselt=4.0)
    seconds["mma_sp"] |= {64: 9.0, 256: 9.0, 512: 9.0}
    seconds["cusparselt"][512] = 1.0
    monkeypatch.setattr(sparsify, "machine_of", lambda device, graphs: machine(seconds, f"a GPU {graphs}"))
    dense = model()
    lean, fast = twin(dense), twin(dense)
    result = llmprune.sparsify(lean)
    layer = lean.model.layers[0].mlp.up_proj
    assert [type(form) for form in layer.forms] == [Fragments]
    assert layer.steps == (Step(1, 0, "mma_sp"), Step(64, 0, "expand"))
    sparse = [choice for choice in result.choices if choice.kernel == "mma_sp"]
    assert sum(choice.bytes[1] for choice in sparse) < 0.7 * sum(choice.bytes[0] for choice in sparse)
    assert "mma_sp; expand from 64 tokens (measured faster)" in str(result)
    llmprune.sparsify(fast, prompt_tokens=512, graphs=True)
    layer = fast.model.layers[0].mlp.up_proj
    assert [type(form) for form in layer.forms] == [Fragments, CuSparseLt]
    assert layer.steps[-1] == Step(512, 1, "cusparselt", 7)
    for ids, used in ((tiny.ids(2, 24), []), (tiny.ids(32, 16), [7] * 7 * len(fast.model.layers))):
        library.clear()
        for made in (lean, fast):
            torch.testing.assert_close(tiny.logits(made, ids), tiny.logits(dense, ids), rtol=0.05, atol=0.05)
        assert library == used


@pytest.mark.usefixtures("gpu")
def test_dense_is_kept_beside_where_only_it_is_fast_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = everywhere(dense=2.0, mma_sp=1.0, expand=3.0, cusparselt=4.0)
    seconds["mma_sp"][512] = 3.0
    monkeypatch.setattr(sparsify, "machine_of", lambda device, graphs: machine(seconds))
    made = model()
    llmprune.sparsify(made, prompt_tokens=512)
    layer = made.model.layers[0].mlp.up_proj
    assert [type(form) for form in layer.forms] == [Fragments, Dense] and layer.steps[-1] == Step(512, 1, "dense")


@pytest.mark.usefixtures("gpu")
def test_a_sparse_layer_of_a_gpu_is_saved_loaded_cast_copied_and_compiled() -> None:
    weight_OI, other_OI = random_weight(), random_weight(pattern="50%")
    bias = nn.Parameter(torch.randn(48).bfloat16())
    layer = SparseLinear([Fragments.of(weight_OI)], bias, [Step(1, 0, "mma_sp"), Step(8, 0, "expand")])
    assert torch.equal(layer.state_dict()["weight"], weight_OI)
    assert torch.equal(layer.dense().weight, weight_OI)
    for tokens in (1, 20):
        x = torch.randn(tokens, 96).bfloat16()
        expected = nn.functional.linear(x, weight_OI, bias)
        torch.testing.assert_close(layer(x), expected, rtol=0.02, atol=0.02)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))
    assert torch.equal(copy.deepcopy(layer).weight, weight_OI)
    layer.load_state_dict({"weight": weight_OI.flip(0), "bias": bias})
    assert torch.equal(layer.weight, weight_OI.flip(0)) and [step.kernel for step in layer.steps] == [
        "mma_sp",
        "expand",
    ]
    layer.load_state_dict({"weight": other_OI, "bias": bias})
    assert torch.equal(layer.weight, other_OI) and type(layer.forms[0]) is Rows
    assert type(layer.to(torch.float32).forms[0]) is Rows and layer.weight.dtype is torch.float32


def test_a_layer_that_nothing_serves_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SparseLinear([Rows.of(random_weight())], None)
    with pytest.raises(UnsupportedModelError, match="not on meta"):
        layer.to("meta")


def test_the_machine_is_named_by_all_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"torch={torch.__version__}" in machine_of(CPU).name
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Some GPU")
    eager, graphs = (machine_of(torch.device("cuda", 0), flag).name for flag in (False, True))
    assert all(word in eager for word in ("NVIDIA Some GPU", "driver=", "torch=", "triton=", "kernels="))
    assert graphs == eager + " graphs"
