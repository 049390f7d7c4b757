"""What the GPU of a tensor, and the libraries here, can run. Each function returns what is missing, None if nothing is."""

import functools
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

GLUON_FROM = (3, 6)  # of Triton: the oldest release whose Gluon the kernels have been compiled with
SPARSE_CORES_FROM = (8, 0)  # compute capability


def triton_missing() -> str | None:
    """Say why no Triton kernel can run."""
    return None if triton_version() is not None else "Triton is not installed"


def sparse_cores_missing(device: torch.device) -> str | None:
    """Say why the kernel for sparse tensor cores cannot run on a device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "sparse tensor cores are those of NVIDIA GPUs"
    found = torch.cuda.get_device_capability(device)
    if found < SPARSE_CORES_FROM:
        return f"the GPU has compute capability {found[0]}.{found[1]}, sparse tensor cores begin with 8.0"
    return gluon_missing()


def gluon_missing() -> str | None:
    """Say why no Gluon kernel can be compiled."""
    installed = triton_version()
    if installed is None:
        return "Triton is not installed"
    if installed < GLUON_FROM or find_spec("triton.experimental.gluon") is None:
        return "Triton {}.{} is too old: its Gluon is needed as of {}.{}".format(*installed, *GLUON_FROM)
    return None


def cusparselt_missing(device: torch.device) -> str | None:
    """Say why cuSPARSELt cannot be used on a device."""
    if device.type != "cuda":
        return "cuSPARSELt is for GPUs"
    if not torch.backends.cusparselt.is_available():
        return "this torch comes without cuSPARSELt"
    if torch.cuda.get_device_capability(device) < SPARSE_CORES_FROM:
        return "cuSPARSELt needs compute capability 8.0"
    return None


@functools.cache
def triton_version() -> tuple[int, int] | None:
    """Return the major and minor version of Triton, under whatever name it was installed."""
    for package in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        try:
            major, minor = version(package).split(".")[:2]
            return int(major), int(minor)
        except PackageNotFoundError:
            continue
    return None
