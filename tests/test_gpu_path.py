"""What a GPU is given to do, on one that computes nothing: how many operations, in which precision, and no waiting."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_gpu import Launches, fake_gpu
from llmprune import kernels
from llmprune.determinism import repeatable
from llmprune.methods import admm
from llmprune.methods.admm import ADMM
from llmprune.methods.sparsegpt import SparseGPT
from llmprune.model import memory
from llmprune.patterns import NM, Pattern, Unstructured
from llmprune.refit import refit
from llmprune.solving import energies
from llmprune.statistics import CrossGram, Factor, Gram

pytest.importorskip("triton")
from llmprune_kernels.obs import triton as fused

SIZE = 1024
BLOCKS = SIZE // 128


@pytest.fixture
def solver_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Count a Triton kernel as an operation, and let factorisations, which wait for their success, not count."""
    monkeypatch.setattr(fused, "_launch", lambda block_BO, *rest, **options: block_BO.neg_())
    monkeypatch.setattr(fused, "runs_on", lambda device: True)
    monkeypatch.setattr(admm, "_division", lambda hessian_II, rho, rows: lambda x_OI: x_OI @ hessian_II)
    yield


def gram_on_gpu(kind: type[Gram] = Gram) -> Any:
    gram = kind(SIZE, torch.device("cuda"))
    factor = Factor(torch.empty(SIZE, SIZE, device="cuda"), torch.empty(SIZE, dtype=torch.bool, device="cuda"), 0.01)
    gram._factors = {(0.01, "root"): factor, (0.01, "inverse"): factor}
    return gram


@contextmanager
def solving(method: Any, pattern: Pattern) -> Iterator[Launches]:
    with fake_gpu() as launches:
        gram, weight_OI = gram_on_gpu(), torch.empty(SIZE, SIZE, dtype=torch.bfloat16, device="cuda")
        gram._mirrored = True
        launches.counts.clear()
        method.solve(weight_OI, gram, pattern, None)
        yield launches


@pytest.mark.parametrize(("pattern", "a_block"), [(NM(2, 4), 6), (NM(8, 16), 6), (Unstructured(0.5, "block"), 60)])
def test_fast_sparsegpt_takes_few_operations_a_block(solver_launches: None, pattern: Pattern, a_block: int) -> None:
    with solving(SparseGPT(arithmetic="fast"), pattern) as launches:
        assert BLOCKS * 4 < launches.total <= BLOCKS * a_block + 20, launches.counts
        assert launches.counts["neg_.default"] == BLOCKS  # one fused recursion for each


@pytest.mark.parametrize(("pattern", "a_block"), [(NM(2, 4), 8), (Unstructured(0.5, "block"), 60)])
def test_the_paper_s_arithmetic_needs_no_column_loop_on_a_gpu(
    solver_launches: None, pattern: Pattern, a_block: int
) -> None:
    with solving(SparseGPT(), pattern) as launches:
        assert launches.total <= BLOCKS * a_block + 20, launches.counts


@pytest.mark.parametrize(("pattern", "an_iteration"), [(NM(2, 4), 35), (Unstructured(0.5), 55)])
def test_admm_takes_few_operations_an_iteration(solver_launches: None, pattern: Pattern, an_iteration: int) -> None:
    with solving(ADMM(iterations=20, stages=5, refit=10), pattern) as launches:
        assert launches.total <= 21 * an_iteration + 10 * 15 + 40, launches.counts
        assert launches.counts["mm.default"] == 20 + 10 + 2


def test_a_matrix_is_solved_without_waiting_for_its_energies_piece_by_piece() -> None:
    reads = 0
    with fake_gpu() as launches:
        gram = gram_on_gpu()

        def read(parts: Tensor) -> list[float]:
            nonlocal reads
            reads += 1
            return [1.0] * len(parts)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("llmprune.statistics.gram._values", read)
            weight_OI = torch.empty(4 * SIZE, SIZE, device="cuda")
            change, whole = energies(weight_OI, weight_OI, gram)
        assert reads == 2 and change > 0 and whole > 0
        assert launches.counts["mm.default"] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_multiplied_as_they_are(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    with fake_gpu() as launches:
        gram = CrossGram(3000, torch.device("cuda"))
        x_TI = torch.empty(512, 3000, dtype=dtype, device="cuda")
        launches.counts.clear()
        gram.add(x_TI, 4, x_TI)
        assert launches.counts["mm.dtype"] == 3  # the cross product, and two tiles on and below the diagonal
        assert not any(name.startswith("_to_copy") for name in launches.counts)
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
    with kernels.tf32(torch.device("cuda")):
        assert precision.fp32_precision == "tf32"
    with pytest.raises(ValueError, match="inside"), kernels.tf32(torch.device("cuda")):
        raise ValueError("inside")
    with repeatable(True), kernels.tf32(torch.device("cuda")):
        assert precision.fp32_precision == before


def test_admm_multiplies_in_tf32_and_factors_in_fp32(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[str]] = {"mm": set(), "factor": set()}

    class Watched(Launches):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if str(func).startswith("aten.mm"):
                seen["mm"].add(precision.fp32_precision)
            return super().__torch_dispatch__(func, types, args, kwargs)

    def factored(hessian_II: Tensor, rho: float, rows: int) -> Callable[[Tensor], Tensor]:
        seen["factor"].add(precision.fp32_precision)
        return lambda x_OI: x_OI @ hessian_II

    before = precision.fp32_precision
    monkeypatch.setattr(admm, "_division", factored)
    with fake_gpu(), Watched():
        weight_OI, gram = torch.empty(64, SIZE, device="cuda"), gram_on_gpu()
        ADMM(iterations=4, stages=2, refit=2).solve(weight_OI, gram, NM(2, 4), torch.Generator())
        refit(weight_OI, gram.hessian_II, weight_OI > 0, weight_OI, 1)
    assert seen == {"mm": {"tf32"}, "factor": {before}}


LLAMA_7B = SimpleNamespace(hidden_size=4096, intermediate_size=11008)
LLAMA_7B.get_text_config = lambda: LLAMA_7B


@pytest.mark.parametrize(("gibibytes", "fits"), [(139, True), (78, True), (39, False)])
def test_the_default_calibration_of_a_7b_model_fits_beside_its_dense_twin(
    gibibytes: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gibibytes << 30, gibibytes << 30))
    gpu = torch.device("cuda")
    assert memory.fits_side_by_side(2 * 128 * 2048, LLAMA_7B, torch.bfloat16, gpu) is fits
