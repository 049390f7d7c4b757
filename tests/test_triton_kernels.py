"""The 2:4 GPU kernels without a GPU: their numbers in Triton's interpreter, their machine code compiled ahead of time.

Interpreter and compiler cannot serve one process, so each test runs what it needs in one of its own.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from llmprune_kernels.two_four import reference

pytest.importorskip("triton")

INTERPRET = """
import json, sys, torch
from llmprune_kernels.two_four import reference, triton
empty = torch.Tensor.new_empty
torch.Tensor.new_empty = lambda self, *shape, **rest: (
    empty(self, *shape, **rest) if rest else self.new_full(shape, torch.nan)
)
rows = []
for dtype in (torch.bfloat16, torch.float16):
    for outputs, inputs, tokens in ((5, 32, 1), (33, 1056, 1), (5, 32, 2), (33, 160, 17), (64, 256, 3)):
        generator = torch.Generator().manual_seed(outputs + tokens)
        weight = torch.randn(outputs, inputs // 4, 4, generator=generator)
        weight.scatter_(2, weight.abs().topk(2, -1, largest=False).indices, 0)
        weight[0] = 0
        weight[1, :, :3] = 0
        weight = weight.view(outputs, inputs).to(dtype)
        x = torch.randn(tokens, inputs, generator=generator).to(dtype)
        found = triton.linear(x, *reference.pack(weight)).double()
        expected = x.double() @ weight.double().T
        rows.append(float((found - expected).abs().max() / expected.abs().max()))
print(json.dumps(rows))
"""

COMPILE = """
import itertools, json, re, subprocess, tempfile
from pathlib import Path
import triton as t
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llmprune_kernels.two_four import triton as kernels
tools = Path(t.__file__).parent / "backends" / "nvidia" / "bin"
common = dict(x_ptr="*bf16", pairs_ptr="*i32", codes_ptr="*i32", y_ptr="*bf16", outputs="i32", inputs="i32")
jobs = {
    "one_token": (common, dict(HALF=False, ROWS=4, GROUPS=256)),
    "many_tokens": (common | dict(tokens="i32"), dict(HALF=False, WIDEN=False, TOKENS=16, ROWS=32, GROUPS=32)),
}
found = {}
for architecture, (name, (signature, constants)) in itertools.product((80, 89, 90, 100), jobs.items()):
    function = getattr(kernels, name)
    places = {argument: number for number, argument in enumerate(function.arg_names)}
    aligned = [a for a, kind in signature.items() if kind.startswith("*") or a in ("inputs", "outputs")]
    source = ASTSource(
        fn=function, signature=signature | {c: "constexpr" for c in constants},
        constexprs={(places[c],): value for c, value in constants.items()},
        attrs={(places[a],): [["tt.divisibility", 16]] for a in aligned},
    )
    made = t.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(num_warps=4))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    found[f"{name} {architecture}"] = {op: len(re.findall(pattern, code)) for op, pattern in
                   {"spills": r"\\bSTL", "tensor_cores": r"HG?MMA"}.items()}
print(json.dumps(found))
"""


def run(code: str, interpret: bool) -> object:
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def two_four(outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(outputs, inputs // 4, 4, generator=torch.Generator().manual_seed(0))
    weight.scatter_(2, weight.abs().topk(2, -1, largest=False).indices, 0)
    return weight.view(outputs, inputs).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packing_loses_nothing(dtype: torch.dtype) -> None:
    weight_OI = two_four(9, 96, dtype)
    weight_OI[0], weight_OI[1, 4:8], weight_OI[2, 1] = 0, torch.tensor([0, 0, 0, 2.5]), -0.0
    weight_OI[2, [0, 2, 3]] = torch.tensor([0, 0, torch.nan], dtype=dtype)
    pairs, codes = reference.pack(weight_OI)
    assert torch.equal(reference.expand(pairs, codes, dtype).view(torch.int16), weight_OI.view(torch.int16))
    assert pairs.nbytes + codes.nbytes == weight_OI.nbytes * 9 // 16


def test_a_group_by_hand() -> None:
    weight = torch.zeros(1, 32, dtype=torch.float16)
    weight[0, 1], weight[0, 3], weight[0, 31] = 1, 2, 4
    pairs, codes = reference.pack(weight)
    assert pairs[0, 0] == 0x3C00 | 0x4000 << 16 and codes.shape == (1, 1)
    assert int(codes) & 15 == 1 | 3 << 2
    assert int(codes) >> 28 & 15 == 0 | 3 << 2


def test_what_is_not_two_four_is_refused() -> None:
    with pytest.raises(ValueError, match="not 2:4"):
        reference.pack(torch.ones(2, 32, dtype=torch.bfloat16))
    for weight in (torch.zeros(2, 33, dtype=torch.bfloat16), torch.zeros(2, 32)):
        with pytest.raises(ValueError, match="needs 16-bit weights"):
            reference.pack(weight)


def test_the_kernels_compute_the_product() -> None:
    errors = run(INTERPRET, interpret=True)
    assert isinstance(errors, list) and len(errors) == 10
    bfloat16, float16 = errors[:5], errors[5:]
    assert max(bfloat16) < 2**-7  # one rounding of the output, which the interpreter rounds towards zero
    assert max(float16) < 2**-10


def test_the_kernels_compile_without_spills() -> None:
    found = run(COMPILE, interpret=False)
    assert isinstance(found, dict) and len(found) == 8
    assert all(code["spills"] == 0 for code in found.values())
    assert all(code["tensor_cores"] > 0 for name, code in found.items() if name.startswith("many"))
