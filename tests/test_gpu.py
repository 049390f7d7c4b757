"""What only a GPU can show: the kernels' numbers, sparse models on it, and pruning there. `scripts/gpu_suite.sh` runs it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmprune
import tiny
from llmprune import kernels
from llmprune.checkpoint.pinned import on_host
from llmprune.model import lanes, memory
from llmprune.sparse.bench import twin
from llmprune.sparse.forms import CuSparseLt, Form, Fragments, Pairs, Rows, Step, gpu_forms
from llmprune.sparse.gate import judge
from llmprune.sparse.linear import SparseLinear
from llmprune.statistics import CrossGram
from llmprune_kernels.support import cusparselt_missing, sparse_cores_missing, triton_missing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
GPU = torch.device("cuda")
TOKENS = (1, 2, 3, 8, 9, 16, 31, 64, 65, 200)
SHAPES = ((16, 64), (40, 100), (1024, 4096), (1000, 2080))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Let all memory begin as NaN, so that what a kernel does not write shows; and keep the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def missing(kind: type[Form]) -> str | None:
    """Return why a form's kernels cannot run here."""
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    needs = {Fragments: sparse_cores_missing, CuSparseLt: cusparselt_missing}
    return needs[kind](GPU) if kind in needs else triton_missing()


def pruned(weight_OI: Tensor, pattern: str) -> Tensor:
    if pattern == "2:4":
        groups = weight_OI.view(len(weight_OI), -1, 4)
        groups.scatter_(2, groups.float().abs().topk(2, -1, largest=False).indices, 0)
        return weight_OI
    return weight_OI.masked_fill_(torch.rand(weight_OI.shape, device=weight_OI.device) < float(pattern), 0)


def random_weight(shape: tuple[int, int], dtype: torch.dtype, pattern: str) -> Tensor:
    torch.manual_seed(shape[0])
    weight_OI = pruned(torch.randn(shape, device=GPU).to(dtype), pattern)
    weight_OI[0] = 0
    return weight_OI


def assert_near(found_TO: Tensor, x_TI: Tensor, weight_OI: Tensor) -> None:
    """Compare with float64: an output is rounded once, and sums of float32 stray by less than that."""
    expected_TO = x_TI.double() @ weight_OI.double().T
    limit = max(torch.finfo(found_TO.dtype).eps, 1e-5) * expected_TO.abs().max()
    assert found_TO.shape == expected_TO.shape
    assert bool(((found_TO.double() - expected_TO).abs() <= limit).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [Fragments, Pairs, CuSparseLt])
def test_two_four_kernels_compute_the_product(kind: type[Form], shape: tuple[int, int], dtype: torch.dtype) -> None:
    if reason := missing(kind):
        pytest.skip(reason)
    if (kind is Pairs and shape[1] % 32) or (kind is CuSparseLt and any(size % 16 for size in shape)):
        pytest.skip("a shape that this form is not for")
    weight_OI = random_weight(shape, dtype, "2:4")
    form = kind.of(weight_OI)
    assert torch.equal(form.expand(), weight_OI)
    for tokens in TOKENS:
        x_TI = torch.randn(tokens, shape[1], device=GPU).to(dtype)
        for kernel in kind.kernels:
            assert_near(form.linear(x_TI, kernel, form.search(x_TI, kernel), None), x_TI, weight_OI)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", ["0", "0.5", "0.7", "0.97"])
def test_bitmask_kernels_compute_the_product(pattern: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if reason := missing(Rows):
        pytest.skip(reason)
    weight_OI = random_weight(shape, dtype, pattern)
    form = Rows.of(weight_OI)
    assert torch.equal(form.expand(), weight_OI)
    for tokens in TOKENS:
        x_TI = torch.randn(tokens, shape[1], device=GPU).to(dtype)
        assert_near(form.linear(x_TI, "bitmask", 0, None), x_TI, weight_OI)


def test_inputs_may_lie_anywhere_in_memory() -> None:
    weight_OI = random_weight((64, 128), torch.bfloat16, "2:4")
    shifted = torch.randn(3 * 128 + 1, device=GPU).bfloat16()[1:].view(3, 128)
    for kind in (Fragments, Pairs, Rows):
        if missing(kind) is None:
            for x_TI in (shifted, torch.randn(128, 3, device=GPU).bfloat16().T):
                assert_near(kind.of(weight_OI).linear(x_TI, kind.kernels[0], 0, None), x_TI, weight_OI)


def test_every_bit_survives_a_form() -> None:
    weight_OI = random_weight((32, 128), torch.bfloat16, "2:4")
    weight_OI[1, :4] = torch.tensor([0, -0.0, torch.nan, 0])
    for kind in (Fragments, Pairs, Rows):
        if missing(kind) is None:
            assert torch.equal(kind.of(weight_OI).expand().view(torch.int16), weight_OI.view(torch.int16))


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_the_gate_measures_all_candidates(pattern: str, graphs: bool) -> None:
    from llmprune.sparse.machine import machine_of

    weight_OI = random_weight((1024, 1024), torch.bfloat16, pattern)
    packed = [[kind.of(weight_OI)] for kind in gpu_forms(weight_OI)]
    verdict = judge(packed, lambda: [weight_OI], (1, 64), machine_of(GPU, graphs))
    kernels = {"dense"} | {kernel for forms in packed for kernel in forms[0].kernels}
    for timing in verdict.timings:
        assert set(timing.seconds) == kernels  # none failed, none was wrong
        assert all(0 < value < 1 for value in timing.seconds.values())


def model(pattern: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    made: Any = tiny.model("llama", dtype)
    with torch.no_grad():
        for name, layer in made.named_modules():
            if isinstance(layer, nn.Linear) and name != "lm_head":
                pruned(layer.weight, pattern)
    return made.to(GPU)


def made_sparse(dense: Any) -> Any:
    """Return a twin all of whose pruned layers are sparse, whatever would be faster."""
    made = twin(dense)
    for name, layer in list(made.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            kind = gpu_forms(layer.weight.detach())[0]
            made.set_submodule(name, SparseLinear([kind.of(layer.weight)], layer.bias))
    return made


def near(found: Tensor, expected: Tensor) -> None:
    scale = float(expected.float().abs().max())
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0.04 * scale)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_a_sparse_model_computes_and_generates_what_the_dense_one_does(pattern: str) -> None:
    dense = model(pattern)
    made = made_sparse(dense)
    for batch in (1, 4):
        ids = tiny.ids(batch, 12).to(GPU)
        near(tiny.logits(made, ids), tiny.logits(dense, ids))
        assert made.generate(ids, max_new_tokens=5, do_sample=False).shape == (batch, 17)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_sparsify_chooses_by_measurement(pattern: str) -> None:
    dense = model(pattern)
    made = twin(dense)
    result = llmprune.sparsify(made, prompt_tokens=512)
    ids = tiny.ids(2).to(GPU)
    near(tiny.logits(made, ids), tiny.logits(dense, ids))
    measured = [choice for choice in result.choices if choice.timings]
    assert measured
    for choice in measured:
        first = next(timing for timing in choice.timings if timing.tokens == 1)
        assert first.seconds[choice.kernel] <= first.seconds["dense"]


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_a_sparse_model_moves_between_devices_and_is_saved(pattern: str) -> None:
    dense = model(pattern)
    made = made_sparse(dense)
    expected = tiny.logits(dense, tiny.ids(2).to(GPU))
    state = made.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in dense.state_dict().items())
    made.load_state_dict(dense.state_dict())
    near(tiny.logits(made, tiny.ids(2).to(GPU)), expected)
    made.to("cpu")
    near(tiny.logits(made, tiny.ids(2)), expected.cpu())
    made.to(GPU)
    near(tiny.logits(made, tiny.ids(2).to(GPU)), expected)


def test_sparse_layers_need_less_memory() -> None:
    weight_OI = random_weight((4096, 4096), torch.bfloat16, "2:4")
    holder = nn.Sequential(nn.Linear(4096, 4096, bias=False, device="meta"))
    holder[0].weight = nn.Parameter(weight_OI, requires_grad=False)
    del weight_OI
    before = torch.cuda.memory_allocated()
    kind = gpu_forms(holder[0].weight.detach())[0]
    holder[0] = SparseLinear([kind.of(holder[0].weight)], None)
    assert torch.cuda.memory_allocated() - before <= -0.4 * 2 * 4096 * 4096


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_sparse_layers_compile(mode: str) -> None:
    torch.use_deterministic_algorithms(False)
    for pattern in ("2:4", "0.5"):
        weight_OI = random_weight((256, 512), torch.bfloat16, pattern)
        kind = gpu_forms(weight_OI)[0]
        steps = [Step(1, 0, kind.kernels[0]), Step(32, 0, "expand")]
        layer = SparseLinear([kind.of(weight_OI)], None, steps)
        torch.compiler.reset()  # layers share one forward, and it is compiled eight times at most
        compiled = torch.compile(layer, mode=mode, fullgraph=True)
        for tokens in (1, 64):
            x_TI = torch.randn(tokens, 512, device=GPU).bfloat16()
            with torch.no_grad():
                for _ in range(3):
                    found = compiled(x_TI).clone()
            assert_near(found, x_TI, weight_OI)


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tiny.tensors(folder).items() if "proj" in name}


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_pruning_on_the_gpu_is_close_to_pruning_on_the_cpu(method: str, pattern: str, tmp_path: Path) -> None:
    pytest.importorskip("greenlet")
    source = tiny.save(tiny.model("llama"), tmp_path / "model")
    for device in ("cpu", "cuda"):
        options: dict[str, Any] = {"method": method, "pattern": pattern, "calibration": tiny.ids(6, 24)}
        llmprune.prune(source, tmp_path / device, device=device, **options)
    ours, theirs = weights(tmp_path / "cuda"), weights(tmp_path / "cpu")
    kept = [(ours[name] != 0) == (theirs[name] != 0) for name in ours]
    assert sum(int(same.sum()) for same in kept) >= 0.99 * sum(same.numel() for same in kept)
    for name, tensor in ours.items():
        assert int(tensor.count_nonzero()) == int(theirs[name].count_nonzero())
        near(tensor, theirs[name]) if method == "magnitude" else None


def test_hidden_states_wait_in_pinned_memory_where_the_gpu_is_too_small(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("greenlet")
    source = tiny.save(tiny.model("llama"), tmp_path / "model")
    options: dict[str, Any] = {"method": "wanda", "calibration": tiny.ids(6, 24), "device": "cuda"}
    llmprune.prune(source, tmp_path / "on the GPU", **options)
    pinned: list[bool] = []

    def watched(tensor: Tensor) -> Tensor:
        moved = on_host(tensor)
        pinned.append(moved.is_pinned())
        return moved

    monkeypatch.setattr(memory, "_HIDDEN_SHARE", 0.0)
    monkeypatch.setattr(lanes, "on_host", watched)
    llmprune.prune(source, tmp_path / "on the host", **options)
    assert pinned and all(pinned)
    ours, theirs = weights(tmp_path / "on the GPU"), weights(tmp_path / "on the host")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_batches_are_sized_to_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("greenlet")
    source = tiny.save(tiny.model("llama"), tmp_path / "model")
    config = tiny.load(source).config
    assert memory.batch_size(24, config, torch.float32, GPU) > 6
    options: dict[str, Any] = {"method": "wanda", "calibration": tiny.ids(6, 24), "device": "cuda"}
    llmprune.prune(source, tmp_path / "sized", **options)
    llmprune.prune(source, tmp_path / "single", batch_size=1, **options)
    ours, theirs = weights(tmp_path / "sized"), weights(tmp_path / "single")
    kept = [(ours[name] != 0) == (theirs[name] != 0) for name in ours]
    assert sum(int(same.sum()) for same in kept) >= 0.99 * sum(same.numel() for same in kept)


def problem(columns: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Weights, and the upper Cholesky factor of a random inverse Hessian."""
    generator = torch.Generator().manual_seed(columns)
    x_TB = torch.randn(2 * columns + 4, columns, generator=generator)
    inverse_BB = torch.linalg.inv(x_TB.T @ x_TB / len(x_TB) + 0.1 * torch.eye(columns))
    upper_BB = torch.linalg.cholesky((inverse_BB + inverse_BB.T) / 2, upper=True)
    return torch.randn(columns, outputs, generator=generator).to(GPU), upper_BB.to(GPU)


@pytest.mark.parametrize(("columns", "outputs"), [(128, 4096), (100, 33), (8, 1)])
def test_the_fused_recursion_gives_the_bits_of_the_reference(columns: int, outputs: int) -> None:
    if reason := triton_missing():
        pytest.skip(reason)
    from llmprune_kernels.obs import reference
    from llmprune_kernels.obs import triton as fused

    assert fused.runs_on(GPU)
    block_BO, upper_BB = problem(columns, outputs)
    keep_BO = torch.rand(columns, outputs, device=GPU) > 0.5
    expected_BO, found_BO = block_BO.clone(), block_BO.clone()
    errors = reference.obs_masked(expected_BO, upper_BB, keep_BO), fused.obs_masked(found_BO, upper_BB, keep_BO)
    assert torch.equal(found_BO, expected_BO) and torch.equal(*errors)
    for n, m in ((2, 4), (4, 8), (1, 2)):
        if columns % m == 0:
            expected_BO, found_BO = block_BO.clone(), block_BO.clone()
            (_, expected), (_, found) = (
                reference.obs_nm(expected_BO, upper_BB, n, m),
                fused.obs_nm(found_BO, upper_BB, n, m),
            )
            assert torch.equal(found, expected) and torch.equal(found_BO, expected_BO)


@pytest.mark.parametrize("shape", [(1, 5_000_000), (1, 524_288), (300, 4096)])
@pytest.mark.parametrize("distinct", [0, 50])
def test_selection_marks_what_a_sort_marks(distinct: int, shape: tuple[int, int]) -> None:
    score_RC = torch.rand(shape, device=GPU)
    score_RC = (score_RC * distinct).round() if distinct else score_RC
    count = shape[1] * 6 // 10
    lowest_RC = score_RC.argsort(dim=1, stable=True)[:, :count]
    expected_RC = torch.zeros_like(score_RC, dtype=torch.bool).scatter_(1, lowest_RC, True)
    assert torch.equal(kernels.lowest(score_RC, count), expected_RC)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grams_are_summed_in_fp32(dtype: torch.dtype) -> None:
    x_TI, dense_TI = torch.randn(2, 3000, 2500, device=GPU).to(dtype).unbind()
    statistic = CrossGram(2500, GPU)
    for part, dense in zip(x_TI.split(1000), dense_TI.split(1000), strict=True):
        statistic.add(part, 1, dense)
    x_TI, dense_TI = x_TI.double(), dense_TI.double()
    for found_II, expected_II in (
        (statistic.hessian_II, x_TI.T @ x_TI),
        (statistic._cross_II, dense_TI.T @ x_TI),
    ):
        assert found_II is not None
        torch.testing.assert_close(found_II.double(), expected_II * 2 / 3, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_presets_on_the_gpu_come_as_close_as_on_the_cpu(preset: str, pattern: str, tmp_path: Path) -> None:
    pytest.importorskip("greenlet")
    torch.use_deterministic_algorithms(False)  # which would leave out TF32
    source = tiny.save(tiny.model("llama", torch.bfloat16), tmp_path / "model")
    options: dict[str, Any] = {"preset": preset, "pattern": pattern, "calibration": tiny.ids(6, 24)}
    on_cpu, on_gpu = (llmprune.prune(source, tmp_path / at, device=at, **options) for at in ("cpu", "cuda"))
    assert on_gpu.zeros == on_cpu.zeros and on_gpu.most_runs == 1 and not on_gpu.retries
    errors = [sum(site.error for site in report.sites) for report in (on_gpu, on_cpu)]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)
