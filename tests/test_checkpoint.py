"""Checkpoints as files: what is refused on opening, what a copy keeps, and that nothing is left behind on failure."""

import errno
import fcntl
import json
import math
import os
import shutil
import stat
import struct
import tempfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import tiny
from llmprune.checkpoint import Sink, Source
from llmprune.checkpoint.header import DTYPES, read_header
from llmprune.checkpoint.place import Place, require_place
from llmprune.checkpoint.sink import REPORT
from llmprune.checkpoint.source import INDEX, SINGLE
from llmprune.errors import CheckpointError

Shards = dict[str, dict[str, Tensor]]
Usage = namedtuple("Usage", "total used free")


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Any bits but those of NaN, and -0.0 among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0 if dtype in (torch.uint8, torch.bool) else -9, 10, shape, generator=generator)
    made = values.to(dtype)
    return torch.where(made == 0, torch.full_like(made, -0.0), made) if dtype.is_floating_point else made


def write_folder(folder: Path, shards: Shards) -> Path:
    """Write a checkpoint; of several shards an index tells which tensor is where."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "none"}')
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if list(shards) != [SINGLE]:
        write_index(folder, {key: name for name, tensors in shards.items() for key in tensors})
    return folder


def write_index(folder: Path, mapping: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": mapping}))


def two_shards(folder: Path) -> Path:
    first = {"b": random_tensor(torch.bfloat16, (3, 5)), "a": random_tensor(torch.float32, (4,))}
    return write_folder(folder, {"one.safetensors": first, "two.safetensors": {"c": torch.arange(6).view(2, 3)}})


def single(folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    return write_folder(folder, {SINGLE: tensors or {"w": random_tensor(torch.float16, (4, 8))}})


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_single_file_is_opened(tmp_path: Path) -> None:
    source = Source.open(single(tmp_path / "m"))
    assert list(source.entries) == ["w"]
    assert source.entries["w"].shape == (4, 8)
    assert source.entries["w"].torch_dtype == torch.float16


def test_shards_are_opened_by_their_index(tmp_path: Path) -> None:
    source = Source.open(two_shards(tmp_path / "m"))
    assert {name: entry.file.name for name, entry in source.entries.items()} == {
        "a": "one.safetensors",
        "b": "one.safetensors",
        "c": "two.safetensors",
    }


def test_shards_may_lie_in_a_folder_below(tmp_path: Path) -> None:
    folder = single(tmp_path / "m")
    (folder / "weights").mkdir()
    (folder / SINGLE).rename(folder / "weights" / "w.safetensors")
    write_index(folder, {"w": "weights/w.safetensors"})
    source, out = Source.open(folder), tmp_path / "out"
    with Sink(source, out) as sink:
        sink.copy_source()
        sink.commit({})
    assert tiny.same_bytes(next(Source.open(out).chunks("w")), next(source.chunks("w")))


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("gone.safetensors", "'gone.safetensors', which is missing"),
        ("/etc/one.safetensors", "outside the model's folder"),
        ("../one.safetensors", "outside the model's folder"),
    ],
)
def test_an_index_that_points_nowhere_good_is_refused(tmp_path: Path, target: str, says: str) -> None:
    folder = two_shards(tmp_path / "m")
    write_index(folder, {"a": "one.safetensors", "c": target})
    with pytest.raises(CheckpointError, match=says):
        Source.open(folder)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {"a": 1}}', "{nonsense"])
def test_a_malformed_index_is_refused(tmp_path: Path, index: str) -> None:
    folder = two_shards(tmp_path / "m")
    (folder / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=INDEX):
        Source.open(folder)


def cut(data: bytes) -> bytes:
    return data[:-1]


def header_longer_than_the_file(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data[8:]


def garbage_header(data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    return data[:8] + b"?" * length + data[8 + length :]


def header(value: Any) -> Callable[[bytes], bytes]:
    text = json.dumps(value).encode()
    whole: bytes = struct.pack("<Q", len(text)) + text + bytes(64)
    return lambda data: whole


def raw_header(text: str) -> Callable[[bytes], bytes]:
    whole = text.replace("W", json.dumps(entry("F32", [16], 0, 64))).encode()
    return lambda data: struct.pack("<Q", len(whole)) + whole + bytes(64)


def entry(dtype: Any, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DAMAGE = {
    "truncated": cut,
    "empty": lambda data: b"",
    "shorter than its length field": lambda data: data[:5],
    "header longer than the file": header_longer_than_the_file,
    "garbage header": garbage_header,
    "header that is a list": header([1]),
    "entry without offsets": header({"w": {"dtype": "F32", "shape": [4, 4]}}),
    "entry that is a number": header({"w": 3}),
    "header of a terabyte": lambda data: struct.pack("<Q", 1 << 40) + data[8:],
    "header nested too deeply": lambda data: struct.pack("<Q", 1 << 17) + b"[" * (1 << 17),
    "name that occurs twice": raw_header('{"w": W, "w": W}'),
    "bytes of no tensor": header({"w": {"dtype": "F32", "shape": [15], "data_offsets": [0, 60]}}),
    "gap": header({"v": entry("F32", [4], 0, 16), "w": entry("F32", [8], 32, 64)}),
    "overlap": header({"v": entry("F32", [12], 0, 48), "w": entry("F32", [8], 32, 64)}),
    "the same bytes twice": header({"v": entry("F32", [16], 0, 64), "w": entry("F32", [16], 0, 64)}),
    "offsets beyond the end": header({"w": entry("F32", [1 << 40], 0, 4 << 40)}),
    "negative offsets": header({"w": entry("F32", [16], -64, 0)}),
    "offsets in reverse": header({"w": entry("F32", [0], 64, 0)}),
    "offsets that are no whole numbers": header({"w": entry("F32", [16], 0.0, 64)}),
    "negative shape": header({"w": entry("F32", [-4, -4], 0, 64)}),
    "shape of words": header({"w": entry("F32", ["4"], 0, 64)}),
    "dtype that is no word": header({"w": entry(["F32"], [16], 0, 64)}),
    "name that does not print": header({"w\x1b[2J\n": entry("F32", [16], 0, 64)}),
    "size that contradicts the shape": header({"w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 60]}}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_shard_is_refused_by_name(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    folder = single(tmp_path / "m")
    (folder / SINGLE).write_bytes(damage((folder / SINGLE).read_bytes()))
    with pytest.raises(CheckpointError, match=SINGLE):
        Source.open(folder)


def test_an_index_that_contradicts_the_files_is_refused(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "m")
    write_index(folder, {"a": "one.safetensors", "c": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"places c in 'one\.safetensors', which lacks it"):
        Source.open(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "m")
    shutil.copy(folder / "one.safetensors", folder / "three.safetensors")
    write_index(folder, {"a": "one.safetensors", "b": "three.safetensors"})
    with pytest.raises(
        CheckpointError, match=r"is both in \S+one\.safetensors and in \S+three\.safetensors: remove one"
    ):
        Source.open(folder)


@pytest.mark.parametrize("name", ["weights.bin", "weights.pt", "weights"])
def test_an_index_that_names_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    folder = single(tmp_path / "m")
    (folder / SINGLE).rename(folder / name)
    write_index(folder, {"w": name})
    with pytest.raises(CheckpointError, match="llmprune loads no other"):
        Source.open(folder)


@pytest.mark.parametrize("name", ["config.json", SINGLE, "tokenizer.json", "README.md"])
@pytest.mark.parametrize("linked", ["file", "folder"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str, linked: str) -> None:
    folder, outside = single(tmp_path / "m"), tmp_path / "outside"
    (folder / name).touch()
    outside.mkdir()
    (folder / name).rename(outside / name)
    if linked == "folder":
        (folder / "way").symlink_to(outside)
        (folder / name).symlink_to(f"way/{name}")
    else:
        (folder / name).symlink_to(outside / name)
    with pytest.raises(CheckpointError, match=f"{name} is a link out of the model's folder"):
        Source.open(folder)


def test_a_folder_of_shards_that_is_a_link_out_is_refused(tmp_path: Path) -> None:
    folder, outside = single(tmp_path / "m"), tmp_path / "outside"
    outside.mkdir()
    (folder / SINGLE).rename(outside / "w.safetensors")
    (folder / "weights").symlink_to(outside)
    write_index(folder, {"w": "weights/w.safetensors"})
    with pytest.raises(CheckpointError, match="is a link out of the model's folder"):
        Source.open(folder)


def test_links_within_the_folder_and_to_it_are_followed(tmp_path: Path) -> None:
    folder = single(tmp_path / "m")
    (folder / SINGLE).rename(folder / "real.safetensors")
    (folder / SINGLE).symlink_to("real.safetensors")
    (tmp_path / "link").symlink_to(folder)
    with Sink(Source.open(tmp_path / "link"), tmp_path / "out") as sink:
        sink.copy_source()
        sink.commit({})
    assert not (tmp_path / "out" / SINGLE).is_symlink()
    assert (tmp_path / "out" / SINGLE).read_bytes() == (folder / SINGLE).read_bytes()


def test_a_snapshot_of_the_hubs_cache_is_a_folder_of_links(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = single(repository / "snapshots" / "0123abcd")
    (repository / "blobs").mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(repository / "blobs" / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    with Sink(Source.open(snapshot), tmp_path / "out") as sink:
        sink.copy_source()
        sink.commit({})
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    (tmp_path / "elsewhere").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../../elsewhere")
    with pytest.raises(CheckpointError, match="is a link out"):
        Source.open(snapshot)


@pytest.mark.parametrize(("name", "size"), [("tokenizer.json", 1 << 30), ("config.json", 64 << 20), (INDEX, 64 << 20)])
def test_a_file_that_is_larger_than_any_honest_one_is_refused(tmp_path: Path, name: str, size: int) -> None:
    folder = two_shards(tmp_path / "m")
    (folder / name).touch()
    os.truncate(folder / name, size)  # takes no space on the disk
    with pytest.raises(CheckpointError, match=rf"{name} has \d\.\d\d GB"):
        Source.open(folder)


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    (single(tmp_path / "m") / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Source.open(tmp_path / "m")


def test_a_config_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (single(tmp_path / "m") / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Source.open(tmp_path / "m")


def test_pickled_weights_are_refused_with_the_command_that_converts_them(tmp_path: Path) -> None:
    folder = single(tmp_path / "m")
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*python -c .*save_pretrained"):
        Source.open(folder)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (single(tmp_path / "m") / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        Source.open(tmp_path / "m")


def test_a_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("")
    with pytest.raises(CheckpointError, match="is a file, not a model folder"):
        Source.open(tmp_path / "m")


def test_an_fp8_tensor_is_refused_by_name(tmp_path: Path) -> None:
    source = Source.open(single(tmp_path / "m", {"w8": torch.zeros(4, 4).to(torch.float8_e4m3fn)}))
    with pytest.raises(CheckpointError, match="w8 is stored as F8_E4M3"):
        _ = source.entries["w8"].torch_dtype


def test_chunks_put_together_are_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.checkpoint.source._CHECK_ELEMENTS", 10)
    tensors = {"w": random_tensor(torch.bfloat16, (7, 4)), "scalar": torch.tensor(2.0)}
    source = Source.open(single(tmp_path / "m", tensors))
    chunks = list(source.chunks("w"))
    assert len(chunks) > 1
    assert tiny.same_bytes(torch.cat(chunks), tensors["w"])
    assert torch.equal(next(source.chunks("scalar")), tensors["scalar"])


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
kinds = st.tuples(st.sampled_from(sorted(DTYPES)), shapes)


@settings(max_examples=40, deadline=None)
@given(kinds=st.lists(kinds, min_size=1, max_size=6))
def test_header_offsets_are_where_safetensors_reads(kinds: list[tuple[str, tuple[int, ...]]]) -> None:
    tensors = {f"t{i}": random_tensor(DTYPES[dtype], shape, i) for i, (dtype, shape) in enumerate(kinds)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SINGLE
        save_file(tensors, path)
        data, entries = path.read_bytes(), read_header(path)
    assert {entry.name for entry in entries} == set(tensors)
    for entry in entries:
        tensor = tensors[entry.name]
        assert (entry.shape, entry.torch_dtype) == (tuple(tensor.shape), tensor.dtype)
        assert entry.count == tensor.numel() == math.prod(entry.shape)
        assert data[entry.start : entry.start + entry.size] == tensor.flatten().view(torch.uint8).numpy().tobytes()


@settings(max_examples=25, deadline=None)
@given(kinds=st.lists(kinds, min_size=2, max_size=6), split=st.integers(1, 5), written=st.sets(st.integers(0, 5)))
def test_written_tensors_are_exact_and_all_others_untouched(
    kinds: list[tuple[str, tuple[int, ...]]], split: int, written: set[int]
) -> None:
    tensors = [random_tensor(DTYPES[dtype], shape, i) for i, (dtype, shape) in enumerate(kinds)]
    shards: Shards = {}
    for index, tensor in enumerate(tensors):
        shards.setdefault(f"s{min(index // split, 2)}.safetensors", {})[f"t{index}"] = tensor
    new = {f"t{i}": random_tensor(tensors[i].dtype, tuple(tensors[i].shape), 99) for i in written if i < len(tensors)}
    with tempfile.TemporaryDirectory() as place:
        folder, out = write_folder(Path(place) / "m", shards), Path(place) / "out"
        with Sink(Source.open(folder), out) as sink:
            sink.copy_source()
            for name, tensor in new.items():
                sink.write(name, tensor)
            sink.commit({"done": True})
        found = tiny.tensors(out)
        assert found.keys() == {f"t{i}" for i in range(len(tensors))}
        for index, tensor in enumerate(tensors):
            assert tiny.same_bytes(found[f"t{index}"], new.get(f"t{index}", tensor))
        assert everything(out) == everything(folder) | {REPORT}
        if not new:
            assert files_of(out) | {REPORT: b""} == files_of(folder) | {REPORT: b""}


def test_a_copy_keeps_shards_key_order_metadata_and_index(tmp_path: Path) -> None:
    folder, out = two_shards(tmp_path / "m"), tmp_path / "out"
    with Sink(Source.open(folder), out) as sink:
        sink.copy_source()
        sink.write("b", torch.ones(3, 5))
        sink.commit({})
    assert (out / INDEX).read_bytes() == (folder / INDEX).read_bytes()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as before, safe_open(out / path.name, "pt") as after:
            assert list(before.keys()) == list(after.keys())
            assert before.metadata() == after.metadata() == {"format": "pt"}
        assert [entry.start for entry in read_header(path)] == [entry.start for entry in read_header(out / path.name)]


def test_values_are_cast_to_the_stored_dtype(tmp_path: Path) -> None:
    with Sink(Source.open(two_shards(tmp_path / "m")), tmp_path / "out") as sink:
        sink.copy_source()
        sink.write("b", torch.full((3, 5), 1 / 3))
        sink.commit({})
    assert tiny.same_bytes(tiny.tensors(tmp_path / "out")["b"], torch.full((3, 5), 1 / 3, dtype=torch.bfloat16))


def test_what_belongs_to_a_model_is_copied_and_other_weights_are_not(tmp_path: Path) -> None:
    folder, out = single(tmp_path / "m"), tmp_path / "out"
    for name in ("tokenizer.json", "README.md", "LICENSE.txt", "modeling_x.py", "pytorch_model.bin", "model.gguf"):
        (folder / name).write_text(name)
    with Sink(Source.open(folder), out) as sink:
        sink.copy_source()
        sink.commit({"zeros": 3})
    assert everything(out) == everything(folder) - {"pytorch_model.bin", "model.gguf"} | {REPORT}
    copied = ["LICENSE.txt", "README.md", "config.json", "modeling_x.py", "tokenizer.json"]
    assert json.loads((out / REPORT).read_text()) == {"zeros": 3, "companions": copied}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    source = Source.open(two_shards(tmp_path / "m"))
    before = everything(tmp_path)
    with pytest.raises(error), Sink(source, tmp_path / "out") as sink:
        sink.copy_source()
        sink.write("b", torch.ones(3, 5))
        raise error
    assert everything(tmp_path) == before


def test_leaving_without_a_commit_leaves_nothing(tmp_path: Path) -> None:
    source = Source.open(two_shards(tmp_path / "m"))
    with Sink(source, tmp_path / "out") as sink:
        sink.copy_source()
        assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_an_unfinished_folder_of_ours_is_discarded(tmp_path: Path) -> None:
    source = Source.open(two_shards(tmp_path / "m"))
    partial = Sink(source, tmp_path / "out").__enter__()  # a run that was killed
    partial.copy_source()
    partial._journal.close()  # as the system does for a dead process
    (tmp_path / "out.partial" / "model" / "rubbish.bin").touch()
    with Sink(source, tmp_path / "out") as sink:
        sink.copy_source()
        sink.commit({})
    assert everything(tmp_path / "out") == everything(tmp_path / "m") | {REPORT}
    assert not (tmp_path / "out.partial").exists()


def test_a_second_run_at_the_same_output_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    source = Source.open(two_shards(tmp_path / "m"))
    with Sink(source, tmp_path / "out") as first:
        first.copy_source()
        with (
            pytest.raises(CheckpointError, match=r"another run \(process \d+ on .*\) is writing"),
            Sink(source, tmp_path / "out"),
        ):
            pass
        first.commit({})
    assert everything(tmp_path / "out") == everything(tmp_path / "m") | {REPORT}


def test_an_old_output_that_a_crash_left_aside_goes_back_before_anything_is_discarded(tmp_path: Path) -> None:
    source, out = Source.open(two_shards(tmp_path / "m")), tmp_path / "out"
    place = Place.of(out)
    place.claim().close()
    before = files_of(single(place.replaced))
    with pytest.raises(ZeroDivisionError), Sink(source, out):
        raise ZeroDivisionError
    assert files_of(out) == before
    assert not place.partial.exists()


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    source = Source.open(two_shards(tmp_path / "m"))
    with pytest.raises(CheckpointError, match="has appeared meanwhile"), Sink(source, tmp_path / "out") as sink:
        sink.copy_source()
        (tmp_path / "out").mkdir()
        sink.commit({})
    assert not any((tmp_path / "out").iterdir())


def test_a_folder_that_is_called_replaced_is_left_alone(tmp_path: Path) -> None:
    source = Source.open(two_shards(tmp_path / "m"))
    (tmp_path / "out.replaced").mkdir()
    for _ in range(2):
        with Sink(source, tmp_path / "out") as sink:
            sink.copy_source()
            sink.commit({})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out", "out.replaced"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_something_foreign_in_the_way_is_refused_and_kept(tmp_path: Path, kind: str) -> None:
    source, foreign = Source.open(two_shards(tmp_path / "m")), tmp_path / "out.partial"
    if kind == "folder":
        foreign.mkdir()
        (foreign / "thesis.txt").touch()
    else:
        foreign.touch()
    with pytest.raises(CheckpointError, match="in the way"), Sink(source, tmp_path / "out"):
        raise AssertionError("unreachable")
    assert foreign.exists()


def test_an_existing_output_is_refused_without_overwrite(tmp_path: Path) -> None:
    source, out = Source.open(two_shards(tmp_path / "m")), single(tmp_path / "out")
    with pytest.raises(CheckpointError, match="--overwrite"):
        require_place(source, out, overwrite=False)


def test_overwrite_replaces_a_model_folder_as_a_whole(tmp_path: Path) -> None:
    source, out = Source.open(two_shards(tmp_path / "m")), single(tmp_path / "out")
    (out / "old.txt").touch()
    require_place(source, out, overwrite=True)
    with Sink(source, out) as sink:
        sink.copy_source()
        assert (out / "old.txt").exists()  # until the very end
        sink.commit({})
    assert everything(out) == everything(tmp_path / "m") | {REPORT}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"]


def test_the_working_folder_itself_can_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = Source.open(two_shards(tmp_path / "m")), single(tmp_path / "out")
    monkeypatch.chdir(out)
    require_place(source, Path("."), overwrite=True)
    with Sink(source, Path(".")) as sink:
        sink.copy_source()
        sink.commit({})
    assert everything(out) == everything(tmp_path / "m") | {REPORT}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_overwrite_does_not_replace_what_is_not_a_model(tmp_path: Path, kind: str) -> None:
    source, out = Source.open(two_shards(tmp_path / "m")), tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "thesis.txt").touch()
    else:
        out.touch()
    with pytest.raises(CheckpointError, match="not a model folder"):
        require_place(source, out, overwrite=True)


def test_an_empty_folder_can_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    require_place(Source.open(two_shards(tmp_path / "m")), tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("out", ["m", "m/out", ".", "m/../m", "link"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_source_and_output_must_not_lie_inside_each_other(tmp_path: Path, out: str, overwrite: bool) -> None:
    source = Source.open(two_shards(tmp_path / "m"))
    (tmp_path / "link").symlink_to(tmp_path / "m")
    with pytest.raises(CheckpointError, match="inside each other"):
        require_place(source, tmp_path / out, overwrite)


def test_too_little_disk_is_refused_with_both_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source.open(two_shards(tmp_path / "m"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, source.output_bytes() - 1))
    with pytest.raises(CheckpointError, match=r"too little disk .*needs .* GB, .* GB are free"):
        require_place(source, tmp_path / "deep" / "out", overwrite=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, source.output_bytes()))
    require_place(source, tmp_path / "deep" / "out", overwrite=False)


def test_a_shard_that_vanishes_while_it_is_copied_is_a_checkpoint_error(tmp_path: Path) -> None:
    source = Source.open(two_shards(tmp_path / "m"))
    source.shards[1].unlink()
    with (
        pytest.raises(CheckpointError, match=r"cannot copy .*two\.safetensors"),
        Sink(source, tmp_path / "out") as sink,
    ):
        sink.copy_source()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_a_file_system_without_locks_and_without_synchronized_folders_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = os.fsync

    def no_locks(*arguments: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        plain(descriptor)

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(os, "fsync", files_only)
    source = Source.open(two_shards(tmp_path / "m"))
    with Sink(source, tmp_path / "out") as sink:
        sink.copy_source()
        sink.commit({})
    assert (tmp_path / "out" / "config.json").exists()
    assert "out.partial has no locks" in caplog.text
