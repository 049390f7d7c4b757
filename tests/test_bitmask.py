"""Compressed checkpoints: packed tensors bit for bit, folders byte for byte, through plain transformers as well."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.quantizers import auto

import llmprune
import tiny
from llmprune.checkpoint import packed
from llmprune.checkpoint.compressed import compress, decompress
from llmprune.checkpoint.format import DENSE_CONFIG
from llmprune.errors import CheckpointError, RecipeError
from llmprune.sparse import register
from llmprune.sparse.linear import SparseLinear
from llmprune_kernels.bitmask.layout import expand

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
SIZES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def random_bits(shape: tuple[int, ...], size: int, zeros: float, seed: int) -> Any:
    """Elements of any bit pattern, infinities and NaN payloads among them, and a share of zeros."""
    random = np.random.default_rng(seed)
    bits = random.integers(0, 256, (*shape, size), np.uint8).view(SIZES[size])[..., 0]
    bits[random.random(shape) < zeros] = 0
    return bits


def round_trip(bits: Any, dtype: str) -> tuple[packed.Layout, Tensor, Any]:
    layout = packed.Layout.of(dtype, bits.shape, bits.itemsize)
    flat = np.ascontiguousarray(bits).reshape(-1).view(np.uint8)
    buffer = packed.pack(flat, layout)
    assert len(buffer) == layout.packed_bytes(packed.values_of(flat, bits.itemsize))
    layout, matrix = packed.matrix_of(buffer, "w")
    return layout, expand(matrix), buffer


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(1, 70), min_size=2, max_size=3),
    size=st.sampled_from(sorted(SIZES)),
    zeros=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_bits_come_back(shape: list[int], size: int, zeros: float, seed: int) -> None:
    bits = random_bits(tuple(shape), size, zeros, seed)
    layout, elements, _ = round_trip(bits, "F8_E4M3" if size == 1 else "X")
    assert layout.shape == tuple(shape) and layout.size == size
    assert elements.numpy().reshape(-1).view(np.uint8).tobytes() == np.ascontiguousarray(bits).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_as_a_tensor(dtype: str) -> None:
    size = DTYPES[dtype].itemsize
    bits = random_bits((9, 21), size, 0.5, 3) & (1 if dtype == "BOOL" else SIZES[size](2 ** (8 * size) - 1))
    buffer = round_trip(bits, dtype)[2]
    found = packed.dense_tensor(torch.from_numpy(buffer), "w")
    assert found.dtype is DTYPES[dtype] and found.shape == (9, 21)
    assert found.view(torch.uint8).numpy().tobytes() == bits.tobytes()


def test_negative_zeros_and_nan_payloads_are_values() -> None:
    bits = np.zeros((2, 40), np.uint16)
    bits[0, :4] = [0x8000, 0x7FC1, 0xFFFF, 0x0001]
    _, elements, buffer = round_trip(bits, "BF16")
    assert elements.numpy().view(np.uint16).tolist() == bits.tolist()
    assert len(buffer) == packed.Layout.of("BF16", (2, 40), 2).packed_bytes(4)


def test_half_the_zeros_take_nine_sixteenths() -> None:
    bits = np.zeros((256, 512), np.uint16)
    bits[:, 1::2] = 0x3F80
    assert len(round_trip(bits, "BF16")[2]) == 32 + 2 * 8 + bits.nbytes * 9 // 16


def _clear(buffer: Any, column: int) -> None:
    """Move the mark of a column to one that there is not."""
    mask_at = 32 + 2 * 8
    buffer[mask_at + column // 8] &= ~(1 << column % 8) & 255
    buffer[mask_at + 2] |= 1 << 7  # of 21 columns


@pytest.mark.parametrize(
    ("what", "damage"),
    [
        ("a dtype of another size", lambda buffer: buffer.__setitem__(slice(8, 16), list(b"F64\0\0\0\0\0"))),
        ("a mark behind the last column", lambda buffer: _clear(buffer, 0)),
        ("no rows", lambda buffer: buffer.__setitem__(slice(32, 40), 0)),
        ("no columns", lambda buffer: buffer.__setitem__(slice(40, 48), 0)),
    ],
)
def test_a_prefix_that_does_not_fit_its_tensor_is_refused(what: str, damage: Any) -> None:
    buffer = round_trip(np.full((9, 21), 0x3F80, np.uint16), "BF16")[2].copy()
    packed.matrix_of(buffer, "w")
    damage(buffer)
    with pytest.raises(CheckpointError, match="w: its bitmask and values contradict each other"):
        packed.typed_matrix(torch.from_numpy(buffer), "w")


@pytest.mark.parametrize("length", [-1, -8, -40, 8])
def test_a_packed_tensor_of_another_length_is_refused(length: int) -> None:
    buffer = round_trip(random_bits((9, 21), 2, 0.5, 0), "BF16")[2]
    buffer = np.resize(buffer, len(buffer) + length)
    with pytest.raises(CheckpointError, match="contradict each other"):
        packed.matrix_of(buffer, "w")


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen3-moe", "gpt-oss"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pruned checkpoint and its compressed twin."""
    folder = tmp_path_factory.mktemp(request.param)
    made = fused() if request.param == "gpt-oss" else tiny.model(request.param, torch.bfloat16)
    dense = tiny.save(half_zero(made), folder / "dense")
    (dense / "llmprune.json").write_text('{"sites": []}\n')
    compress(dense, folder / "small")
    return dense, folder / "small"


def fused() -> Any:
    """A model whose file holds the experts of a layer as one tensor of three dimensions."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default"}}
    config = GptOssConfig(**(tiny.config("llama").to_dict() | sizes | {"model_type": "gpt_oss"}))
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16)


def half_zero(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name and "wte" not in name:
                parameter.masked_fill_(parameter.abs() < parameter.abs().float().median(), 0)
    return model


def same_models(found: Any, expected: Any) -> bool:
    left, right = found.state_dict(), expected.state_dict()
    return list(left) == list(right) and all(tiny.same_bytes(left[name], right[name]) for name in right)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_decompress_restores_every_byte(folders: tuple[Path, Path], tmp_path: Path) -> None:
    dense, small = folders
    decompress(small, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(dense)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_transformers_loads_it_bit_for_bit(folders: tuple[Path, Path]) -> None:
    dense, small = folders
    found = tiny.load(small)
    assert same_models(found, tiny.load(dense))
    assert not any(isinstance(module, SparseLinear) for module in found.modules())


def test_what_was_loaded_saves_as_the_dense_one(folders: tuple[Path, Path], tmp_path: Path) -> None:
    dense, small = folders
    tiny.save(tiny.load(small), tmp_path)
    found, expected = tiny.tensors(tmp_path), tiny.tensors(dense)
    assert found.keys() == expected.keys()
    assert all(tiny.same_bytes(found[name], expected[name]) for name in expected)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_another_dtype_is_cast_as_the_dense_one_is(folders: tuple[Path, Path]) -> None:
    dense, small = folders
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (small, dense)]
    assert same_models(*models)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    dense = tiny.save(half_zero(tiny.model("llama", torch.bfloat16)), tmp_path / "dense")
    compress(dense, tmp_path / "small")
    return tmp_path / "small"


def test_fused_experts_are_packed(folders: tuple[Path, Path]) -> None:
    dense, small = folders
    found = tiny.tensors(small)
    assert all(packed.is_packed(found[name]) for name, tensor in tiny.tensors(dense).items() if tensor.ndim == 3)


def test_only_what_shrinks_is_packed(small: Path) -> None:
    found = tiny.tensors(small)
    assert {name for name, tensor in found.items() if packed.is_packed(tensor)} == {
        name for name in found if "proj" in name or name == "lm_head.weight"
    }


def test_without_llmprune_transformers_does_not_load_nonsense(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "llmprune")
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        tiny.load(small)


def test_importing_llmprune_first_is_all_it_takes(small: Path) -> None:
    code = (
        "import llmprune; from transformers import AutoModelForCausalLM as M; "
        f"print(M.from_pretrained({str(small)!r}).model.layers[0].mlp.up_proj.weight.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([96, 64])" in done.stdout


def test_where_transformers_is_there_already_it_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    monkeypatch.setattr(register, "_tell_transformers", lambda: told.append(True))
    finders = list(sys.meta_path)
    register.register()
    assert told and sys.meta_path == finders


def test_importing_llmprune_imports_no_heavy_library() -> None:
    code = "import sys, llmprune; print({'torch', 'transformers', 'triton', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_an_unknown_runtime_is_refused(small: Path) -> None:
    with pytest.raises(RecipeError, match="unknown runtime 'spares': did you mean 'sparse'"):
        llmprune.SparseConfig("spares")


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def test_a_newer_format_is_refused(small: Path, tmp_path: Path) -> None:
    change_config(small, version=2)
    with pytest.raises(CheckpointError, match=r"format bitmask 2, this llmprune reads bitmask 1: upgrade"):
        decompress(small, tmp_path / "out")
    with pytest.raises(CheckpointError, match="upgrade"):
        tiny.load(small)


def overwrite(folder: Path, name: str, change: Any) -> None:
    """Change the bytes of one stored tensor in place."""
    from llmprune.checkpoint import Source

    entry = Source.open(folder).entries[name]
    data = np.fromfile(entry.file, np.uint8, entry.size, offset=entry.start)
    change(data)
    with entry.file.open("r+b") as file:
        file.seek(entry.start)
        file.write(data.tobytes())


SITE = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(("at", "value"), [(60, 0xFF), (16, 3), (24, 200), (32, 7)])
def test_a_damaged_tensor_is_named(small: Path, tmp_path: Path, at: int, value: int) -> None:
    overwrite(small, SITE, lambda data: data.__setitem__(at, value))
    with pytest.raises(CheckpointError, match=SITE):
        decompress(small, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*partial*"))
    with pytest.raises((RuntimeError, CheckpointError)):
        tiny.load(small)


def test_a_tensor_of_a_newer_layout_is_refused(small: Path, tmp_path: Path) -> None:
    overwrite(small, SITE, lambda data: data.__setitem__(7, 9))
    with pytest.raises(CheckpointError, match=f"{SITE} is packed in format 9"):
        decompress(small, tmp_path / "out")


def test_what_cannot_be_compressed_is_refused(small: Path, tmp_path: Path) -> None:
    dense, out = tmp_path / "dense", tmp_path / "out"
    with pytest.raises(CheckpointError, match="is compressed already"):
        compress(small, out)
    with pytest.raises(CheckpointError, match="no such folder"):
        compress(tmp_path / "missing", out)
    with pytest.raises(CheckpointError, match=r"exists: choose another folder"):
        compress(dense, small)
    with pytest.raises(CheckpointError, match="is not compressed by llmprune"):
        decompress(dense, out)
    (small / DENSE_CONFIG).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {DENSE_CONFIG}"):
        decompress(small, out)
    full = tiny.save(tiny.model("llama"), tmp_path / "full")
    with pytest.raises(CheckpointError, match="has no zeros that compression could leave out: prune it first"):
        compress(full, out)
    assert not out.exists() and not list(tmp_path.glob("*partial*"))


def test_overwrite_replaces_a_model(small: Path, tmp_path: Path) -> None:
    before = contents(small)
    compress(tmp_path / "dense", small, overwrite=True)
    assert contents(small) == before


def test_headers_of_other_writers_are_restored(tmp_path: Path) -> None:
    """Key order, metadata and the file's own spacing are those of the source, whoever wrote it."""
    dense = tiny.save(half_zero(tiny.model("llama", torch.bfloat16)), tmp_path / "dense", "1GB")
    tensors = tiny.tensors(dense)
    save_file(
        dict(reversed(tensors.items())), dense / "model.safetensors", metadata={"format": "pt", "note": "\u00e9 "}
    )
    compress(dense, tmp_path / "small")
    decompress(tmp_path / "small", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(dense)
    assert same_models(tiny.load(tmp_path / "small"), tiny.load(dense))
