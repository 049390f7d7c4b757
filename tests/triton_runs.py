"""Triton without a GPU: its interpreter, and its compiler ahead of time, which cannot serve one process."""

import json
import os
import subprocess
import sys
from typing import Any

import numpy
import pytest

from llmprune_kernels.support import triton_version

# Defines compiled(function, signature, constants, architecture, **options) -> counts of machine instructions.
COMPILE = """
import collections, json, re, subprocess, tempfile
from pathlib import Path
import triton as t
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
tools = Path(t.__file__).parent / "backends" / "nvidia" / "bin"
def compiled(function, signature, constants, architecture, **options):
    places = {argument: number for number, argument in enumerate(function.arg_names)}
    source = ASTSource(
        fn=function, signature=signature | {name: "constexpr" for name in constants},
        constexprs={(places[name],): value for name, value in constants.items()},
        attrs={(places[name],): [["tt.divisibility", 16]] for name, kind in signature.items() if kind[0] == "*"},
    )
    made = t.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    return collections.Counter(re.findall(r"^\\s+/\\*\\w+\\*/\\s+(?:@\\S+\\s+)?([A-Z0-9]+)", code, re.MULTILINE))
"""

# Whatever a kernel is given to fill holds NaN (floats) or 1 before.
POISON = """
import json, sys, torch
empty = torch.Tensor.new_empty
def poisoned(self, *shape, **rest):
    made = empty(self, *shape, **rest)
    return made.fill_(torch.nan if made.is_floating_point() else 1)
torch.Tensor.new_empty = poisoned
"""


def require_interpreter() -> None:
    """Skip a test where Triton's interpreter cannot run loops, whose bounds NumPy 2.4 no longer takes for numbers."""
    if (triton_version() or (0, 0)) < (3, 7) and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton before 3.7 does not run with NumPy 2.4")


def run(code: str, interpret: bool) -> Any:
    """Run Python code in a process of its own, and return the JSON of its last line."""
    if interpret:
        require_interpreter()
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
