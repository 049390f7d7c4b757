"""The layout of bitmasks that GPUs read, where every thread must find its values by itself.

`masks` [O, 4 B] holds 32 columns a word, lowest bit first, in B blocks of 128 columns, filled up with zeros; `values`
the marked weights row by row. `starts` [O, B] says where the values of a block begin, and `counts` [O, B] how many of
the block lie before each of its four words, a byte each, lowest first. At half the zeros that is 1.5 bits and half a
weight for each: 0.594 of bfloat16. A value of slack comes last: bits that are not set read the value after theirs.
"""

import torch
from torch import Tensor
from torch.nn import functional

from llmprune_kernels.bitmask.reference import INTEGERS, as_bits

BLOCK = 128  # columns
_AT_ONCE = 1 << 24  # weights: packing takes some 20 bytes for each
_WORDS = BLOCK // 32


def pack(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the masks, values, starts and counts of a weight, on its device.

    Raises:
        ValueError: more values than an int32 can count.
    """
    step = max(1, _AT_ONCE // weight_OI.shape[1])
    parts = [_pack_rows(as_bits(rows_OI.contiguous())) for rows_OI in weight_OI.split(step)]
    masks, values, totals, counts = (torch.cat(each) for each in zip(*parts, strict=True))
    if len(values) >= 1 << 31:
        raise ValueError(f"{len(values)} values are more than this layout can count")
    starts = (totals.flatten().cumsum(0) - totals.flatten()).view_as(totals).to(torch.int32)
    return masks, functional.pad(values, (0, 1)).view(weight_OI.dtype), starts, counts


def expand(masks: Tensor, values: Tensor, inputs: int) -> Tensor:
    """Return the dense weight [O, I], bit for bit the one that was packed."""
    places = torch.arange(32, dtype=torch.int32, device=masks.device)
    kept_OI = ((masks.unsqueeze(-1) >> places) & 1).bool().flatten(1)[:, :inputs]
    bits = torch.zeros(kept_OI.shape, dtype=INTEGERS[values.element_size()], device=masks.device)
    bits[kept_OI] = as_bits(values)[:-1]
    return bits.view(values.dtype)


def _pack_rows(bits_OI: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept_OI = functional.pad(bits_OI != 0, (0, -bits_OI.shape[1] % BLOCK))
    words = kept_OI.view(len(kept_OI), -1, 32)
    masks = as_int32((words.long() << torch.arange(32, device=words.device)).sum(-1))
    marked = words.sum(-1).view(len(words), -1, _WORDS)
    before = marked.cumsum(-1) - marked
    counts = as_int32((before << 8 * torch.arange(_WORDS, device=words.device)).sum(-1))
    return masks, bits_OI[bits_OI != 0], marked.sum(-1), counts


def as_int32(words: Tensor) -> Tensor:
    """Return the low 32 bits of int64 words below 2^32."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
