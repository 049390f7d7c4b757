"""Products with 2:4 weights in plain Triton, on any GPU: they read 9/16 of the bytes of the dense weight.

One kernel for a single token, where nothing counts but reading, and one for more, which expands a block of weights in
registers and hands it to the tensor cores. A third expands whole weights. All run in Triton's interpreter.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter multiplies the bit patterns of bfloat16 in tl.dot; there the operands are widened first.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOKENS_A_BLOCK = 16


def linear(x_TI: Tensor, pairs_OG: Tensor, codes: Tensor) -> Tensor:
    """Return x [T, I], bfloat16 or float16, times the transposed weight that `reference.pack` packed: [T, O]."""
    tokens, inputs = x_TI.shape
    outputs = len(pairs_OG)
    y_TO = x_TI.new_empty(tokens, outputs)
    if tokens == 0:
        return y_TO
    half = x_TI.dtype is torch.float16
    if tokens == 1:
        one_token[(triton.cdiv(outputs, 4),)](
            x_TI.contiguous(), pairs_OG, codes, y_TO, outputs, inputs, HALF=half, ROWS=4, GROUPS=256, num_warps=4
        )
        return y_TO
    by_place = x_TI.reshape(tokens, -1, 4).permute(2, 0, 1).contiguous()  # [4, T, G]: a group's columns lie apart
    grid = (triton.cdiv(outputs, 32), triton.cdiv(tokens, TOKENS_A_BLOCK))
    many_tokens[grid](
        by_place, pairs_OG, codes, y_TO, tokens, outputs, inputs,
        HALF=half, WIDEN=INTERPRETED, TOKENS=TOKENS_A_BLOCK, ROWS=32, GROUPS=32, num_warps=4,
    )  # fmt: skip
    return y_TO


def expand(words: Tensor, codes: Tensor, outputs: int, inputs: int, dtype: torch.dtype, fragments: bool) -> Tensor:
    """Return the dense weight [O, I] of the pairs and codes of `reference`, or of the values and places of `fragments`."""
    weight_OI = torch.empty(outputs, inputs, dtype=dtype, device=words.device)
    grid = (triton.cdiv(outputs, 16), triton.cdiv(inputs, 4 * 64))
    steps = codes.shape[1]  # of 64 columns, or words of 32
    scatter[grid](
        words, codes, weight_OI.view(torch.int64), outputs, inputs, steps,
        FRAGMENTS=fragments, ROWS=16, GROUPS=64, num_warps=4,
    )  # fmt: skip
    return weight_OI


@triton.jit  # type: ignore[untyped-decorator]
def halves(pairs, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the low and the high 16-bit values of int32 words as float32."""
    if HALF:
        low = (pairs & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        low = (pairs << 16).to(tl.float32, bitcast=True)
        high = (pairs & -65536).to(tl.float32, bitcast=True)
    return low, high


@triton.jit  # type: ignore[untyped-decorator]
def one_token(  # type: ignore[no-untyped-def]
    x_ptr, pairs_ptr, codes_ptr, y_ptr, outputs, inputs,
    HALF: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Sum ROWS rows, GROUPS groups of four columns at a time."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    groups = inputs // 4
    inside = (rows < outputs)[:, None]
    sums = tl.zeros((ROWS, GROUPS), tl.float32)
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        here = inside & (group < groups)[None, :]
        at = rows[:, None].to(tl.int64) * groups + group[None, :]
        pairs = tl.load(pairs_ptr + at, mask=here, other=0, eviction_policy="evict_first")
        words = tl.load(
            codes_ptr + rows[:, None].to(tl.int64) * (groups // 8) + (group // 8)[None, :], mask=here, other=0
        )
        code = (words >> ((group % 8) * 4)[None, :]) & 15
        left, right = code & 3, code >> 2
        low, high = halves(pairs, HALF)
        known = group < groups
        x_0 = tl.load(x_ptr + group * 4, mask=known, other=0).to(tl.float32)[None, :]
        x_1 = tl.load(x_ptr + group * 4 + 1, mask=known, other=0).to(tl.float32)[None, :]
        x_2 = tl.load(x_ptr + group * 4 + 2, mask=known, other=0).to(tl.float32)[None, :]
        x_3 = tl.load(x_ptr + group * 4 + 3, mask=known, other=0).to(tl.float32)[None, :]
        sums += low * tl.where(left == 0, x_0, tl.where(left == 1, x_1, x_2))
        sums += high * tl.where(right == 1, x_1, tl.where(right == 2, x_2, x_3))
    tl.store(y_ptr + rows, tl.sum(sums, 1), mask=rows < outputs)


@triton.jit  # type: ignore[untyped-decorator]
def many_tokens(  # type: ignore[no-untyped-def]
    x_ptr, pairs_ptr, codes_ptr, y_ptr, tokens, outputs, inputs,
    HALF: tl.constexpr, WIDEN: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Multiply TOKENS tokens by ROWS rows: one product for each of the four places in a group."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    groups = inputs // 4
    sums = tl.zeros((TOKENS, ROWS), tl.float32)
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        here = (rows < outputs)[None, :] & (group < groups)[:, None]
        pairs = tl.load(pairs_ptr + rows[None, :].to(tl.int64) * groups + group[:, None], mask=here, other=0)
        words = tl.load(
            codes_ptr + rows[None, :].to(tl.int64) * (groups // 8) + (group // 8)[:, None], mask=here, other=0
        )
        code = (words >> ((group % 8) * 4)[:, None]) & 15
        left, right = code & 3, code >> 2
        low, high = halves(pairs, HALF)
        for place in tl.static_range(4):
            weights = tl.where(left == place, low, 0.0) + tl.where(right == place, high, 0.0)
            x_now = tl.load(
                x_ptr + (place * tokens + token[:, None]).to(tl.int64) * groups + group[None, :],
                mask=(token < tokens)[:, None] & (group < groups)[None, :],
                other=0,
            )
            if WIDEN:
                sums = tl.dot(x_now.to(tl.float32), weights, sums)
            else:
                sums = tl.dot(x_now, weights.to(x_now.dtype), sums)
    inside = (token < tokens)[:, None] & (rows < outputs)[None, :]
    tl.store(y_ptr + token[:, None].to(tl.int64) * outputs + rows[None, :], sums, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def scatter(  # type: ignore[no-untyped-def]
    words_ptr, codes_ptr, weight_ptr, outputs, inputs, steps,
    FRAGMENTS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Write ROWS rows x GROUPS groups of four columns, a group at a time as one 64-bit word."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    group = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[None, :]
    if FRAGMENTS:
        tile = (row // 16).to(tl.int64) * steps
        half, lane = row // 8 % 2, row % 8 * 4
        word = ((tile * 2 + group // 8) * 32 + lane + group % 4) * 4 + group // 4 % 2 * 2 + half
        code = (tile + group // 16) * 32 + lane + group % 16 // 4
        shift = half * 16 + group % 4 * 4
    else:
        word = row.to(tl.int64) * (inputs // 4) + group
        code = row.to(tl.int64) * steps + group // 8
        shift = group % 8 * 4
    inside = (row < outputs) & (group < inputs // 4)
    pair = tl.load(words_ptr + word, mask=inside, other=0)
    place = tl.load(codes_ptr + code, mask=inside, other=0) >> shift
    low = (pair & 0xFFFF).to(tl.int64) << ((place & 3) * 16).to(tl.int64)
    high = ((pair >> 16) & 0xFFFF).to(tl.int64) << (((place >> 2) & 3) * 16).to(tl.int64)
    tl.store(weight_ptr + row.to(tl.int64) * (inputs // 4) + group, low | high, mask=inside)
