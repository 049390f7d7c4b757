"""What a process runs on and with: the machine, the versions of packages, and the memory it has needed."""

import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from llmprune.kernels import compiled_level

_PACKAGES = (
    "llmprune",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "numpy",
    "triton",
)


def peak_memory() -> dict[str, int]:
    """Return the most memory the process has occupied so far, in bytes, on the host and on the GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"host": host, "device": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Return what the run ran on; `kernels` is the level of instructions that the compiled ones use, 0 without them."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"machine": platform.machine(), "threads": torch.get_num_threads(), "gpu": gpu, "kernels": compiled_level()}
