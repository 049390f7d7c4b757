"""A dozen architectures, each odd in another way, through the whole program; `scripts/architectures.py` runs them all."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import zoo
from llmprune.model import streamed_logits
from zoo.check import Row, check, token_ids
from zoo.isolated import run

ROOT = Path(__file__).parent.parent

FAMILIES = {
    "deepseek_v3": "experts that are fused on load, and a bias that stays in fp32 in models of other dtypes",
    "dbrx": "experts in a matrix of two dimensions",
    "gemma3": "the text part of a multimodal model, with sliding and full attention",
    "gemma3n_text": "inputs that are exactly zero, keys shared between layers, inputs for each layer",
    "gpt_oss": "transposed experts with biases",
    "llama4": "a multimodal checkpoint whose names are not those of the text model",
    "mamba": "a linear layer whose weight is used without a call of its module",
    "marian": "a decoder whose cross-attention is never fed",
    "mllama": "blocks that text alone does not visit",
    "openai-gpt": "Conv1D layers, and blocks that return a tuple",
    "qwen3_next": "linear attention and full attention, with experts",
    "zamba2": "blocks that share their weights",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_architecture_is_pruned_exactly(name: str, tmp_path: Path) -> None:
    row = check(name, tmp_path)
    require_pass(row)
    assert row.streams
    assert row.sites


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["deepseek_v3", "zamba2"])
def test_a_checkpoint_in_half_precision_is_pruned_exactly(name: str, dtype: str, tmp_path: Path) -> None:
    require_pass(check(name, tmp_path, dtype))


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("hrm_text", "HrmTextForCausalLM runs its blocks model.L_module.layers several times"),
        ("xlm", "XLMWithLMHeadModel splits its layers into transformer.ffns and transformer.attentions"),
    ],
)
def test_an_architecture_that_cannot_be_streamed_is_refused_by_name(name: str, cause: str, tmp_path: Path) -> None:
    row = check(name, tmp_path)
    assert row.verdict == "refused"
    assert row.detail.startswith(cause)
    assert not (tmp_path / "wanda").exists()


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guard of the tests above: a streamed forward that is wrong in the last bit is found wrong."""
    nudged = lambda folder, ids: torch.nextafter(streamed_logits(folder, ids), torch.tensor(torch.inf))  # noqa: E731
    monkeypatch.setattr("zoo.check.streamed_logits", nudged)
    row = check("llama", tmp_path)
    assert (row.verdict, row.streams) == ("wrong", False)


def test_every_tiny_model_differs_in_what_matters() -> None:
    """Sliding windows are shorter than the sequences, and every kind of layer that a model has is there."""
    config = zoo.config("gemma3_text")
    assert config.sliding_window < token_ids().shape[1]
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}


def test_the_table_names_every_verdict(tmp_path: Path) -> None:
    script, file = load_script(), tmp_path / "rows.jsonl"
    rows = [
        Row("gpt2", "fp32", verdict="refused"),
        Row("gpt2", "fp32", verdict="pass", streams=True, sites={"Conv1D": 16}, covered_blocks=0.983, covered=0.875),
        Row("gpt2", "bf16", detail="the process died"),
        Row("llama", "fp32", verdict="refused", detail="because <unk>"),
        Row("musicgen", "fp32", verdict="not built", detail="no dropout"),
    ]
    file.write_text("".join(json.dumps(vars(row)) + "\n" for row in rows))
    page = script.page(script.read_rows(file))
    assert "Of 3 entries 2 can be built. fp32: 1 pass, 1 refused; bf16: 1 wrong." in page
    assert "| gpt2 | yes | yes | WRONG |  | 16 |  | 98.3% | 87.5% |  |" in page
    assert r"| llama | because \<unk\> |" in page
    assert "| musicgen | no dropout |" in page


def test_a_process_that_dies_ends_no_other() -> None:
    jobs = [("dies", "fp32"), ("lives", "fp32")]
    rows = run(jobs, at_once=2, work=die_or_live)
    assert {(row.name, row.dtype): row.detail for row in rows} == dict(zip(jobs, ["the process died", ""], strict=True))


def require_pass(row: Row) -> None:
    if row.verdict == "not built" and not transformers.__version__.startswith(zoo.WRITTEN_FOR):
        pytest.skip(row.detail)
    assert (row.verdict, row.detail) == ("pass", "")


def die_or_live(name: str, folder: Path, dtype: str) -> Row:
    return os._exit(9) if name == "dies" else Row(name, dtype)


def load_script() -> Any:
    spec: Any = importlib.util.spec_from_file_location("architectures", ROOT / "scripts/architectures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
