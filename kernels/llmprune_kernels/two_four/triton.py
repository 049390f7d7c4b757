"""Products with 2:4 weights in plain Triton: they read 9/16 of the bytes of the dense weight.

One kernel for a single token, where nothing counts but reading, and one for more, which expands a block of weights in
registers and hands it to the tensor cores. Both run in Triton's interpreter.
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
    half = x_TI.dtype is torch.float16
    if tokens == 1:
        one_token[(triton.cdiv(outputs, 4),)](
            x_TI, pairs_OG, codes, y_TO, outputs, inputs, HALF=half, ROWS=4, GROUPS=256, num_warps=4
        )
        return y_TO
    by_place = x_TI.view(tokens, -1, 4).permute(2, 0, 1).contiguous()  # [4, T, G]: a group's columns lie apart
    grid = (triton.cdiv(outputs, 32), triton.cdiv(tokens, TOKENS_A_BLOCK))
    many_tokens[grid](
        by_place, pairs_OG, codes, y_TO, tokens, outputs, inputs,
        HALF=half, WIDEN=INTERPRETED, TOKENS=TOKENS_A_BLOCK, ROWS=32, GROUPS=32, num_warps=4,
    )  # fmt: skip
    return y_TO


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
