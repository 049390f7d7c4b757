"""The same bytes again, on a GPU too."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmprune.errors import UnsupportedModelError


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Let torch use none but operations that repeat themselves to the bit.

    Raises:
        UnsupportedModelError: the model, or the method, needs one that does not.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may choose another sum every time
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise UnsupportedModelError(f"{str(error).partition(',')[0]}: run without --deterministic") from None
    finally:
        torch.use_deterministic_algorithms(before)
