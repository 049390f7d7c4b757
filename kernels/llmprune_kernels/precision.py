"""TF32: fp32 products on a GPU's tensor cores, their factors rounded to 10 bits, their sums in fp32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Multiply fp32 matrices in TF32 inside the block, where `device` can and nobody asked for repeatable results.

    Meant for products only: keep factorisations and triangular solves outside.
    """
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        yield
        return
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before
