"""Several models in one table, the distance to the dense one, and evaluation with one block in memory."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import llmprune
import tiny
from llmprune import runs
from llmprune.errors import CheckpointError, DataError, Interrupted, RecipeError
from llmprune.locate import demo_folder
from llmprune_eval import comparison, perplexity, subjects
from llmprune_eval.scores import score

FAMILIES = ("llama", "qwen3", "gpt2", "opt", "gemma2", "qwen3-moe", "llama-tied")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {family: tiny.save(tiny.model(family), place / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def pruned(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    llmprune.prune(folders["llama"], out, method="magnitude", pattern="2:4")
    return out


def slow_scores(dense: PreTrainedModel, model: PreTrainedModel, windows: Tensor) -> tuple[float, float]:
    """KL divergence and top-1 agreement from their definitions, in fp64, token by token."""
    divergence, agreements, count = 0.0, 0, 0
    for window in windows:
        p_LV = tiny.logits(dense, window[None])[0, :-1].double().softmax(-1)
        q_LV = tiny.logits(model, window[None])[0, :-1].double().softmax(-1)
        for p, q in zip(p_LV, q_LV, strict=True):
            divergence += sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True) if a > 0)
            agreements += int(p.argmax() == q.argmax())
            count += 1
    return divergence / count, agreements / count


def test_the_distance_to_the_dense_model_is_that_of_the_definitions(folders: dict[str, Path], pruned: Path) -> None:
    windows = tiny.ids(3, 12)
    found = llmprune.evaluate(pruned, windows, dense=folders["llama"])
    divergence, agreement = slow_scores(tiny.load(folders["llama"]), tiny.load(pruned), windows)
    assert found.kl_divergence == pytest.approx(divergence, rel=1e-5)
    assert found.top1_agreement == pytest.approx(agreement, abs=1e-9) and 0 < agreement < 1
    assert found.dense_perplexity == llmprune.evaluate(folders["llama"], windows).perplexity
    assert found.perplexity == llmprune.evaluate(pruned, windows).perplexity
    assert f"KL divergence {divergence:.4f}" in str(found)


def test_a_model_is_at_no_distance_from_itself(folders: dict[str, Path]) -> None:
    found = llmprune.evaluate(folders["llama"], tiny.ids(), dense=folders["llama"])
    assert (found.kl_divergence, found.top1_agreement) == (0.0, 1.0)


@given(st.integers(1, 4), st.integers(2, 6), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_divergence_is_never_negative(windows: int, length: int, vocabulary: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (windows, length), generator=generator)
    p, q = (torch.randn(windows, length, vocabulary, generator=generator) * 3 for _ in range(2))
    found = score([ids], iter_of(p), iter_of(q))
    assert found.kl_divergence is not None and found.kl_divergence >= -1e-6
    assert found.top1_agreement is not None and 0 <= found.top1_agreement <= 1


def iter_of(*batches: Tensor) -> Any:
    yield from batches


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_evaluation_is_that_in_memory_bit_for_bit(folders: dict[str, Path], family: str, dtype: str) -> None:
    data = [row.tolist() for row in tiny.ids(5, 40)] + [[3, 4, 5]]
    both = [llmprune.evaluate(folders[family], data, dtype=dtype, streamed=way, batch_size=2) for way in (True, False)]
    assert both[0].perplexity == both[1].perplexity
    assert [found.streamed for found in both] == [True, False]


def test_a_streamed_distance_is_that_in_memory_bit_for_bit(folders: dict[str, Path], pruned: Path) -> None:
    both = [llmprune.evaluate(pruned, tiny.ids(), dense=folders["llama"], streamed=way) for way in (True, False)]
    names = ("perplexity", "dense_perplexity", "kl_divergence", "top1_agreement")
    assert [getattr(both[0], name) for name in names] == [getattr(both[1], name) for name in names]


def test_a_model_larger_than_the_free_memory_is_streamed(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not llmprune.evaluate(folders["llama"], tiny.ids()).streamed
    monkeypatch.setattr(subjects, "_MEMORY_SHARE", 0.0)
    assert llmprune.evaluate(folders["llama"], tiny.ids()).streamed
    assert not llmprune.evaluate(folders["llama"], tiny.ids(), streamed=False).streamed
    assert not llmprune.evaluate(tiny.load(folders["llama"]), tiny.ids()).streamed
    with pytest.raises(RecipeError, match="a loaded model is in memory already"):
        llmprune.evaluate(tiny.load(folders["llama"]), tiny.ids(), streamed=True)


def test_the_modes_of_torch_are_given_back(folders: dict[str, Path], pruned: Path) -> None:
    llmprune.evaluate(pruned, tiny.ids(), dense=folders["llama"], streamed=True)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_a_table_has_a_row_for_each_model_and_text(folders: dict[str, Path], pruned: Path) -> None:
    texts = [tiny.ids(4, 20), tiny.ids(3, 10, seed=2)]
    found = llmprune.compare([folders["llama"], pruned], texts).evaluations
    assert [(row.model, row.length) for row in found] == [
        (str(folders["llama"]), 20), (str(folders["llama"]), 10), (str(pruned), 20), (str(pruned), 10)
    ]  # fmt: skip
    assert [row.perplexity for row in found] == [
        llmprune.evaluate(model, text).perplexity for model in (folders["llama"], pruned) for text in texts
    ]
    assert [row.dense for row in found] == [None, None, str(folders["llama"]), str(folders["llama"])]


def test_a_table_as_text_and_as_json(folders: dict[str, Path], pruned: Path) -> None:
    table = llmprune.compare([folders["llama"], pruned], [tiny.ids()])
    lines = str(table).splitlines()
    assert lines[0].split()[:3] == ["model", "data", "perplexity"] and len(lines) == 4
    assert lines[2].startswith(str(pruned)) and f"{table.evaluations[1].perplexity:.4f}" in lines[2]
    rows = json.loads(json.dumps(table.to_json()))["evaluations"]
    assert rows[0]["kl_divergence"] is None and rows[1]["kl_divergence"] > 0


def test_without_a_dense_model_there_is_no_distance(folders: dict[str, Path], pruned: Path) -> None:
    found = llmprune.compare([folders["llama"], pruned], [tiny.ids()], dense=False).evaluations
    assert [row.kl_divergence for row in found] == [None, None]


def test_results_are_kept_for_the_card(folders: dict[str, Path], pruned: Path) -> None:
    table = llmprune.compare([folders["llama"], pruned], [tiny.ids()], save=True)
    assert runs.read_run(pruned)["evaluations"] == [table.evaluations[1].to_json()]
    with pytest.raises(CheckpointError, match="is not an output of llmprune"):
        llmprune.evaluate(folders["llama"], tiny.ids(), save=True)


def test_figures_that_could_not_be_kept_are_not_measured(
    folders: dict[str, Path], pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*arguments: Any) -> Any:
        raise AssertionError("measured")

    monkeypatch.setattr(perplexity, "measure", measured)
    monkeypatch.setattr(comparison, "measure", measured)
    dense = folders["llama"]
    with pytest.raises(CheckpointError, match=r"is not an output of llmprune: it has no llmprune\.json"):
        llmprune.evaluate(dense, tiny.ids(), save=True)
    with pytest.raises(CheckpointError, match=r"is not an output of llmprune: it has no llmprune\.json"):
        llmprune.compare([pruned, dense], [tiny.ids()], save=True)
    with pytest.raises(AssertionError, match="measured"):  # nothing is added to the first one, which is the dense model
        llmprune.compare([dense, pruned], [tiny.ids()], save=True)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != pruned)
    with pytest.raises(CheckpointError, match=r"llmprune\.json cannot be written: no permission to write in"):
        llmprune.evaluate(pruned, tiny.ids(), save=True)


def test_a_stopped_comparison_says_which_figures_are_kept(
    folders: dict[str, Path], pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(pruned, tmp_path / "out"))
    before = len(runs.read_run(out).get("evaluations", []))
    real, calls = perplexity.measure, list[int]()

    def stopped(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(comparison, "measure", stopped)
    with pytest.raises(Interrupted, match=f"figures were added to {out}"):
        llmprune.compare([folders["llama"], out, pruned], [tiny.ids(2, 9)], save=True)
    assert len(runs.read_run(out)["evaluations"]) == before + 1
    with pytest.raises(KeyboardInterrupt) as nothing:
        llmprune.compare([folders["llama"], out], [tiny.ids(2, 9)], save=True)
    assert not isinstance(nothing.value, Interrupted)


def test_a_quick_look_says_how_little_it_saw(folders: dict[str, Path]) -> None:
    found = llmprune.evaluate(folders["llama"], tiny.ids(6, 20), windows=2)
    assert found.perplexity == llmprune.evaluate(folders["llama"], tiny.ids(6, 20)[:2]).perplexity
    assert found.windows == 2 and "only the first 2 of 6 windows" in found.convention
    with pytest.raises(RecipeError, match="windows must be a whole number of at least 1, not 0"):
        llmprune.evaluate(folders["llama"], tiny.ids(), windows=0)


def test_models_of_different_tokens_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    tiny.save(tiny.model("llama", vocab_size=2048), tmp_path / "demo-tokens")
    AutoTokenizer.from_pretrained(demo_folder()).save_pretrained(tmp_path / "demo-tokens")
    with pytest.raises(DataError, match=r"holds the token id \d+, but the vocabulary"):
        llmprune.evaluate(tmp_path / "demo-tokens", [[1, 2, 2000]], dense=folders["llama"])
    with pytest.raises(RecipeError, match="there is no model to evaluate"):
        llmprune.compare([])


LONGEST = 1024


@pytest.fixture(scope="module")
def long_context(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with the demo's tokenizer and a context of 1024, and a pruned copy of it."""
    folder = tmp_path_factory.mktemp("long")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fields: Any = dict(
            vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=LONGEST,
        )  # fmt: skip
        made = LlamaForCausalLM(LlamaConfig(**fields))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    made.save_pretrained(folder / "dense")
    AutoTokenizer.from_pretrained(demo_folder()).save_pretrained(folder / "dense")
    llmprune.prune(folder / "dense", folder / "pruned", method="magnitude", pattern="50%")
    return folder / "dense", folder / "pruned"


def wikitext() -> list[str]:
    lines = (demo_folder() / "wikitext2-evaluation.jsonl").read_text("utf-8").splitlines()
    return [str(json.loads(line)["text"]) for line in lines[:300]]


def in_the_form_of_ptb(rows: list[str]) -> list[str]:
    """Return sentences as Penn Treebank has them: small letters, no punctuation, N for numbers, <unk>."""
    words = [[word.lower() for word in row.split() if word.isalnum()] for row in rows]
    return [
        " ".join("N" if word.isdigit() else "<unk>" if len(word) > 11 else word for word in row)
        for row in words
        if len(row) > 4
    ]


def plain_perplexity(folder: Path, text: str, length: int) -> float:
    """The papers' loop with nothing of llmprune in it: transformers, and the loss in fp64 with numpy."""
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
    model = tiny.load(folder).eval()
    losses = []
    for start in range(0, len(ids) // length * length, length):
        window = ids[start : start + length]
        scores = tiny.logits(model, window[None])[0].double().numpy()
        shifted = scores[:-1] - scores[:-1].max(axis=1, keepdims=True)
        log_sums = numpy.log(numpy.exp(shifted).sum(axis=1))
        losses.append((log_sums - shifted[range(length - 1), window[1:].numpy()]).mean())
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("length", [256, 512, 1024])
@pytest.mark.parametrize("kind", ["wikitext", "ptb"])
def test_perplexities_equal_those_of_an_independent_loop(
    long_context: tuple[Path, Path], tmp_path: Path, length: int, kind: str
) -> None:
    if kind == "wikitext":
        text = "\n\n".join(wikitext())[:30_000]
        (file := tmp_path / "text.txt").write_text(text, "utf-8")
    else:  # a sentence a line, with a space on either side, as the file of the Penn Treebank has them
        rows = in_the_form_of_ptb(wikitext())
        (file := tmp_path / "ptb.test.txt").write_text("".join(f" {row} \n" for row in rows), "utf-8")
        text = " ".join(rows)
    for folder in long_context:
        found = llmprune.evaluate(folder, file, length=length)
        assert found.windows >= 4
        assert found.perplexity == pytest.approx(plain_perplexity(folder, text, length), rel=1e-4)
        assert ("rows joined with ' '" in found.convention) is (kind == "ptb")
