"""The compiled CPU kernels against float64, and against the readable reference, on all levels this CPU offers."""

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmprune_kernels import native
from llmprune_kernels.bitmask import layout, reference
from llmprune_kernels.bitmask.layout import TYPES, Bitmask, expand, multiply, multiply_expanded
from llmprune_kernels.bitmask.ops import bitmask_linear

LEVELS = range(native.cpu_level() + 1)
# Products are summed in float32 in another order than the oracle's.
RELATIVE = 2e-6

needs_library = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")


def sparse_weight(outputs: int, inputs: int, dtype: torch.dtype, zeros: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    return weight_OI.masked_fill_(torch.rand(outputs, inputs, generator=generator) < zeros, 0).to(dtype)


def inputs_of(tokens: int, inputs: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(7)).to(dtype)


def assert_near(found_TO: Tensor, x_TI: Tensor, weight_OI: Tensor) -> None:
    """Compare with float64, each element on the scale of what was summed."""
    expected_TO = x_TI.double() @ weight_OI.double().T
    scale_TO = x_TI.double().abs() @ weight_OI.double().abs().T
    assert found_TO.shape == expected_TO.shape
    assert ((found_TO.double() - expected_TO).abs() <= RELATIVE * scale_TO).all()


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@needs_library
@settings(max_examples=120, deadline=None)
@given(
    outputs=st.integers(1, 70),
    inputs=st.integers(1, 1200),
    tokens=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 9, 95, 96, 97, 100]),
    dtype=st.sampled_from(list(TYPES)),
    zeros=st.sampled_from([0.0, 0.5, 0.7, 0.97, 1.0]),
    level=st.sampled_from(LEVELS),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_are_those_of_the_dense_weight(
    outputs: int, inputs: int, tokens: int, dtype: torch.dtype, zeros: float, level: int, seed: int
) -> None:
    weight_OI = sparse_weight(outputs, inputs, dtype, zeros, seed)
    x_TI = inputs_of(tokens, inputs, dtype)
    assert_near(multiply(x_TI, Bitmask.pack(weight_OI), level), x_TI, weight_OI)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (8, 32), (9, 33), (13, 1100), (16, 64), (700, 40)])
def test_weights_are_packed_as_in_the_reference_and_expand_to_what_they_were(
    outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    weight_OI = sparse_weight(outputs, inputs, dtype, 0.5, 1)
    matrix = Bitmask.pack(weight_OI)
    masks, values = reference.pack(weight_OI)
    assert torch.equal(matrix.masks, masks)
    assert torch.equal(matrix.values, values)
    assert torch.equal(matrix.starts, reference.starts(masks))
    assert torch.equal(Bitmask.of(masks, values, inputs).starts, matrix.starts)
    assert matrix.count() == len(values) and (matrix.outputs, matrix.inputs) == (outputs, inputs)
    assert torch.equal(expand(matrix), weight_OI)
    assert torch.equal(reference.expand(masks, values, inputs), weight_OI)


def test_a_layout_by_hand() -> None:
    weight_OI = torch.zeros(9, 33)
    weight_OI[0, 1], weight_OI[0, 31], weight_OI[1, 0], weight_OI[0, 32], weight_OI[8, 2] = 1, 2, 3, 4, 5
    matrix = Bitmask.pack(weight_OI)
    assert matrix.starts.tolist() == [0, 4, 5]
    assert matrix.values.tolist() == [1, 2, 4, 3, 5]
    assert matrix.masks[[0, 1, 8]].tolist() == [[2, 0, 0, 128, 1], [1, 0, 0, 0, 0], [4, 0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", TYPES)
def test_every_bit_pattern_survives(dtype: torch.dtype) -> None:
    """Negative zeros, infinities, NaN payloads and subnormal numbers are values like any other."""
    size = torch.empty(0, dtype=dtype).element_size()
    integers = reference.INTEGERS[size]
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(torch.iinfo(integers).min, torch.iinfo(integers).max, (40, 100), generator=generator)
    bits = bits.to(integers) * (torch.rand(40, 100, generator=generator) < 0.5)
    bits[0, 0] = torch.iinfo(integers).min  # -0.0
    found = expand(Bitmask.pack(bits.view(dtype)))
    assert torch.equal(found.view(integers), bits)


@pytest.mark.parametrize("columns", [1, 7, 8, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("level", LEVELS)
def test_numbers_of_any_size_expand(
    columns: int, dtype: torch.dtype, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "cpu_level", lambda: level)
    generator = torch.Generator().manual_seed(columns)
    kept = torch.rand(13, columns, generator=generator) < 0.5
    kept[4] = False
    padded = torch.nn.functional.pad(kept, (0, -columns % 8)).view(13, -1, 8)
    masks = (padded.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    values = (torch.rand(int(kept.sum()), generator=generator) * 100 + 1).to(dtype)
    expected = torch.zeros(13, columns, dtype=dtype)
    expected[kept] = values
    matrix = Bitmask.of(masks, values, columns)
    assert matrix.starts.tolist() == [0, int(kept[:8].sum()), len(values)]
    assert torch.equal(expand(matrix), expected)
    assert torch.equal(reference.expand(masks, values, columns), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 0), (7, 31), (2, 40000)])
def test_values_of_rows_are_counted(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight_OI = sparse_weight(*shape, dtype, 0.3, 0)
    weight_OI[:, ::5] = -0.0  # a value, as all that has a bit set
    counts_O = layout.count_values(weight_OI)
    assert torch.equal(counts_O, reference.count_values(weight_OI))
    assert counts_O.tolist() == [int((row.abs() > 0).sum()) + len(row[::5]) for row in weight_OI]
    assert layout.count_values(weight_OI.T).tolist() == reference.count_values(weight_OI.T.contiguous()).tolist()


@needs_library
@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_any_number_of_threads_gives_the_same_bits(tokens: int, threads: int) -> None:
    weight_OI, x_TI = sparse_weight(260, 300, torch.bfloat16, 0.5, 2), inputs_of(tokens, 300, torch.bfloat16)
    found_TO = multiply(x_TI, Bitmask.pack(weight_OI))
    torch.set_num_threads(1)
    assert torch.equal(found_TO, multiply(x_TI, Bitmask.pack(weight_OI)))
    assert_near(found_TO, x_TI, weight_OI)


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES)
def test_tensors_at_odd_addresses_are_read(dtype: torch.dtype, level: int) -> None:
    weight_OI = sparse_weight(20, 96, dtype, 0.5, 3)
    matrix, x_TI = Bitmask.pack(weight_OI), inputs_of(5, 96, dtype)
    shifted = [torch.cat([each.flatten()[:1], each.flatten()])[1:] for each in (matrix.masks, matrix.values)]
    x_shifted = torch.cat([x_TI.flatten()[:1], x_TI.flatten()])[1:].view(5, 96)
    assert any(tensor.data_ptr() % 32 for tensor in shifted) and x_shifted.data_ptr() % 32
    moved = Bitmask(shifted[0].view(20, -1), shifted[1], matrix.starts, 96)
    assert_near(multiply(x_shifted, moved, level), x_TI, weight_OI)
    assert torch.equal(expand(moved), weight_OI)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what `torch.empty` may return: NaN, or the largest number of an integer dtype."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max, dtype=dtype)


@needs_library
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("tokens", [1, 2, 4, 50])
def test_every_output_is_written(
    tokens: int, level: int, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty rows, empty tiles and full tiles among them, at ragged edges, by any number of threads."""
    weight_OI = sparse_weight(645, 105, dtype, 0.9, 4)
    weight_OI[5] = 0
    weight_OI[8:16, 32:64] = 0
    weight_OI[16:24, :32] = 2
    weight_OI[24:32] = 0
    x_TI = inputs_of(tokens, 105, dtype)
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(layout, "cpu_level", lambda: level)
    matrix = Bitmask.pack(weight_OI)
    assert_near(multiply(x_TI, matrix), x_TI, weight_OI)
    assert torch.equal(expand(matrix), weight_OI)
    room = poisoned(645, 105, dtype=dtype)
    assert torch.equal(expand(matrix, room), weight_OI)


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("inputs", "shift"), [(96, 0), (96, 1), (100, 0), (100, 3), (512, 32)])
def test_weights_expand_wherever_their_rows_begin(inputs: int, shift: int, level: int, threads: int) -> None:
    """Whole cache lines are written by instructions of their own; beside them nothing may change."""
    weight_OI = sparse_weight(645, inputs, torch.bfloat16, 0.5, 12)
    room = torch.full((645 * inputs + 128,), 7.0, dtype=torch.bfloat16)
    start = -room.data_ptr() % 64 // 2 + shift
    out = room[start : start + 645 * inputs].view(645, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "cpu_level", lambda: level)
        assert torch.equal(expand(Bitmask.pack(weight_OI), out), weight_OI)
    assert room[:start].eq(7).all() and room[start + 645 * inputs :].eq(7).all()


@needs_library
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5])
def test_nothing_behind_the_last_value_is_read(kept: float, dtype: torch.dtype, level: int) -> None:
    """The values of a mapped file may end where memory does, and kernels load whole registers."""
    weight_OI = sparse_weight(19, 70, dtype, 1 - kept, 13)
    packed, page = Bitmask.pack(weight_OI), mmap.PAGESIZE
    size = packed.values.nbytes
    with mmap.mmap(-1, 2 * page) as pages:
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        values = torch.frombuffer(pages, dtype=torch.uint8)[page - size : page].view(dtype)
        values.copy_(packed.values)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(address + page), page, 0) == 0
        matrix = Bitmask(packed.masks, values, packed.starts, 70)
        for tokens in (1, 3, 7):
            x_TI = inputs_of(tokens, 70, dtype)
            assert_near(multiply(x_TI, matrix, level), x_TI, weight_OI)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout, "cpu_level", lambda: level)
            assert torch.equal(expand(matrix), weight_OI)
        assert libc.mprotect(ctypes.c_void_p(address + page), page, 3) == 0
        del values, matrix


def test_parts_of_a_long_product_are_of_about_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[int] = []

    def noted(matrix: Bitmask, out: Tensor) -> Tensor:
        parts.append(matrix.outputs)
        return expand(matrix, out)

    monkeypatch.setattr(layout, "expand", noted)
    monkeypatch.setattr(layout, "EXPANDED_BYTES", 1 << 14)
    weight_OI = sparse_weight(260, 128, torch.bfloat16, 0.5, 14)
    multiply_expanded(inputs_of(2, 128, torch.bfloat16), Bitmask.pack(weight_OI))
    assert sum(parts) == 260 and max(parts) - min(parts) <= 8 * len(parts) and all(part % 8 == 0 for part in parts[:-1])


@needs_library
def test_nothing_is_written_beyond_the_output() -> None:
    weight_OI, x_TI = sparse_weight(13, 45, torch.bfloat16, 0.5, 5), inputs_of(2, 45, torch.bfloat16)
    matrix = Bitmask.pack(weight_OI)
    room = torch.full((20, 45), 7.0, dtype=torch.bfloat16)
    assert torch.equal(expand(matrix, room[:13]), weight_OI) and room[13:].eq(7).all()
    assert_near(multiply(x_TI, matrix), x_TI, weight_OI)


def test_rows_are_a_view() -> None:
    weight_OI = sparse_weight(45, 70, torch.bfloat16, 0.5, 6)
    matrix = Bitmask.pack(weight_OI)
    for first, last in ((0, 8), (8, 45), (16, 24), (40, 45)):
        assert torch.equal(expand(matrix.rows(first, last)), weight_OI[first:last])


@pytest.mark.parametrize("dtype", TYPES)
def test_many_tokens_take_the_dense_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "EXPANDED_BYTES", 100_000)  # several parts, the last one ragged
    weight_OI, x_TI = sparse_weight(1100, 70, dtype, 0.5, 7), inputs_of(9, 70, dtype)
    found_TO = multiply_expanded(x_TI, Bitmask.pack(weight_OI))
    torch.testing.assert_close(found_TO, torch.nn.functional.linear(x_TI, weight_OI), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("expand_from", [1, 100])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("biased", [True, False])
def test_the_operator_is_a_linear_layer(dtype: torch.dtype, expand_from: int, biased: bool) -> None:
    weight_OI, bias_O = sparse_weight(40, 70, dtype, 0.5, 8), torch.randn(40).to(dtype) if biased else None
    matrix, x = Bitmask.pack(weight_OI), inputs_of(6, 70, dtype).view(2, 3, 70)
    found = bitmask_linear(x, matrix.masks, matrix.values, matrix.starts, 70, bias_O, expand_from)
    assert found.dtype is dtype
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight_OI, bias_O), rtol=0.02, atol=1e-2)


@pytest.mark.parametrize(("width", "dtype"), [(69, torch.float32), (71, torch.float32), (70, torch.bfloat16)])
def test_an_input_that_does_not_fit_is_refused(width: int, dtype: torch.dtype) -> None:
    matrix = Bitmask.pack(sparse_weight(40, 70, torch.float32, 0.5, 8))
    packed = (matrix.masks, matrix.values, matrix.starts, 70, None)
    for expand_from in (1, 100):
        with pytest.raises(RuntimeError, match=r"the input (has|is)"):
            bitmask_linear(torch.zeros(3, width, dtype=dtype), *packed, expand_from)


def test_the_operator_tells_torch_the_truth() -> None:
    matrix = Bitmask.pack(sparse_weight(40, 70, torch.float32, 0.5, 9))
    arguments = (torch.randn(2, 3, 70), matrix.masks, matrix.values, matrix.starts, 70, None, 100)
    torch.library.opcheck(
        bitmask_linear, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


@pytest.mark.parametrize("biased", [True, False])
def test_gradients_of_input_and_bias_are_those_of_a_linear_layer(biased: bool) -> None:
    weight_OI = sparse_weight(40, 70, torch.float32, 0.5, 9)
    matrix, x, bias_O = Bitmask.pack(weight_OI), torch.randn(2, 3, 70), torch.randn(40)
    leaves = [[x.clone().requires_grad_(), bias_O.clone().requires_grad_()] for _ in range(2)]
    found = bitmask_linear(
        leaves[0][0], matrix.masks, matrix.values, matrix.starts, 70, leaves[0][1] if biased else None, 100
    )
    expected = torch.nn.functional.linear(leaves[1][0], weight_OI, leaves[1][1] if biased else None)
    for out in (found, expected):
        out.square().sum().backward()
    for ours, theirs in zip(*leaves, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-3)


@needs_library
def test_a_nan_or_infinity_in_the_input_is_not_hidden() -> None:
    weight_OI = sparse_weight(16, 64, torch.bfloat16, 0.5, 10)
    x_TI = inputs_of(2, 64, torch.bfloat16)
    x_TI[0, 5], x_TI[1, 9] = torch.nan, torch.inf
    for level in LEVELS:
        found_TO = multiply(x_TI, Bitmask.pack(weight_OI), level)
        expected_TO = x_TI.float() @ weight_OI.float().T
        assert torch.equal(found_TO.isfinite(), expected_TO.isfinite())


def test_without_a_compiler_the_reference_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "EXTENSION_SUFFIXES", [])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    missing = native.library.__wrapped__()
    assert missing is None
    (record,) = caplog.records  # said of pruning and of running alike
    assert record.getMessage() == (
        "no compiled kernels: torch runs in their place, which is slower; install a C++ compiler such as g++"
    )
    monkeypatch.setattr(layout, "compiled", lambda: None)
    weight_OI, x_TI = sparse_weight(20, 70, torch.bfloat16, 0.5, 11), inputs_of(3, 70, torch.bfloat16)
    matrix = Bitmask.pack(weight_OI)
    assert torch.equal(expand(matrix), weight_OI)
    assert torch.equal(expand(matrix.rows(8, 20)), weight_OI[8:])
    assert_near(multiply(x_TI, matrix), x_TI, weight_OI)


def test_a_machine_without_a_compiler_runs_dense_and_says_so_once(tmp_path: Path) -> None:
    code = (
        "import shutil, sys; shutil.which = lambda *a, **k: None\n"
        "from llmprune_kernels import native; native.EXTENSION_SUFFIXES = []\n"
        "from llmprune.cli import main\n"
        "for sys.argv in (['llmprune', 'prune', 'demo', OUT, '--method', 'magnitude', '--compressed', '--json'],\n"
        "                 ['llmprune', 'generate', OUT, 'The river', '--max-new-tokens', '3', '--json']): main()"
    ).replace("OUT", repr(str(tmp_path / "out")))
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    generated = json.loads(done.stdout.splitlines()[-1])
    assert generated["sparse_layers"] == 0 and generated["text"].startswith("The river")
    assert done.stderr.count("install a C++ compiler") == 1


@needs_library
def test_a_compiler_that_fails_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not native._compile_with(["false"], tmp_path / "a.so")
    assert not native._compile_with([str(tmp_path / "missing")], tmp_path / "a.so")
    assert not (tmp_path / "a.so").exists()
    (tmp_path / "a.so").write_text("no library")
    assert native._load(tmp_path / "a.so") is None


def test_the_wheel_is_built_of_every_source() -> None:
    root = Path(__file__).parent.parent
    listed = (root / "pyproject.toml").read_text("utf-8")
    assert native.sources()
    assert all(f'"{source.relative_to(root).as_posix()}"' in listed for source in native.sources())


def test_a_library_older_than_its_sources_is_not_used(tmp_path: Path) -> None:
    made = tmp_path / "_native.so"
    made.write_text("")
    assert not native._outdated(made)
    os.utime(made, (0, 0))
    assert native._outdated(made)
