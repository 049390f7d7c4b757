"""The GPU kernels without a GPU: packing, numbers in Triton's interpreter, and the machine code compiled ahead of time.

The kernel for sparse tensor cores is in no interpreter's reach: its own PTX is run, on a machine made of numpy.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.sparse import _semi_structured_conversions as conversions

import ptx
from llmprune_kernels import support
from llmprune_kernels.bitmask import rows
from llmprune_kernels.two_four import fragments, reference
from triton_runs import require_interpreter

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)

import ahead  # noqa: E402  needs Triton
from llmprune_kernels.bitmask import triton as bitmask  # noqa: E402
from llmprune_kernels.two_four import triton as two_four  # noqa: E402
from llmprune_kernels.two_four import triton_mma as mma  # noqa: E402

INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def two_four_weight(outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(outputs, inputs // 4, 4, generator=torch.Generator().manual_seed(outputs))
    weight.scatter_(2, weight.abs().topk(2, -1, largest=False).indices, 0)
    return weight.view(outputs, inputs).to(dtype)


def awkward(weight_OI: Tensor) -> Tensor:
    """Put an empty row, groups with one value, -0.0 and NaN into a 2:4 weight."""
    weight_OI[0], weight_OI[1, 4:8], weight_OI[2, 1] = 0, torch.tensor([0, 0, 0, 2.5]), -0.0
    weight_OI[2, [0, 2, 3]] = torch.tensor([0, 0, torch.nan], dtype=weight_OI.dtype)
    return weight_OI


def same_bits(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.view(INTEGERS[expected.dtype]), expected.view(INTEGERS[expected.dtype]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pairs_lose_nothing(dtype: torch.dtype) -> None:
    weight_OI = awkward(two_four_weight(9, 96, dtype))
    pairs, codes = reference.pack(weight_OI)
    assert same_bits(reference.expand(pairs, codes, dtype), weight_OI)
    assert pairs.nbytes + codes.nbytes == weight_OI.nbytes * 9 // 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 64), (3, 12), (37, 100), (64, 256)])
def test_fragments_lose_nothing(outputs: int, inputs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragments, "_AT_ONCE", 1)  # 16 rows at a time
    weight_OI = awkward(two_four_weight(outputs, inputs, dtype))
    values, places = fragments.pack(weight_OI)
    assert same_bits(fragments.expand(values, places, outputs, inputs, dtype), weight_OI)
    if (outputs, inputs) == (64, 256):
        assert values.nbytes + places.nbytes == weight_OI.nbytes * 9 // 16


@pytest.mark.parametrize("dtype", list(INTEGERS))
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 128), (7, 300), (40, 129)])
def test_bitmask_rows_lose_nothing(
    outputs: int, inputs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_AT_ONCE", 1)  # a row at a time
    generator = torch.Generator().manual_seed(inputs)
    limits = torch.iinfo(INTEGERS[dtype])
    bits = torch.randint(limits.min, limits.max, (outputs, inputs), generator=generator)
    bits = (bits * (torch.rand(outputs, inputs, generator=generator) < 0.5)).to(INTEGERS[dtype])
    masks, values, starts, counts = rows.pack(bits.view(dtype))
    assert same_bits(rows.expand(masks, values, inputs), bits.view(dtype))
    assert starts.shape == counts.shape == (outputs, -(-inputs // 128)) and masks.shape[1] == 4 * starts.shape[1]


def test_bitmask_rows_by_hand() -> None:
    weight_OI = torch.zeros(2, 130)
    weight_OI[0, 0], weight_OI[0, 31], weight_OI[0, 64], weight_OI[0, 129], weight_OI[1, 5] = 1, 2, 3, 4, 5
    masks, values, starts, counts = rows.pack(weight_OI)
    assert masks.tolist() == [[1 - 2**31, 0, 1, 0, 2, 0, 0, 0], [32, 0, 0, 0, 0, 0, 0, 0]]
    assert values[:-1].tolist() == [1, 2, 3, 4, 5]
    assert starts.tolist() == [[0, 3], [4, 5]]
    assert counts.tolist() == [[0x03020200, 0x01010100], [0x01010100, 0]]


def test_a_group_by_hand() -> None:
    weight = torch.zeros(1, 32, dtype=torch.float16)
    weight[0, 1], weight[0, 3], weight[0, 31] = 1, 2, 4
    pairs, codes = reference.pack(weight)
    assert pairs[0, 0] == 0x3C00 | 0x4000 << 16 and codes.shape == (1, 1)
    assert int(codes) & 15 == 1 | 3 << 2
    assert int(codes) >> 28 & 15 == 0 | 3 << 2


def test_what_is_not_two_four_is_refused() -> None:
    for pack in (reference.pack, fragments.pack):
        with pytest.raises(ValueError, match="not 2:4"):
            pack(torch.ones(2, 32, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match="needs 16-bit weights"):
            pack(torch.zeros(2, 32))
    with pytest.raises(ValueError, match="needs 16-bit weights"):
        reference.pack(torch.zeros(2, 33, dtype=torch.bfloat16))


def test_places_are_those_that_cutlass_stores() -> None:
    """Torch reorders its metadata for CUTLASS as the instruction takes it, in blocks of 32 rows x 32 columns."""
    weight_OI = two_four_weight(64, 256, torch.bfloat16)
    _, places = fragments.pack(weight_OI)
    _, metadata = conversions.sparse_semi_structured_from_dense_cutlass(weight_OI)
    words = metadata.contiguous().view(-1).view(torch.int32).view(256 // 32, 64 // 32, 8, 4)
    for tile in range(4):
        for half in range(8):
            ours = places[tile, half // 2].view(8, 4)[:, half % 2 * 2 : half % 2 * 2 + 2]
            assert torch.equal(ours, words[half, tile // 2, :, tile % 2 * 2 : tile % 2 * 2 + 2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_instruction_multiplies_what_was_packed(dtype: torch.dtype) -> None:
    weight_OI = two_four_weight(16, 64, dtype)
    x_TI = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    values, places = fragments.pack(weight_OI)
    lane, sums = torch.arange(32), np.zeros((4, 32), np.float32)
    for half in range(2):
        columns = 32 * half + 2 * (lane % 4)[None, :] + 8 * torch.arange(4)[:, None]
        pairs = torch.stack([x_TI[lane // 4, columns], x_TI[lane // 4, columns + 1]], -1)
        sums = ptx.mma_sp(
            values[0, half].T.contiguous().numpy().view(np.uint32), pairs.view(torch.int32)[..., 0].numpy(), sums,
            places[0, 0].numpy().view(np.uint32), half, dtype is torch.bfloat16,
        )  # fmt: skip
    expected = (weight_OI.double() @ x_TI.double().T).numpy()
    for register in range(4):
        found = expected[lane // 4 + 8 * (register // 2), 2 * (lane % 4) + register % 2]
        np.testing.assert_allclose(sums[register], found, rtol=1e-5, atol=1e-5)


MMA = {"x_ptr": "*i32", "values_ptr": "*i32", "places_ptr": "*i32", "y_ptr": "*bf16", "tokens": "i32",
       "outputs": "i32", "inputs": "i32", "steps": "i32"}  # fmt: skip
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@pytest.mark.parametrize(
    ("outputs", "inputs", "tokens", "splits", "dtype"),
    [
        (16, 64, 1, 1, torch.bfloat16),
        (37, 2112, 3, 1, torch.bfloat16),  # more rounds of the loop than one, the last one ragged
        (20, 100, 33, 1, torch.float16),
        (16, 1024, 9, 2, torch.bfloat16),
        (16, 64, 70, 1, torch.float16),
    ],
)
def test_the_compiled_kernel_computes_the_product(
    outputs: int, inputs: int, tokens: int, splits: int, dtype: torch.dtype
) -> None:
    weight_OI = two_four_weight(outputs, inputs, dtype)
    x_TI = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(2)).to(dtype)
    values, places = fragments.pack(weight_OI)
    y_STO = torch.full((splits, tokens, outputs), torch.nan, dtype=dtype if splits == 1 else torch.float32)
    memory = ptx.Memory()
    addresses = [memory.place(tensor.view(torch.int16).numpy()) for tensor in (x_TI, values, places, y_STO)]
    code = ahead.compiled(
        mma.sparse_mma, MMA | {"y_ptr": POINTERS[y_STO.dtype]}, mma.constants(tokens, inputs, dtype), 90, mma.WARPS
    )
    grid = (len(values), splits, -(-tokens // mma.MOST_TOKENS))
    ptx.launch(code.ptx, memory, grid, mma.WARPS, [*addresses, tokens, outputs, inputs, places.shape[1]])
    found_TO, expected_TO = y_STO.double().sum(0), x_TI.double() @ weight_OI.double().T
    assert float((found_TO - expected_TO).abs().max() / expected_TO.abs().max()) < torch.finfo(dtype).eps


def test_splits_keep_the_processors_busy_and_the_warps_too() -> None:
    assert [mma._splits(rows, steps, 132) for rows, steps in ((256, 64), (64, 64), (8, 64), (1, 16))] == [1, 2, 4, 1]


def test_the_kernels_of_plain_triton_compute_the_product() -> None:
    require_interpreter()
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    script = Path(__file__).parent / "interpreted.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [row for row in found if row.get("same") is False] == []
    errors: dict[str, list[float]] = defaultdict(list)
    for row in found:
        errors[row.get("dtype", "")].append(row.get("error", 0.0))
    # One rounding of the output, which the interpreter rounds towards zero.
    assert max(errors["torch.bfloat16"]) < 2**-7
    assert max(errors["torch.float16"]) < 2**-10
    assert max(errors["torch.float32"]) < 2e-6
    assert len(errors["torch.float32"]) == 15 and len(errors["torch.bfloat16"]) == 35


SIZES = {"outputs": "i32", "inputs": "i32"}
PAIRS = {"x_ptr": "*bf16", "pairs_ptr": "*i32", "codes_ptr": "*i32", "y_ptr": "*bf16", **SIZES}
MASKS = {"masks_ptr": "*i32", "values_ptr": "*bf16", "starts_ptr": "*i32", "counts_ptr": "*i32"}
ROWS = {"x_ptr": "*bf16", **MASKS, "y_ptr": "*bf16", "tokens": "i32", **SIZES}
SCATTER = {"words_ptr": "*i32", "codes_ptr": "*i32", "weight_ptr": "*i64", **SIZES, "steps": "i32"}
SLACK = 1.0 if support.triton_version() >= (3, 7) else 1.6  # type: ignore[operator]
WIDE = r"(LDG|STG)\.E[.A-Z]*\.128[.A-Z]*"

# Kernel, types of its arguments, constants, warps; the weights that a thread handles in a round of the loop, or at all
# where there is none; and the bounds: instructions a weight, 128-bit accesses, products on (sparse) tensor cores.
# Bounds are for the Triton that the tests are run with; the oldest that is supported makes more of the same source.
# A GPU that reads 9 bits a weight at full speed has time for 6.9 (H200), 9.9 (H100), 11 (A100) or 46 (4090).
JOBS: dict[str, tuple[Any, dict[str, str], dict[str, Any], int, int, float, int, str]] = {
    "2:4 on sparse cores, 1 to 8 tokens": (
        mma.sparse_mma, MMA, mma.constants(8, 4096, torch.bfloat16), mma.WARPS, 64, 1.6, 4, r"HMMA\.SP\.16832\.F32\.BF16"),
    "2:4 on sparse cores, 64 tokens": (
        mma.sparse_mma, MMA, mma.constants(64, 4096, torch.float16), mma.WARPS, 64, 6.5, 4, r"HMMA\.SP\.16832\.F32"),
    "2:4, one token": (
        two_four.one_token, PAIRS, {"HALF": False, "ROWS": 4, "GROUPS": 256}, 4, 32, 8.5, 2, ""),
    "2:4, many tokens": (
        two_four.many_tokens, PAIRS | {"tokens": "i32"},
        {"HALF": False, "WIDEN": False, "TOKENS": 16, "ROWS": 32, "GROUPS": 32}, 4, 32, 24, 0, "HG?MMA[.A-Z0-9]*"),
    "2:4, expanded": (
        two_four.scatter, SCATTER, {"FRAGMENTS": True, "ROWS": 16, "GROUPS": 64}, 4, 32, 12, 4, ""),
    "bitmask, one token": (
        bitmask.multiply, ROWS, bitmask.constants(1, 4096), 4, 64, 12.5, 0, ""),
    "bitmask, 8 tokens": (
        bitmask.multiply, ROWS, bitmask.constants(8, 11008), 4, 32, 36, 0, ""),
    "bitmask, expanded": (
        bitmask.scatter, {**MASKS, "values_ptr": "*i16", "weight_ptr": "*i16", **SIZES},
        {"ROWS": 4, "BYTES": 128, "POPC": True}, 4, 32, 18, 4, ""),
}  # fmt: skip


@pytest.mark.parametrize("architecture", ahead.ARCHITECTURES)
@pytest.mark.parametrize("job", JOBS)
def test_the_machine_code_is_lean(job: str, architecture: int) -> None:
    kernel, arguments, constants, warps, weights, most, wide, product = JOBS[job]
    code = ahead.compiled(kernel, arguments, constants, architecture, warps)
    assert code.spills == 0
    assert len(code.loop or code.instructions) / weights <= most * SLACK
    assert code.count(WIDE) >= wide
    assert not product or code.count(product) > 0
