"""The GPU form of the optimal-brain-surgeon recursion, without a GPU: its bits, its machine code, its gate."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from llmprune import kernels
from llmprune_kernels.obs import recursive, reference
from llmprune_kernels.support import triton_version
from triton_runs import COMPILE, POISON, run

pytest.importorskip("triton")
triton = importlib.import_module("llmprune_kernels.obs.triton")

INTERPRET = (
    POISON
    + """
from llmprune_kernels.obs import reference, triton
def problem(columns, outputs):
    generator = torch.Generator().manual_seed(columns + outputs)
    x = torch.randn(2 * columns + 4, columns, generator=generator)
    inverse = torch.linalg.inv(x.T @ x / len(x) + 0.1 * torch.eye(columns))
    upper = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True)
    return torch.randn(columns, outputs + 3, generator=generator)[:, :outputs], upper, generator
rows = []
for columns, outputs in ((1, 1), (15, 5), (100, 17)):
    block, upper, generator = problem(columns, outputs)
    keep = torch.rand(columns, outputs, generator=generator) > 0.5
    expected, found, free = (block.clone() for _ in range(3))
    errors = reference.obs_masked(expected, upper, keep), triton.obs_masked(found, upper, keep)
    triton.prune_masked(free, upper, keep)
    rows.append([f"masked {columns}x{outputs}", torch.equal(found, expected) and torch.equal(*errors)])
    rows.append([f"masked {columns}x{outputs}, no errors", torch.equal(free, expected)])
patterns = ((4, 1, 2), (12, 3, 4), (24, 4, 8), (48, 8, 16), (64, 5, 64))
for columns, n, m in patterns:
    block, upper, _ = problem(columns, 17)
    if m == 4:
        block[:8] = 1  # all scores of a group may be equal
        upper[:8, :8] = torch.eye(8)
    expected, found, free = (block.clone() for _ in range(3))
    (error, keep), (found_error, found_keep) = reference.obs_nm(expected, upper, n, m), triton.obs_nm(found, upper, n, m)
    free_keep = triton.prune_nm(free, upper, n, m)
    rows.append([f"{n}:{m}", torch.equal(found, expected) and torch.equal(error, found_error)])
    rows.append([f"mask of {n}:{m}", torch.equal(keep, found_keep) and torch.equal(keep, free_keep)])
print(json.dumps(rows))
"""
)

SPILLS = (
    COMPILE
    + """
from llmprune_kernels.obs import triton
signature = dict(block_ptr="*fp32", upper_ptr="*fp32", keep_ptr="*u8", error_ptr="*fp32")
signature |= dict(outputs="i32", width="i32", stride="i32")
jobs = [(0, triton.PANEL, False), (0, triton.PANEL, True), (2, 4, False), (8, 16, True), (64, 128, True)]
found = {}
for architecture in (80, 90, 100):
    for n, m, errors in jobs:
        constants = dict(N=n, M=m, PANELS=128 // m, ROWS=triton.ROWS, ERRORS=errors)
        options = dict(num_warps=triton.warps(m), enable_fp_fusion=not errors)
        made = compiled(triton.sweep, signature, constants, architecture, **options)
        found[f"{n}:{m} errors={errors} sm_{architecture}"] = {
            "spills": made["STL"] + made["LDL"], "fused": made["FFMA"] + made["FFMA2"], "all": made.total()
        }
ones = dict(outputs=1, width=1, stride=1)  # Triton makes a constant of every argument that is 1, as in `runs_on`
for n, m in ((0, triton.PANEL), (2, 4)):
    constants = dict(N=n, M=m, PANELS=1, ROWS=triton.ROWS, ERRORS=False) | ones
    made = compiled(triton.sweep, {name: kind for name, kind in signature.items() if name not in ones}, constants, 90)
    found[f"{n}:{m} 1x1"] = {"spills": made["STL"] + made["LDL"], "all": made.total()}
print(json.dumps(found))
"""
)


def test_the_kernel_gives_the_bits_of_the_reference() -> None:
    found = run(INTERPRET, interpret=True)
    assert len(found) == 16
    assert [name for name, same in found if not same] == []


def test_the_kernel_compiles_without_spills() -> None:
    found = run(SPILLS, interpret=False)
    assert len(found) == 17
    assert {name: code for name, code in found.items() if code["spills"]} == {}
    assert all(50 < code["all"] < 5000 for code in found.values())
    # The paper's roundings allow no fused multiply-add, but for those of a division; for sm_100 Triton 3.6 leaves others.
    for architecture in (80, 90, 100) if (triton_version() or (0, 0)) >= (3, 7) else (80, 90):
        paper, free = (found[f"0:8 errors={errors} sm_{architecture}"]["fused"] for errors in (True, False))
        assert paper < free / 2


@pytest.mark.parametrize(("m", "width"), [(1, 128), (2, 128), (4, 100), (16, 112), (128, 128)])
def test_on_a_gpu_the_gate_takes_the_fused_kernel(m: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "runs_on", lambda device: True)
    assert kernels._obs(on_a_gpu(width), recursive, m) is triton  # type: ignore[arg-type]


@pytest.mark.parametrize(("m", "width"), [(3, 126), (24, 120), (256, 256), (1, 129)])
def test_what_the_kernel_does_not_take_runs_in_torch(m: int, width: int) -> None:
    assert kernels._obs(on_a_gpu(width), recursive, m) is recursive  # type: ignore[arg-type]


def test_where_the_kernel_does_not_run_torch_does_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    triton.runs_on.cache_clear()
    assert kernels._obs(on_a_gpu(128), recursive) is recursive  # type: ignore[arg-type]
    assert "no Triton kernels on cuda" in caplog.text


def test_without_triton_a_gpu_runs_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert kernels._obs(on_a_gpu(128), reference) is reference  # type: ignore[arg-type]


def on_a_gpu(width: int) -> SimpleNamespace:
    """What the gate looks at of a block on a GPU."""

    class Block(SimpleNamespace):
        def __len__(self) -> int:
            return width

    return Block(device=torch.device("cuda"), stride=lambda dimension: (5, 1)[dimension])
