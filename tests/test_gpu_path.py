"""What a GPU is given to do, on one that is none: how many operations, in which precision, and no waiting."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import llmprune
import tiny
from llmprune import kernels
from llmprune.determinism import repeatable
from llmprune.methods.admm import ADMM, _inverse
from llmprune.methods.sparsegpt import SparseGPT
from llmprune.model import memory
from llmprune.patterns import NM, Pattern, Unstructured
from llmprune.refit import refit
from llmprune.solving import energies
from llmprune.statistics import CrossGram, Gram
from pretended_gpu import PretendedGpu, pretended_gpu

pytest.importorskip("triton")

SIZE = 1024
BLOCKS = SIZE // 128
GPU = torch.device("cuda")


def solving(method: Any, pattern: Pattern, sites: int = 1, rows: int = SIZE) -> PretendedGpu:
    """Return a GPU that has solved matrices which share a Gram, whose own factor does not count."""
    with pretended_gpu("meta") as gpu:
        gram = Gram(SIZE, GPU)
        gram.factor(0.01, "root"), gram.factor(0.01, "inverse")
        gpu.forget()
        for _ in range(sites):
            weight_OI = torch.empty(rows, SIZE, dtype=torch.bfloat16, device="cuda")
            method.solve(weight_OI, gram, pattern, torch.Generator())
    return gpu


@pytest.mark.parametrize(("pattern", "a_block"), [(NM(2, 4), 7), (NM(8, 16), 7), (Unstructured(0.5, "block"), 23)])
def test_fast_sparsegpt_takes_few_operations_a_block(pattern: Pattern, a_block: int) -> None:
    done = solving(SparseGPT(arithmetic="fast"), pattern).done
    assert BLOCKS * 4 < done.total <= BLOCKS * a_block + 20, done.calls
    assert done.calls["sweep"] == BLOCKS  # one fused recursion for each
    assert done.waits == {"_local_scalar_dense": 1}  # for whether its change is known


@pytest.mark.parametrize(("pattern", "a_block"), [(NM(2, 4), 8), (Unstructured(0.5, "block"), 22)])
def test_the_paper_s_arithmetic_needs_no_column_loop_on_a_gpu(pattern: Pattern, a_block: int) -> None:
    done = solving(SparseGPT(), pattern).done
    assert done.total <= BLOCKS * a_block + 20 and not done.waits, done.calls


def test_only_fast_arithmetic_multiplies_in_tf32() -> None:
    for arithmetic, precision in (("fast", "tf32"), ("paper", "fp32")):
        done = solving(SparseGPT(arithmetic=arithmetic), NM(2, 4)).done
        assert {how for (name, how) in done.products if "mm" in name} == {precision}


@pytest.mark.parametrize(("pattern", "an_iteration"), [(NM(2, 4), 30), (Unstructured(0.5), 25)])
def test_admm_takes_few_operations_an_iteration(pattern: Pattern, an_iteration: int) -> None:
    done = solving(ADMM(iterations=20, stages=5, refit=10), pattern).done
    assert done.total <= 21 * an_iteration + 10 * 15 + 40 + 5 * 6, done.calls
    assert done.calls["mm"] == 20 + 10 + 1 + 5  # the last ones make inverses
    # for each factorisation's success, and whether its change is known
    assert done.waits == {"_local_scalar_dense": 5 + 1}


def test_admm_multiplies_in_tf32_and_factors_in_fp32() -> None:
    done = solving(ADMM(iterations=4, stages=2, refit=2), NM(2, 4)).done
    assert {how for (name, how) in done.products if name == "mm"} == {"tf32"}
    assert {how for (name, how) in done.products if name != "mm"} == {"solver"}
    with pretended_gpu("meta") as gpu:
        weight_OI, hessian_II = torch.empty(64, SIZE, device="cuda"), torch.empty(SIZE, SIZE, device="cuda")
        refit(weight_OI, hessian_II, weight_OI > 0, weight_OI, 1)
    assert {how for (_, how) in gpu.done.products} == {"tf32"}


def test_fast_admm_searches_in_bfloat16_and_fits_in_tf32() -> None:
    done = solving(ADMM(iterations=4, stages=2, refit=2, arithmetic="fast"), NM(2, 4)).done
    assert done.products["mm", "16 bit"] == 2 * 2 * SIZE**3
    assert done.products["mm", "tf32"] == (2 + 2 + 3) * 2 * SIZE**3  # inverses, the last stage, and the fit


def test_matrices_that_share_a_gram_share_what_admm_divides_by() -> None:
    one, three = (solving(ADMM(iterations=4, stages=2, refit=2), NM(2, 4), sites).done for sites in (1, 3))
    assert one.calls["linalg_cholesky_ex"] == three.calls["linalg_cholesky_ex"] == 2
    assert three.calls["mm"] == 3 * (4 + 2 + 1) + 2


def test_a_share_that_is_too_large_for_the_gpu_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.methods.admm._GPU_KEPT_BYTES", 4 * SIZE * SIZE)
    assert solving(ADMM(iterations=4, stages=2, refit=2), NM(2, 4), 3).done.calls["linalg_cholesky_ex"] == 6


def test_few_rows_are_divided_without_an_inverse() -> None:
    done = solving(ADMM(iterations=2, stages=1, refit=1), NM(2, 4), rows=64).done
    assert done.calls["linalg_solve_triangular"] == 4 and done.calls["mm"] == 1 + 1


def test_the_gpu_s_inverse_is_the_inverse() -> None:
    x_TI = torch.randn(400, 60, generator=torch.Generator().manual_seed(0))
    lower_II = torch.linalg.cholesky(x_TI.T @ x_TI / 400 + 0.2 * torch.eye(60))
    with pretended_gpu():
        found_II = _inverse(lower_II.to("cuda")).cpu()
    expected_II = torch.cholesky_inverse(lower_II)
    assert 1e-6 < float((found_II - expected_II).norm() / expected_II.norm()) < 1e-3  # rounded as TF32 is


def test_a_matrix_is_solved_without_waiting_for_its_energies_piece_by_piece() -> None:
    with pretended_gpu("meta") as gpu:
        gram = Gram(SIZE, GPU)
        weight_OI = torch.empty(4 * SIZE, SIZE, device="cuda")
        change, whole = energies(weight_OI, weight_OI, gram)
    assert gpu.done.waits == {"tolist": 2} and change > 0 and whole > 0
    assert gpu.done.calls["mm"] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_multiplied_as_they_are(dtype: torch.dtype) -> None:
    with pretended_gpu("meta") as gpu:
        gram = CrossGram(3000, GPU)
        x_TI = torch.empty(512, 3000, dtype=dtype, device="cuda")
        gpu.forget()
        gram.add(x_TI, 4, x_TI)
        assert gpu.done.calls["mm"] == 3  # the cross product, and two tiles on and below the diagonal
        assert not gpu.done.calls["_to_copy"] and {how for (_, how) in gpu.done.products} == {"16 bit"}
        assert kernels.takes_batches(x_TI) and gram.sequences == 4 and gram.tokens == 512


def test_torch_multiplies_into_another_dtype() -> None:
    assert "ScalarType out_dtype" in str(torch.ops.aten.mm.dtype._schema)


@pytest.mark.parametrize("width", [40, 256, 700])
def test_the_sums_of_the_gpu_are_the_products(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda x, y, out_dtype: mm(x.to(out_dtype), y.to(out_dtype)))
    monkeypatch.setattr("llmprune_kernels.gram.cuda._WIDTH", 256)
    from llmprune_kernels.gram import cuda

    x_TI, y_TI = torch.randn(2, 90, width, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    before_II = torch.randn(width, width, generator=torch.Generator().manual_seed(1))
    found_II, cross_II = before_II.clone(), before_II.clone()
    cuda.add_gram(found_II, x_TI, 0.5, 0.25)
    cuda.add_product(cross_II, x_TI, y_TI, 0.5, 0.25)
    x_TI, y_TI = x_TI.double(), y_TI.double()
    torch.testing.assert_close(cross_II.double(), 0.25 * before_II + 0.5 * x_TI.T @ y_TI, rtol=1e-5, atol=1e-4)
    expected_II = 0.25 * before_II + 0.5 * x_TI.T @ x_TI
    torch.testing.assert_close(found_II.tril().double(), expected_II.tril(), rtol=1e-5, atol=1e-4)


@pytest.fixture
def precision() -> Iterator[Any]:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    yield settings
    assert settings.fp32_precision == before


def test_tf32_is_on_for_products_on_a_gpu_only(precision: Any) -> None:
    before = precision.fp32_precision
    with kernels.tf32(torch.device("cpu")):
        assert precision.fp32_precision == before
    with kernels.tf32(GPU):
        assert precision.fp32_precision == "tf32"
    with pytest.raises(ValueError, match="inside"), kernels.tf32(GPU):
        raise ValueError("inside")
    with repeatable(True), kernels.tf32(GPU):
        assert precision.fp32_precision == before


def test_a_user_may_ask_for_tf32_in_either_of_torch_s_ways(precision: Any, tmp_path: Path) -> None:
    """Where it was asked for in the newer way, torch refuses to answer the older question."""
    source, before = tiny.save(tiny.model("llama"), tmp_path / "model"), precision.fp32_precision
    precision.fp32_precision = "tf32"
    try:
        llmprune.prune(source, tmp_path / "out", method="magnitude", device="cpu")
    finally:
        precision.fp32_precision = before


LLAMA_7B = SimpleNamespace(hidden_size=4096, intermediate_size=11008)
LLAMA_7B.get_text_config = lambda: LLAMA_7B


@pytest.mark.parametrize(("gibibytes", "fits"), [(139, True), (78, True), (39, False)])
def test_the_default_calibration_of_a_7b_model_fits_beside_its_dense_twin(gibibytes: int, fits: bool) -> None:
    with pretended_gpu("meta", gibibytes):
        assert memory.fits_side_by_side(2 * 128 * 2048, LLAMA_7B, torch.bfloat16, GPU) is fits


def test_memory_that_torch_holds_on_to_is_free_for_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier run in the same process has taken is not given back to the GPU."""
    with pretended_gpu("meta", gibibytes=78):
        fresh = memory.batch_size(2048, LLAMA_7B, torch.bfloat16, GPU)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (18 << 30, 78 << 30))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 61 << 30)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 1 << 30)
        assert memory.fits_side_by_side(2 * 128 * 2048, LLAMA_7B, torch.bfloat16, GPU)
        assert memory.batch_size(2048, LLAMA_7B, torch.bfloat16, GPU) == fresh > 10
        assert memory.home_device(GPU, [torch.empty(2048)] * 256, LLAMA_7B, torch.bfloat16) == GPU
        monkeypatch.undo()


def test_the_host_s_tensors_are_not_taken_for_the_gpu_s() -> None:
    """The GPU that is none refuses what one would refuse; without that, this file and its like show nothing."""
    from pretended_gpu import DeviceError

    with pretended_gpu():
        here, there = torch.ones(3, 3), torch.ones(3, 3, device="cuda")
        for wrong in (lambda: here + there, lambda: torch.cat([here, there]), there.numpy, lambda: here @ there):
            with pytest.raises(DeviceError):
                wrong()
        assert (there * torch.tensor(2.0)).is_cuda and there[torch.tensor([0])].is_cuda
        assert there.cpu().device.type == "cpu" and torch.zeros_like(there).is_cuda and there.T.is_cuda
        assert isinstance(there, Tensor) and torch.nn.Parameter(there).data.is_cuda
