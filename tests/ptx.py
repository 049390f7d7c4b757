"""A machine that runs PTX, the assembly that Triton makes of a kernel, without a GPU: numpy over a program's threads.

It knows the instructions that the kernels here are compiled to, and stops at any other. Threads run in lock step, so
branches must be the same for all of them. Addresses are checked: every access must lie within an array that was given.

`mma_sp` follows "Matrix fragments for sparse mma.m16n8k32" of the PTX manual, lane by lane, and knows nothing of how
llmprune packs weights.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

WARP = 32
_LINE = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*);")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_MMA = "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32."
Words = NDArray[Any]


class Memory:
    """What kernels read and write: arrays at addresses far apart."""

    def __init__(self) -> None:
        self._arrays: list[tuple[int, NDArray[np.uint8]]] = []

    def place(self, array: NDArray[Any]) -> int:
        """Return the address that an array, which is read and written in place, is given."""
        address = 1 << 20 if not self._arrays else self._arrays[-1][0] + self._arrays[-1][1].size + (1 << 20) & -4096
        self._arrays.append((address, array.reshape(-1).view(np.uint8)))
        return address

    def bytes_at(self, addresses: Words, size: int) -> tuple[NDArray[np.uint8], Words]:
        """Return the array that all addresses lie in, and the places [N, size] in it."""
        for start, array in self._arrays:
            places = addresses.astype(np.int64) - start
            if (places >= 0).all() and (places + size <= array.size).all():
                assert not (addresses % size).any(), "an address is not aligned"
                return array, places[:, None] + np.arange(size)
        raise AssertionError(f"an access of {size} bytes outside of all arrays: {addresses[:4]} ...")


@dataclass
class Program:
    """One program of a launch: its threads' registers, what they share, and where it is in the grid."""

    memory: Memory
    threads: int
    grid: tuple[int, int, int]
    at: tuple[int, int, int]
    parameters: Sequence[int]
    registers: dict[str, Words] = field(default_factory=dict)
    shared: NDArray[np.uint8] = field(default_factory=lambda: np.full(1 << 17, 0xFF, np.uint8))  # NaN in any type

    def run(self, code: list[str]) -> None:
        """Run the instructions of a kernel."""
        labels = {line[:-1]: number for number, line in enumerate(code) if line.endswith(":")}
        number = 0
        while number < len(code):
            line = code[number]
            number += 1
            if line.endswith(":"):
                continue
            parsed = _LINE.fullmatch(line)
            assert parsed is not None, line
            negated, predicate, name, rest = parsed.groups()
            active = np.full(self.threads, True)
            if predicate:
                active = self.registers[predicate].astype(bool) ^ bool(negated)
            if name == "ret":
                return
            if name == "bra":
                assert active.all() or not active.any(), "threads take different branches"
                number = labels[rest] if active.all() else number
            else:
                self._do(name, _OPERAND.findall(rest), active)

    def _do(self, name: str, operands: list[str], active: Words) -> None:
        kind, *details = name.split(".")
        if name.startswith(_MMA):
            self._mma_sp(operands, "bf16" in details)
        elif kind in ("ld", "st") and details[0] != "param":
            self._move(kind, details, operands, active)
        elif kind == "shfl":
            self._set(operands[0], self._get(operands[1])[np.arange(self.threads) ^ int(operands[2])], active)
        elif kind != "bar":
            assert kind in _OPERATIONS, name
            operation = _OPERATIONS[kind]
            values = [self._get(operand, details[-1]) for operand in operands[1:]]
            if name.startswith("mad.wide"):
                values[2] = self._get(operands[3], "b64").astype(_wide(details, values[0]).dtype)
            with np.errstate(over="ignore", invalid="ignore"):
                self._set(operands[0], operation(details, *values), active)

    def _get(self, operand: str, kind: str = "b32") -> Words:
        """Return an operand for each thread, as the type that an instruction takes it for."""
        if operand.startswith("%"):
            words = self.registers[operand] if operand in self.registers else self._special(operand)
        elif operand == "global_smem":
            words = self._all(0)
        elif operand.startswith("["):
            words = self._all(self.parameters[int(re.findall(r"param_(\d+)", operand)[0])])
        else:
            value = int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0)
            words = self._all(value & 0xFFFFFFFFFFFFFFFF)
        if kind not in _TYPES:
            return words
        size = np.dtype(_TYPES[kind]).itemsize
        return words.astype(f"u{size}").view(_TYPES[kind])

    def _special(self, name: str) -> Words:
        if name == "%tid.x":
            return np.arange(self.threads, dtype=np.uint64)
        register, _, axis = name.partition(".")
        return self._all({"%ctaid": self.at, "%nctaid": self.grid}[register]["xyz".index(axis)])

    def _all(self, value: int) -> Words:
        return np.full(self.threads, value, np.uint64)

    def _set(self, operand: str, values: Words, active: Words) -> None:
        """Set a register in the active threads, its bits without a type."""
        if values.dtype != bool:
            values = values.view(f"u{values.itemsize}").astype(np.uint64)
        before = self.registers.get(operand, np.zeros_like(values))
        self.registers[operand] = np.where(active, values, before)

    def _move(self, kind: str, details: list[str], operands: list[str], active: Words) -> None:
        """Load or store one to four registers."""
        size = int(details[-1][1:]) // 8
        address, group = operands[::-1] if kind == "ld" else operands
        registers = re.findall(r"%\w+", group)
        base, _, offset = address.strip("[] ").partition("+")
        addresses = self._get(base.strip(), "b64")[active] + np.uint64(int(offset or 0))
        if not len(addresses):
            return
        shared = details[0] == "shared"
        wide = size * len(registers)
        array, places = (self.shared, addresses.astype(np.int64)[:, None] + np.arange(wide)) if shared else (
            self.memory.bytes_at(addresses, wide)
        )  # fmt: skip
        if kind == "st":
            words = np.stack([self.registers[name].astype(f"u{size}")[active] for name in registers], 1)
            array[places] = np.ascontiguousarray(words).view(np.uint8)
            return
        words = np.ascontiguousarray(array[places]).view(f"u{size}")
        for number, name in enumerate(registers):
            values = np.zeros(self.threads, np.uint64)
            values[active] = words[:, number]
            self._set(name, values, active)

    def _mma_sp(self, operands: list[str], bfloat: bool) -> None:
        groups = [re.findall(r"%\w+", operand) for operand in operands[:4]]
        a, b, c = ([self.registers[name].astype(np.uint32) for name in group] for group in groups[1:])
        metadata, selector = self.registers[operands[4]].astype(np.uint32), int(operands[5], 16)
        out = [np.empty(self.threads, np.float32) for _ in range(4)]
        for first in range(0, self.threads, WARP):
            warp = slice(first, first + WARP)
            sums = mma_sp(
                np.stack([register[warp] for register in a]), np.stack([register[warp] for register in b]),
                np.stack([register[warp].view(np.float32) for register in c]), metadata[warp], selector, bfloat,
            )  # fmt: skip
            for register, values in zip(out, sums, strict=True):
                register[warp] = values
        for name, values in zip(groups[0], out, strict=True):
            self._set(name, values, np.full(self.threads, True))


def mma_sp(a: Words, b: Words, c: Words, metadata: Words, selector: int, bfloat: bool) -> Words:
    """Return what one warp computes: registers [4, 32] of C, from those of A, B and C and the metadata [32].

    A [16, 32] has 2 of every 4 columns; `selector` says which pair of lanes in each four holds where they belong.
    """
    a_dense, b_dense = np.zeros((16, 32), np.float32), np.zeros((32, 8), np.float32)
    values_a, values_b = (_halves(words, bfloat) for words in (a, b))  # [4, 32, 2]
    group, member = np.arange(WARP) >> 2, np.arange(WARP) & 3
    for register in range(4):
        row, chunk = group + 8 * (register & 1), member + 4 * (register >> 1)  # a chunk is 4 columns
        holder = 4 * group + 2 * selector + chunk // 4
        code = metadata[holder] >> (16 * (register & 1) + 4 * (chunk % 4)).astype(np.uint32) & 15
        left, right = code & 3, code >> 2
        assert (left < right).all(), "two values of a chunk in one place, or out of order"
        a_dense[row, 4 * chunk + left], a_dense[row, 4 * chunk + right] = values_a[register].T
        for half in range(2):
            b_dense[2 * member + 8 * register + half, group] = values_b[register, :, half]
    product = a_dense @ b_dense
    places = [(group + 8 * (register >> 1), 2 * member + (register & 1)) for register in range(4)]
    sums: Words = c + np.stack([product[place] for place in places])
    return sums


def _halves(words: Words, bfloat: bool) -> Words:
    """Return the two 16-bit values in each word, the low one first, as float32."""
    halves = np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2)
    if bfloat:
        return (halves.astype(np.uint32) << 16).view(np.float32)
    return halves.view(np.float16).astype(np.float32)


def _round_to_bf16(values: Words) -> Words:
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _wide(details: list[str], values: Words) -> Words:
    """Return a product's factor in the width of its result."""
    if details[0] != "wide":
        return values
    return values.astype(np.int64 if details[-1][0] == "s" else np.uint64)


def _convert(details: list[str], values: Words) -> Words:
    if details[-2:] == ["bf16", "f32"]:
        return _round_to_bf16(values)
    return values.astype(_TYPES[details[-2]])


_TYPES = {
    "b16": "u2", "b32": "u4", "b64": "u8", "u32": "u4", "u64": "u8", "s32": "i4", "s64": "i8", "f32": "f4", "f16": "f2",
}  # fmt: skip
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip
_OPERATIONS: dict[str, Callable[..., Words]] = {
    "ld": lambda details, value: value,  # of a parameter
    "mov": lambda details, value: value.astype(bool) if details[-1] == "pred" else value,
    "and": lambda details, a, b: a & b,
    "or": lambda details, a, b: a | b,
    "xor": lambda details, a, b: a ^ b,
    "shl": lambda details, a, b: a << b,
    "shr": lambda details, a, b: a >> b,
    "add": lambda details, a, b: a + b,
    "sub": lambda details, a, b: a - b,
    "bfe": lambda details, a, first, count: a >> first & ((1 << count) - 1).astype(a.dtype),
    "mul": lambda details, a, b: _wide(details, a) * _wide(details, b),
    "mad": lambda details, a, b, c: _wide(details, a) * _wide(details, b) + c,
    "setp": lambda details, a, b: _COMPARE[details[0]](a, b),
    "cvt": _convert,
}


def instructions(ptx: str) -> list[str]:
    """Return the instructions and labels of a kernel's body."""
    body = ptx[ptx.index("\n{") : ptx.index("\n}")]
    lines = (line.split("//")[0].strip() for line in body.splitlines())
    return [line for line in lines if line and line[0] not in "{}." and not line.startswith("$L__tmp")]


def launch(ptx: str, memory: Memory, grid: tuple[int, int, int], warps: int, parameters: Sequence[int]) -> None:
    """Run all programs of a grid, one after the other."""
    code = instructions(ptx)
    for z in range(grid[2]):
        for y in range(grid[1]):
            for x in range(grid[0]):
                Program(memory, warps * WARP, grid, (x, y, z), parameters).run(code)
