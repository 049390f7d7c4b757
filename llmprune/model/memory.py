"""How much fits: sequences in a forward, and where hidden states wait between blocks."""

import ctypes
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor

from llmprune.errors import ResourceError

_DEVICE_SHARE = 0.04  # of a GPU's free memory, for the activations of one block
_STATISTICS_SHARE = 0.4  # of a GPU's free memory
_HOST_STATISTICS_SHARE = 1 / 32  # of the host's available memory: others live there too
_SIDE_BY_SIDE_SHARE = 0.25  # of the host's available memory, for the activations of all lanes within one block
_GPU_SIDE_BY_SIDE_SHARE = 0.5  # of a GPU's free memory, for those of them that lanes keep while they wait
_EXHAUSTED = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # a CPU's, a GPU's, and its libraries' words
_BLOCKS_SHARE = 0.1  # of a GPU's free memory, for blocks that will be wanted again
_KEPT_SHARE = 0.25  # of the host's available memory, for the hidden states before every block at once
_GROWTH = 1.05  # of the process's memory from block to block, up to which it stays
_HIDDEN_SHARE = 0.4  # of a GPU's free memory that hidden states may take before they move to the host


def free_bytes(device: torch.device) -> int:
    """Return how much more memory tensors can take on a GPU: what is free, and what torch has reserved and not in use."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def batch_size(length: int, config: Any, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many sequences of `length` tokens go through a block at once."""
    if device.type != "cuda":
        return 1  # a CPU gains little from more, and rounds as the papers' scripts do, sequence by sequence
    return max(1, int(_DEVICE_SHARE * free_bytes(device) // (token_bytes(config, dtype) * length)))


def home_device(device: torch.device, rows: Sequence[Tensor], config: Any, dtype: torch.dtype) -> torch.device:
    """Return where the hidden states of all `rows` of tokens wait: on the device if they fit there, else the host."""
    if device.type != "cuda":
        return device
    needed = sum(len(row) for row in rows) * hidden_size(config) * dtype.itemsize
    return device if needed < _HIDDEN_SHARE * free_bytes(device) else torch.device("cpu")


def most_kept(rows: Sequence[Tensor], blocks: int, config: Any, dtype: torch.dtype) -> int:
    """Return how many of the first `rows` of tokens may have their hidden states kept before every block; one at least."""
    room = _KEPT_SHARE * psutil.virtual_memory().available / (blocks * hidden_size(config) * dtype.itemsize)
    for count, row in enumerate(rows):
        room -= len(row)
        if room < 0:
            return max(count, 1)
    return len(rows)


def statistics_budget(block_bytes: int, device: torch.device) -> int:
    """Return how many bytes the statistics of one block may take together."""
    if device.type == "cuda":
        return int(_STATISTICS_SHARE * free_bytes(device))
    return max(block_bytes, int(_HOST_STATISTICS_SHARE * psutil.virtual_memory().available))


def room_for_blocks(device: torch.device) -> int:
    """Return how many bytes of blocks may stay on a GPU for a second pass, so that they are read from disk only once.

    On a CPU none need to: the system caches the files.
    """
    return int(_BLOCKS_SHARE * free_bytes(device)) if device.type == "cuda" else 0


def parameter_bytes(module: torch.nn.Module) -> int:
    """Return the bytes that the parameters of a module take."""
    return sum(parameter.nbytes for parameter in module.parameters())


@contextmanager
def out_of_memory_in(name: str, kind: type[ResourceError] = ResourceError) -> Iterator[None]:
    """Turn every library's way to say that memory ran out into a ResourceError that names a part of the model."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise kind(
            f"out of memory in {name}: free some, or start anew with fewer --samples or on another --device"
        ) from None


def fits_side_by_side(tokens: int, config: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Say whether the activations of all calibration tokens within one block fit into the memory of the device."""
    if device.type == "cuda":
        return tokens * _held_bytes(config, dtype) <= _GPU_SIDE_BY_SIDE_SHARE * free_bytes(device)
    return tokens * token_bytes(config, dtype) <= _SIDE_BY_SIDE_SHARE * psutil.virtual_memory().available


def token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of activations that a token takes at most while a block computes."""
    hidden, widest = _widths(config)
    return (6 * hidden + 3 * widest) * dtype.itemsize


def _held_bytes(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of a token's activations that a lane keeps while it waits for the others before a matrix.

    In attention these are up to six tensors of the hidden width, in the MLP two of it and two of the MLP's width.
    """
    hidden, widest = _widths(config)
    return max(6 * hidden, 2 * hidden + 2 * widest) * dtype.itemsize


def hidden_size(config: Any) -> int:
    """Return the width of a model's hidden states, or a guess where its configuration does not tell."""
    return int(getattr(config.get_text_config(), "hidden_size", 1024))


def _widths(config: Any) -> tuple[int, int]:
    """Return the widths of the hidden states and of the MLP."""
    hidden, widest = hidden_size(config), getattr(config.get_text_config(), "intermediate_size", None)
    return hidden, widest if isinstance(widest, int) else 4 * hidden


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is one of the many ways in which libraries say that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in _EXHAUSTED)


def give_back_freed_memory(of_gpu: bool = False) -> None:
    """Return freed memory to the system: glibc keeps it, scattered, and a run would grow from block to block.

    What torch has freed on a GPU the next block uses again, and giving it back stops the GPU: only for `of_gpu`, when
    memory has run out.
    """
    if of_gpu and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in other C libraries
        if trim is not None:
            trim(0)


def give_back_growth(usual: int | None) -> int | None:
    """Give freed memory back once the process has grown, and return how much of it is usual after a block.

    What a block has freed the next one takes again, which is many times faster than to get it from the system.

    Args:
        usual: what this returned after the block before; None at first.
    """
    resident: int = psutil.Process().memory_info().rss
    if usual is None or resident <= _GROWTH * usual:
        return usual or resident
    give_back_freed_memory()
    return None


def make_room() -> None:
    """Free what nobody needs any more, after memory ran out: also what refers to itself in circles."""
    gc.collect()
    give_back_freed_memory(of_gpu=True)
