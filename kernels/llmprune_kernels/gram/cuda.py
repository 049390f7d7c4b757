"""Products of 16-bit inputs on a GPU: multiplied as they are, each product exact, and summed in fp32.

No scale is applied before the product, so nothing is rounded. Shape suffixes: T tokens, I and J inputs.
"""

import torch
from torch import Tensor

_WIDTH = 2048  # half of a Gram matrix mirrors the other; smaller products would leave a GPU idle


def add_product(out_IJ: Tensor, x_TI: Tensor, y_TJ: Tensor, scale: float, before: float) -> None:
    """Overwrite `out_IJ` (fp32) with `before` times itself plus `scale` XᵀY, X and Y of one 16-bit dtype."""
    out_IJ.mul_(before).add_(torch.mm(x_TI.T, y_TJ, out_dtype=torch.float32), alpha=scale)


def add_gram(out_II: Tensor, x_TI: Tensor, scale: float, before: float) -> None:
    """As `add_product` with Y = X; what lies above the diagonal's squares is left as it was."""
    for start in range(0, len(out_II), _WIDTH):
        stop = min(start + _WIDTH, len(out_II))
        add_product(out_II[start:stop, :stop], x_TI[:, start:stop], x_TI[:, :stop], scale, before)
