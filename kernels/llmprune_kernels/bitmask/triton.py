"""Products with bitmask weights on GPUs, and their expansion, in plain Triton: both run in its interpreter too.

A thread owns a byte of the mask at a time. It counts the bits before it, which tells where its values begin, and then
goes through the bits of its byte. Some 12 instructions a weight: the fastest GPUs read a dense weight in less time,
others do not, and which is which must be measured.
"""

import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The compiler knows no instruction that counts bits but by its name in assembly, which the interpreter cannot run.
COUNTS_BITS = not INTERPRETED and torch.version.hip is None
TOKENS_A_BLOCK = 8


def linear(x_TI: Tensor, masks: Tensor, values: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    """Return x [T, I], of the weight's dtype, times the transposed weight that `rows.pack` packed: [T, O]."""
    tokens, inputs = x_TI.shape
    outputs = len(masks)
    y_TO = x_TI.new_empty(tokens, outputs)
    if tokens == 0:
        return y_TO
    chosen = constants(tokens, inputs)
    grid = (triton.cdiv(outputs, chosen["ROWS"]), triton.cdiv(tokens, chosen["TOKENS"]))
    multiply[grid](
        x_TI.contiguous(), masks, values, starts, counts, y_TO, tokens, outputs, inputs, **chosen, num_warps=4
    )
    return y_TO


@functools.lru_cache(64)
def constants(tokens: int, inputs: int) -> dict[str, int]:
    """Return what `multiply` is specialised for."""
    block = min(TOKENS_A_BLOCK, triton.next_power_of_2(tokens))
    rows = 8 if block == 1 else 4  # of which each needs sums of its own in registers
    return {"TOKENS": block, "ROWS": rows, "BYTES": 128, "EVEN": inputs % 1024 == 0, "POPC": COUNTS_BITS}


def expand(masks: Tensor, values: Tensor, starts: Tensor, counts: Tensor, inputs: int) -> Tensor:
    """Return the dense weight [O, I], bit for bit the one that was packed."""
    outputs = len(masks)
    weight_OI = values.new_empty(outputs, inputs)
    integers = {2: torch.int16, 4: torch.int32}[values.element_size()]
    scatter[(triton.cdiv(outputs, 4), triton.cdiv(inputs, 1024))](
        masks, values.view(integers), starts, counts, weight_OI.view(integers), outputs, inputs,
        ROWS=4, BYTES=128, POPC=COUNTS_BITS, num_warps=4,
    )  # fmt: skip
    return weight_OI


@triton.jit  # type: ignore[untyped-decorator]
def count_bits(words, POPC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return how many of the low 31 bits of int32 words are set."""
    if POPC:
        found = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
    else:
        words -= (words >> 1) & 0x55555555
        words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
        found = (((words + (words >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24
    return found


@triton.jit  # type: ignore[untyped-decorator]
def find(masks_ptr, starts_ptr, counts_ptr, rows, column, known, blocks, POPC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the mask, its bits from those of a byte on, and where the values of that byte begin."""
    row = rows[:, None].to(tl.int64) * blocks
    word = tl.load(masks_ptr + row * 4 + (column // 4)[None, :], mask=known, other=0)
    start = tl.load(starts_ptr + row + (column // 16)[None, :], mask=known, other=0)
    before = tl.load(counts_ptr + row + (column // 16)[None, :], mask=known, other=0)
    before = (before >> (column // 4 % 4 * 8)[None, :]) & 255
    shift = (column % 4 * 8)[None, :]
    return word >> shift, start + before + count_bits(word & ((1 << shift) - 1), POPC)


@triton.jit  # type: ignore[untyped-decorator]
def multiply(  # type: ignore[no-untyped-def]
    x_ptr, masks_ptr, values_ptr, starts_ptr, counts_ptr, y_ptr, tokens, outputs, inputs,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr, EVEN: tl.constexpr, POPC: tl.constexpr,
):  # fmt: skip
    """Multiply ROWS rows by TOKENS tokens, BYTES bytes of their masks at a time.

    Every bit loads a value, and those that are not set the one that follows: it is in the cache, the next set bit needs
    it, and a load without a condition is three instructions less. Hence the value of slack at the end.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    x_ptr += token[:, None].to(tl.int64) * inputs
    blocks = tl.cdiv(inputs, 128)
    sums = tl.zeros((TOKENS, ROWS, BYTES), tl.float32)
    for first in range(0, blocks * 16, BYTES):
        column = first + tl.arange(0, BYTES)
        known = (rows < outputs)[:, None] & (column < blocks * 16)[None, :]
        bits, at = find(masks_ptr, starts_ptr, counts_ptr, rows, column, known, blocks, POPC)
        here = values_ptr + at
        for bit in tl.static_range(8):
            marked = (bits >> bit) & 1
            value = tl.where(marked != 0, tl.load(here).to(tl.float32), 0.0)
            here += marked
            x_column = column * 8 + bit
            inside = (token < tokens)[:, None]
            if not EVEN:
                inside = inside & (x_column < inputs)[None, :]
            x = tl.load(x_ptr + x_column[None, :], mask=inside, other=0).to(tl.float32)
            sums += value[None, :, :] * x[:, None, :]
    inside = (token < tokens)[:, None] & (rows < outputs)[None, :]
    tl.store(y_ptr + token[:, None].to(tl.int64) * outputs + rows[None, :], tl.sum(sums, 2), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def scatter(  # type: ignore[no-untyped-def]
    masks_ptr, values_ptr, starts_ptr, counts_ptr, weight_ptr, outputs, inputs,
    ROWS: tl.constexpr, BYTES: tl.constexpr, POPC: tl.constexpr,
):  # fmt: skip
    """Write ROWS rows x BYTES * 8 columns, as integers."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    blocks = tl.cdiv(inputs, 128)
    known = (rows < outputs)[:, None] & (column < blocks * 16)[None, :]
    bits, at = find(masks_ptr, starts_ptr, counts_ptr, rows, column, known, blocks, POPC)
    bit = tl.arange(0, 8)[None, None, :]
    marked = (bits[:, :, None] >> bit) & 1
    place = at[:, :, None] + tl.cumsum(marked, 2) - marked
    value = tl.load(values_ptr + place, mask=marked != 0, other=0)
    here = column[None, :, None] * 8 + bit
    out = weight_ptr + rows[:, None, None].to(tl.int64) * inputs + here
    tl.store(out, value, mask=(rows < outputs)[:, None, None] & (here < inputs))
