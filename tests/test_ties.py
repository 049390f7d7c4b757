"""Parameters that are one tensor: whatever names a checkpoint stores them under, as plain transformers reads it."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import llmprune
import tiny
import zoo
from llmprune.checkpoint import Source
from llmprune.model import Streamed, streamed_logits
from llmprune.model.ties import Ties, untied

CPU = torch.device("cpu")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHARED = "shared_transf.self_attn.q_proj.weight"


needs_zamba = pytest.mark.skipif(
    not transformers.__version__.startswith(zoo.WRITTEN_FOR), reason="this transformers builds no such tiny Zamba"
)


def tied_llama(folder: Path, stored: str) -> Path:
    """Save a model whose configuration ties its head to its embedding, as older tools have stored such models."""
    tiny.save(tiny.model("llama-tied"), folder)
    embedding = tiny.tensors(folder)[EMBEDDING]
    changes: dict[str, dict[str, Tensor | None]] = {
        "embedding": {},
        "both": {HEAD: embedding.clone()},
        "both, different": {HEAD: embedding.flip(0).contiguous()},
        "head": {HEAD: embedding, EMBEDDING: None},
    }
    return tiny.rewrite(folder, **changes[stored])


@pytest.mark.parametrize("stored", ["embedding", "both", "both, different", "head"])
def test_a_tied_head_is_what_transformers_makes_of_it(stored: str, tmp_path: Path) -> None:
    folder, ids = tied_llama(tmp_path / "m", stored), tiny.ids(2)
    assert torch.equal(streamed_logits(folder, ids), tiny.logits(tiny.load(folder), ids))


@pytest.mark.parametrize("stored", ["embedding", "both", "both, different", "head"])
def test_a_tied_head_that_is_pruned_is_so_under_every_name(stored: str, tmp_path: Path) -> None:
    source, out, ids = tied_llama(tmp_path / "m", stored), tmp_path / "out", tiny.ids(2)
    report = llmprune.prune(source, out, method="magnitude", include=["*embed_tokens*", "lm_head*"])
    before, after = tiny.tensors(source), tiny.tensors(out)
    for name in {EMBEDDING, HEAD} & before.keys():
        assert int((after[name] == 0).sum()) == after[name].numel() // 2
        assert torch.equal(after[name], before[name].where(after[name] != 0, 0))
    assert (HEAD in report.left_dense) == (stored != "both, different")
    assert torch.equal(streamed_logits(out, ids), tiny.logits(tiny.load(out), ids))
    assert llmprune.inspect(out).verified


@needs_zamba
def test_blocks_that_share_weights_share_them_in_memory_until_the_last(tmp_path: Path) -> None:
    host = Streamed(Source.open(tiny.save(zoo.model("zamba"), tmp_path / "m", "20KB")), CPU)
    host.open(CPU)
    first, last = host.blocks[2], host.blocks[5]
    host.load(first)
    host.free(first)
    kept = first.module.get_parameter(SHARED)
    assert not kept.is_meta
    assert first.module.get_parameter("mamba_decoder.mamba.out_proj.weight").is_meta
    host.load(last)
    assert last.module.get_parameter(SHARED) is kept


@needs_zamba
def test_weights_that_blocks_share_are_pruned_once_and_the_report_tells(tmp_path: Path) -> None:
    source = tiny.save(zoo.model("zamba"), tmp_path / "m", "20KB")
    report = llmprune.prune(source, tmp_path / "out", method="wanda", calibration=tiny.ids())
    first, last = (f"model.layers.{index}.{SHARED}" for index in (2, 5))
    assert [site.name for site in report.sites if site.name.endswith(SHARED)] == [first]
    assert report.left_dense[last] == f"one with {first}"


def test_ties_know_every_name_of_a_tensor() -> None:
    ties = Ties({"b": "a", "c": "a"}, stored=["b", "d"])
    assert {name: ties.names(name) for name in "abcd"} == dict.fromkeys("abc", ("a", "b", "c")) | {"d": ("d",)}
    assert {name: ties.stored_name(name) for name in "abcde"} == {"a": "b", "b": "b", "c": "b", "d": "d", "e": "e"}
    assert [name for name in "abcd" if ties.is_lent(name)] == ["a", "b", "c"]
    assert not Ties({"b": "a"}, stored=["a", "b"]).is_lent("a")


def test_only_what_is_stored_twice_with_different_contents_is_untied() -> None:
    tied = {"b": "a", "d": "c", "f": "e"}
    assert untied(tied, ["a", "b", "c", "d", "e"], same=lambda target, source: target == "b") == ["d"]
