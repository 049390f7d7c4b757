"""Compressed checkpoints read as dense ones, and written by `prune` itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import llmprune
import tiny
from llmprune.checkpoint import Source, compressed
from llmprune.checkpoint.compressed import compress, decompress
from llmprune.checkpoint.unpacked import Unpacked, open_dense
from llmprune.cli import cli
from llmprune.errors import CheckpointError, LlmpruneError, RecipeError
from llmprune.page.weights import histograms

SITE = "model.layers.1.mlp.up_proj.weight"
PRUNE: dict[str, Any] = {"method": "magnitude", "pattern": "2:4"}


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen3-moe", "gpt-oss"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pruned checkpoint and its compressed twin."""
    folder = tmp_path_factory.mktemp(request.param)
    base = tiny.save(tiny.model(request.param, torch.bfloat16), folder / "base")
    llmprune.prune(base, folder / "dense", **PRUNE)
    compress(folder / "dense", folder / "small")
    return folder / "dense", folder / "small"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    base = tiny.save(tiny.model("llama", torch.bfloat16), tmp_path / "base")
    llmprune.prune(base, tmp_path / "small", compressed=True, **PRUNE)
    return tmp_path / "small"


def test_every_tensor_reads_as_in_the_dense_twin(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.checkpoint.source._CHECK_ELEMENTS", 1000)  # several chunks a tensor
    dense, small = map(open_dense, folders)
    assert isinstance(small, Unpacked) and not isinstance(dense, Unpacked) and small.packed
    assert small.config == dense.config
    names = list(dense.entries)
    with dense.slices(names) as expected, small.slices(names) as found:
        for name in names:
            assert found[name].get_dtype() == expected[name].get_dtype()
            assert list(found[name].get_shape()) == list(expected[name].get_shape())
            assert tiny.same_bytes(found[name][...], expected[name][...])
    for name in names:
        for multiple in (1, 4):
            pairs = zip(small.chunks(name, multiple), dense.chunks(name, multiple), strict=True)
            assert all(tiny.same_bytes(a, b) for a, b in pairs)


def test_inspection_is_that_of_the_dense_twin(folders: tuple[Path, Path]) -> None:
    dense, small = (llmprune.inspect(folder).to_json() for folder in folders)
    assert small["verified"] is True
    assert {**small, "model": ""} == {**dense, "model": ""}


@pytest.mark.parametrize("streamed", [True, False])
def test_perplexity_is_that_of_the_dense_twin(folders: tuple[Path, Path], streamed: bool, tmp_path: Path) -> None:
    data = tmp_path / "ids.jsonl"
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in tiny.ids().tolist()))
    found = llmprune.evaluate(folders[1], data, dense=folders[0], length=24, streamed=streamed)
    assert found.perplexity == found.dense_perplexity and found.kl_divergence == 0
    assert found.streamed is streamed


def test_the_report_reads_the_weights(folders: tuple[Path, Path]) -> None:
    run = json.loads((folders[0] / "llmprune.json").read_text())
    assert histograms(folders[1], run) == histograms(folders[0], run)


def overwrite(folder: Path, name: str, change: Any) -> None:
    """Change the bytes of one stored tensor in place."""
    entry = Source.open(folder).entries[name]
    data = np.fromfile(entry.file, np.uint8, entry.size, offset=entry.start)
    change(data)
    with entry.file.open("r+b") as file:
        file.seek(entry.start)
        file.write(data.tobytes())


def test_zeros_stored_as_values_are_a_fault(small: Path) -> None:
    overwrite(small, SITE, lambda data: data.__setitem__(slice(-16, None), 0))
    found = llmprune.inspect(small)
    assert found.verified is False and f"{SITE}: stores 8 zeros as values, compress it again" in found.faults
    (small / "llmprune.json").unlink()
    assert llmprune.inspect(small).verified is False
    assert CliRunner().invoke(cli, ["inspect", str(small)]).exit_code == 1


@pytest.mark.parametrize(("at", "value"), [(60, 0xFF), (16, 3), (32, 7), (8, 70)])
def test_a_damaged_tensor_is_named(small: Path, at: int, value: int) -> None:
    overwrite(small, SITE, lambda data: data.__setitem__(at, value))
    with pytest.raises(CheckpointError, match=SITE):
        llmprune.inspect(small)


def test_broken_promises_show(small: Path) -> None:
    path = small / "llmprune.json"
    report = json.loads(path.read_text())
    report["sites"][0]["zeros"] += 1
    path.write_text(json.dumps(report))
    assert "were promised" in llmprune.inspect(small).faults[0]


def test_what_prunes_refuses_a_compressed_source(small: Path, tmp_path: Path) -> None:
    for refused in (
        lambda: llmprune.prune(small, tmp_path / "out", **PRUNE),
        lambda: llmprune.plan(small, **PRUNE),
        lambda: llmprune.sweep(small, tmp_path / "out", methods=["magnitude"], patterns=["50%"], data="demo"),
    ):
        with pytest.raises(CheckpointError, match=f"restore it with llmprune decompress {small} OUT"):
            refused()
    assert not (tmp_path / "out").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "llmprune.json"}


def test_prune_compressed_writes_what_compress_makes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    dense, small = folders
    llmprune.prune(dense.parent / "base", tmp_path / "out", compressed=True, **PRUNE)
    assert contents(tmp_path / "out") == contents(small)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    decompress(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(dense)


@pytest.mark.parametrize("shard", [0, 1])
def test_a_run_stopped_while_it_compresses_is_resumed(
    small: Path, shard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Path] = []
    real = compressed._compress_shard

    def stopping(*arguments: Any) -> None:
        if len(done) == shard:
            raise KeyboardInterrupt
        done.append(arguments[0])
        real(*arguments)

    base, out = tmp_path / "base", tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(compressed, "_compress_shard", stopping)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            llmprune.prune(base, out, compressed=True, **PRUNE)
    assert not out.exists()
    with pytest.raises(CheckpointError, match="was begun with another compressed"):
        llmprune.prune(base, out, resume=True, **PRUNE)
    llmprune.prune(base, out, resume=True, compressed=True, **PRUNE)
    assert contents(out) == contents(small)
    assert not out.with_name("out.partial").exists()


def test_a_run_stopped_between_blocks_is_resumed(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmprune.storing import OnDisk

    kept: list[str] = []
    real = OnDisk.keep

    def stopping(self: OnDisk, stage: Any, sites: Any) -> None:
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept.append(stage.name)
        real(self, stage, sites)

    with monkeypatch.context() as patch:
        patch.setattr(OnDisk, "keep", stopping)
        with pytest.raises(KeyboardInterrupt):
            llmprune.prune(tmp_path / "base", tmp_path / "out", compressed=True, **PRUNE)
    llmprune.prune(tmp_path / "base", tmp_path / "out", resume=True, compressed=True, **PRUNE)
    assert contents(tmp_path / "out") == contents(small)


def test_what_cannot_be_compressed_is_refused_before_any_work(small: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"5% leaves too few zeros .* 6\.2%: leave out --compressed"):
        llmprune.prune(tmp_path / "base", tmp_path / "out", method="magnitude", pattern="5%", compressed=True)
    with pytest.raises(RecipeError, match="pruned in place"):
        llmprune.prune(tiny.model("llama"), compressed=True, **PRUNE)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_the_command_takes_the_option(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(cli, ["prune", "demo", str(out), "--method", "magnitude", "--compressed"])
    assert done.exit_code == 0, done.output
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "llmprune"
    assert llmprune.inspect(out).verified
    found = llmprune.evaluate(out, "demo", windows=1, sparse=True)
    assert found.sparse_layers >= 0 and found.perplexity > 1
    with pytest.raises(LlmpruneError, match="leave out --streamed or --sparse"):
        llmprune.evaluate(out, "demo", streamed=True, sparse=True)
    with pytest.raises(LlmpruneError, match=r"call llmprune\.sparsify\(model\) first"):
        llmprune.evaluate(tiny.model("llama"), "demo", sparse=True)
