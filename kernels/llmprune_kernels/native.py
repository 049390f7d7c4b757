"""The compiled kernels: one shared library of plain C functions, made from every C++ file of this package.

It comes in the wheel where a compiler was there when that was built. Otherwise it is compiled once, at first use, into
the user's cache. Without a compiler there is no library, and every op runs as its torch reference.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch  # noqa: F401  its OpenMP runtime must be loaded first: the library then shares it, and its threads

ABI = 6  # that of llmprune_abi() in the C++ files
PACKAGE = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fPIC", "-shared")  # nothing is fused but where it says so
COMPILERS = ("c++", "g++", "clang++")

logger = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the library, compiled now if need be; None, with one line in the log, where that is not possible."""
    for path in _built():
        loaded = _load(path)
        if loaded is not None:
            return loaded
    logger.warning(
        "no compiled kernels: torch runs in their place, which is slower; install a C++ compiler such as g++"
    )
    return None


def declared(signatures: Mapping[str, tuple[Any, ...]]) -> ctypes.CDLL | None:
    """Return the library with the argument types of some functions that return nothing set; None where there is none."""
    native = library()
    for name, arguments in signatures.items() if native is not None else ():
        function = getattr(native, name)
        function.argtypes, function.restype = arguments, None
    return native


@functools.cache
def cpu_level() -> int:
    """Return what the CPU offers: 2 AVX-512 with VBMI2 and BF16, 1 AVX2, 0 neither or no library."""
    native = library()
    return int(native.llmprune_cpu_level()) if native is not None else 0


def cache_folder() -> Path:
    """Return where llmprune keeps what it has compiled and measured."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "llmprune"


def sources() -> list[Path]:
    """Return the C++ files of the package."""
    return sorted(PACKAGE.glob("*/*.cpp"))


def _built() -> Iterator[Path]:
    """Yield the library of the wheel, then the one in the cache, which is compiled when it is asked for."""
    shipped = (path for suffix in EXTENSION_SUFFIXES for path in PACKAGE.glob(f"_native{suffix}"))
    yield from (path for path in shipped if not _outdated(path))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources()) + " ".join(FLAGS).encode())
    cached = cache_folder() / f"native-{digest.hexdigest()[:16]}.so"
    if cached.is_file() or _compile(cached):
        yield cached


def _outdated(path: Path) -> bool:
    """Say whether a source was edited since; an installer writes all files of a wheel within a minute."""
    return max(source.stat().st_mtime for source in sources()) > path.stat().st_mtime + 60


def _load(path: Path) -> ctypes.CDLL | None:
    try:
        loaded = ctypes.CDLL(str(path))
        return loaded if loaded.llmprune_abi() == ABI else None
    except (OSError, AttributeError) as error:
        logger.debug("%s: %s", path, error)
        return None


def _compile(target: Path) -> bool:
    """Compile the library with the first compiler that can, with OpenMP if it knows that; say whether one could."""
    compilers = [found for found in (os.environ.get("CXX"), *COMPILERS) if found and shutil.which(found)]
    return any(
        _compile_with([compiler, *FLAGS, *openmp], target) for compiler in compilers for openmp in (("-fopenmp",), ())
    )


def _compile_with(command: list[str], target: Path) -> bool:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            files = [str(path) for path in sources()]
            done = subprocess.run([*command, *files, "-o", str(made)], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                made.replace(target)  # in one step: another process may be doing the same
            else:
                logger.debug("%s: %s", command[0], done.stderr)
            return done.returncode == 0
    except OSError as error:
        logger.debug("%s: %s", command[0], error)
        return False
