"""Kernels compiled ahead of time, for GPUs that are not here, and what there is to read in their machine code."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 89, 90, 100)
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?);")
_JUMP = re.compile(r"BRA\S*\s.*?`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Code:
    """The machine code of a kernel, instruction by instruction, and the PTX it was made of."""

    instructions: list[str]
    loop: list[str]  # the longest one
    registers: int
    ptx: str

    def count(self, pattern: str) -> int:
        """Return how many instructions match."""
        return sum(re.search(rf"\b{pattern}\b", instruction) is not None for instruction in self.instructions)

    @property
    def spills(self) -> int:
        """Instructions that put registers into memory or get them back."""
        return self.count("(STL|LDL)[.0-9A-Z]*")


def compiled(kernel: Any, arguments: dict[str, str], constants: dict[str, Any], architecture: int, warps: int) -> Code:
    """Compile a kernel of plain Triton or Gluon; pointers and the arguments `inputs` are taken as divisible by 16."""
    places = {argument: number for number, argument in enumerate(kernel.arg_names)}
    aligned = [name for name, kind in arguments.items() if kind.startswith("*") or name == "inputs"]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        fn=kernel,
        signature=arguments | dict.fromkeys(constants, "constexpr"),
        constexprs={(places[name],): value for name, value in constants.items()},
        attrs={(places[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        text, resources = (_run(*command, file.name) for command in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage")))
    registers = re.search(r"REG:(\d+)", resources)
    assert registers is not None, resources
    return Code(*_read(text), int(registers[1]), made.asm["ptx"])


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _read(text: str) -> tuple[list[str], list[str]]:
    """Return all instructions of a disassembly, and those of its longest loop."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loop: list[str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(instructions)
        if instruction := _INSTRUCTION.search(line):
            instructions.append(instruction[1])
            jump = _JUMP.search(instruction[1])
            begin = labels.get(jump[1], len(instructions)) if jump else len(instructions)
            if len(instructions) - begin > 1:  # the end of every kernel is a jump to itself
                loop = max(loop, instructions[begin:], key=len)
    return instructions, loop
