"""Products with 2:4 weights on the sparse tensor cores of NVIDIA GPUs, for some tokens at a time.

Written in Gluon, Triton's dialect with explicit layouts: only there does an instruction in assembly get its operands
in the registers it wants. Reading the weights is nearly all that the kernel does: every lane loads 16 bytes of values
at once and multiplies them as they are. The warps of a program, and programs beside each other, share the columns of
16 rows (split-K), so that matrices with few rows keep the whole GPU busy too.

The instruction takes no part in inputs whose weight is missing: NaN there does not reach the output, as it would if it
were multiplied by zero.
"""

import functools

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from llmprune_kernels.two_four.fragments import COLUMNS

MOST_TOKENS = 64  # that share one reading of the weights
WARPS = 8
UNROLLED = 2  # tiles that a warp has on the way at a time
_INSTRUCTION = (
    "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
    "{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9,$10,$11}}, {{$12,$13,$14,$15}}, $16, {selector};"
)


def linear(x_TI: Tensor, values: Tensor, places: Tensor, outputs: int) -> Tensor:
    """Return x [T, I], bfloat16 or float16, times the transposed weight that `fragments.pack` packed: [T, O]."""
    tokens, inputs = x_TI.shape
    if tokens == 0:
        return x_TI.new_empty(0, outputs)
    steps = places.shape[1]
    splits = _splits(len(values), steps, _processors(x_TI.device.index))
    kind = x_TI.dtype if splits == 1 else torch.float32
    y_STO = torch.empty(splits, tokens, outputs, dtype=kind, device=x_TI.device)
    sparse_mma[(len(values), splits, triton.cdiv(tokens, MOST_TOKENS))](
        _words(x_TI), values, places, y_STO, tokens, outputs, inputs, steps,
        **constants(tokens, inputs, x_TI.dtype), num_warps=WARPS,
    )  # fmt: skip
    return y_STO[0] if splits == 1 else y_STO.sum(0).to(x_TI.dtype)


def _words(x_TI: Tensor) -> Tensor:
    """Return x two values a word, which must not begin between two."""
    x_TI = x_TI.contiguous()
    return (x_TI.clone() if x_TI.storage_offset() % 2 else x_TI).view(torch.int32)


@functools.lru_cache(64)
def constants(tokens: int, inputs: int, dtype: torch.dtype) -> dict[str, int | bool | str]:
    """Return what the kernel is specialised for."""
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    return {
        "FIRST": _INSTRUCTION.format(kind=kind, selector="0x0"),
        "SECOND": _INSTRUCTION.format(kind=kind, selector="0x1"),
        "EVEN": inputs % COLUMNS == 0,
        "BLOCKS": triton.next_power_of_2(triton.cdiv(min(tokens, MOST_TOKENS), 8)),
        "WARPS": WARPS,
        "UNROLLED": UNROLLED,
    }


def _splits(tile_rows: int, steps: int, processors: int) -> int:
    """Return how many programs share a row of tiles: more than one only where there would be idle processors."""
    return max(1, min(processors // tile_rows, steps // (WARPS * UNROLLED)))


@functools.cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@gluon.jit  # type: ignore[untyped-decorator]
def multiply_add(a, b, sums, places, INSTRUCTION: gl.constexpr):  # type: ignore[no-untyped-def]
    """Add a tile of weights times 8 tokens to `sums`."""
    return gl.inline_asm_elementwise(
        INSTRUCTION, "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r,r,r,r", [a, b, sums, places],
        dtype=gl.float32, is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit  # type: ignore[untyped-decorator]
def sparse_mma(  # type: ignore[no-untyped-def]
    x_ptr, values_ptr, places_ptr, y_ptr, tokens, outputs, inputs, steps,
    FIRST: gl.constexpr, SECOND: gl.constexpr, EVEN: gl.constexpr, BLOCKS: gl.constexpr, WARPS: gl.constexpr,
    UNROLLED: gl.constexpr,
):  # fmt: skip
    """Multiply 16 rows by BLOCKS x 8 tokens; this program takes every n-th tile, and in it every warp its share.

    Dimensions: threads of the program, blocks of 8 tokens, registers of a thread.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, BLOCKS, 4], [32, 1, 1], [WARPS, 1, 1], [2, 1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
    thread = gl.arange(0, 32 * WARPS, layout=rows)[:, None, None]
    block = gl.arange(0, BLOCKS, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    register = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    lane = thread % 32
    tile = gl.program_id(0).to(gl.int64)
    values_ptr += tile * steps * 256
    places_ptr += tile * steps * 32
    token = (gl.program_id(2) * BLOCKS + block) * 8 + lane // 4
    known = token < tokens
    x_ptr += token.to(gl.int64) * (inputs // 2)
    workers = gl.num_programs(1) * WARPS
    mine = gl.program_id(1) * WARPS + thread // 32
    sums = gl.zeros([32 * WARPS, BLOCKS, 4], gl.float32, layout=layout)
    for first in range(0, steps, workers * UNROLLED):
        for ahead in gl.static_range(UNROLLED):
            step = first + ahead * workers + mine
            inside = step < steps
            at = step * 256 + lane * 4 + register
            a_0 = gl.load(values_ptr + at, mask=inside, other=0)
            a_1 = gl.load(values_ptr + at + 128, mask=inside, other=0)
            # Beyond the end: places 0 and 1, as equal ones would be an error.
            places = gl.load(places_ptr + step * 32 + lane, mask=inside, other=0x44444444)
            word = step * 32 + lane % 4 + register * 4  # of x: two columns
            if EVEN:
                b_0 = gl.load(x_ptr + word, mask=known & inside, other=0)
                b_1 = gl.load(x_ptr + word + 16, mask=known & inside, other=0)
            else:
                b_0 = gl.load(x_ptr + word, mask=known & (word * 2 < inputs), other=0)
                b_1 = gl.load(x_ptr + word + 16, mask=known & (word * 2 + 32 < inputs), other=0)
            sums = multiply_add(a_0, b_0, sums, places, FIRST)
            sums = multiply_add(a_1, b_1, sums, places, SECOND)
    total = gl.sum(gl.reshape(sums, [WARPS, 32, BLOCKS, 4]), 0)
    out: gl.constexpr = gl.BlockedLayout([1, 1, 4], [32, 1, 1], [1, WARPS, 1], [2, 1, 0])
    total = gl.convert_layout(total, out)
    lane = gl.arange(0, 32, layout=gl.SliceLayout(1, gl.SliceLayout(2, out)))[:, None, None]
    block = gl.arange(0, BLOCKS, layout=gl.SliceLayout(0, gl.SliceLayout(2, out)))[None, :, None]
    register = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, out)))[None, None, :]
    row = gl.program_id(0) * 16 + lane // 4 + register // 2 * 8
    token = (gl.program_id(2) * BLOCKS + block) * 8 + lane % 4 * 2 + register % 2
    place = (gl.program_id(1) * tokens + token).to(gl.int64) * outputs + row
    gl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), mask=(token < tokens) & (row < outputs))
