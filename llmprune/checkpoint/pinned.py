"""Tensors on their way from a GPU to host memory."""

import torch
from torch import Tensor


def on_host(tensor: Tensor) -> Tensor:
    """Return a tensor in host memory; from a GPU through pinned memory, which is several times as fast."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
