"""Perplexity: the papers' convention, against ten lines that compute it another way."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import llmprune
import tiny
from llmprune.errors import DataError, NumericalError, RecipeError

WORDS = [f"w{index}" for index in range(40)]
LENGTH = 16


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, an empty line is a token too, <s> goes in front."""
    vocabulary = {"<s>": 0, "?": 1, "\n\n": 2} | {word: 10 + index for index, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="?")


TOKENIZER = word_tokenizer()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny.model("llama")


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny.save(model, tmp_path_factory.mktemp("models") / "llama")
    TOKENIZER.save_pretrained(path)
    return path


def words(count: int, seed: int = 0) -> str:
    draws = torch.randint(0, len(WORDS), (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[draw] for draw in draws)


def slow_loss(model: PreTrainedModel, windows: list[list[int]]) -> float:
    """Mean cross-entropy, in fp64, one window and one target at a time."""
    total = 0.0
    for window in windows:
        scores_LV = tiny.logits(model, torch.tensor([window]))[0].double()
        losses = [
            float(torch.logsumexp(scores_V, 0) - scores_V[target])
            for scores_V, target in zip(scores_LV[:-1], window[1:], strict=True)
        ]
        total += sum(losses) / len(losses) * len(window)
    return total / sum(len(window) for window in windows)


def windows_of(text: str, length: int = LENGTH) -> list[list[int]]:
    ids: list[int] = TOKENIZER(text)["input_ids"]
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def put(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_a_text_file_is_cut_into_windows_and_the_tail_dropped(
    model: PreTrainedModel, folder: Path, tmp_path: Path
) -> None:
    text = words(100)
    path = tmp_path / "text.txt"
    path.write_text(text, "utf-8")
    found = llmprune.evaluate(str(folder), path, length=LENGTH)
    loss = slow_loss(model, windows_of(text))
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-6)
    assert (found.windows, found.length, found.tokens) == (6, LENGTH, 96)
    assert found.bits_per_byte == pytest.approx(loss / math.log(2) * 101 / len(text), rel=1e-6)
    assert "tail of 5 tokens dropped" in found.convention and "text as it stands" in found.convention


def test_rows_are_joined_with_an_empty_line_and_tokenized_in_one_call(model: PreTrainedModel, tmp_path: Path) -> None:
    rows = [words(20, seed) for seed in range(4)]
    path = put(tmp_path / "rows.jsonl", [{"text": row} for row in rows])
    found = llmprune.evaluate(model, path, length=LENGTH, tokenizer=TOKENIZER)
    windows = windows_of("\n\n".join(rows))
    assert sum(window.count(2) for window in windows) == 3 and sum(window.count(0) for window in windows) == 1
    assert found.perplexity == pytest.approx(math.exp(slow_loss(model, windows)), rel=1e-6)
    assert "rows joined with '\\n\\n'" in found.convention


def test_rows_of_token_ids_are_windows_as_given(model: PreTrainedModel, tmp_path: Path) -> None:
    windows = [tiny.ids(1, length, seed=length)[0].tolist() for length in (5, 5, 2, 48, 9)]
    path = put(tmp_path / "ids.jsonl", [{"input_ids": window} for window in windows])
    found = llmprune.evaluate(model, path)
    assert found.perplexity == pytest.approx(math.exp(slow_loss(model, windows)), rel=1e-6)
    assert (found.windows, found.length, found.tokens, found.bits_per_byte) == (5, 48, 69, None)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_the_batch_size_does_not_matter(model: PreTrainedModel, batch_size: int) -> None:
    ids = tiny.ids(7, 20)
    expected = llmprune.evaluate(model, ids).perplexity
    assert llmprune.evaluate(model, ids, batch_size=batch_size).perplexity == pytest.approx(expected, rel=1e-6)


def test_a_folder_and_the_loaded_model_agree(model: PreTrainedModel, folder: Path) -> None:
    from_folder, loaded = llmprune.evaluate(folder, tiny.ids()), llmprune.evaluate(model, tiny.ids())
    assert from_folder.perplexity == loaded.perplexity
    assert (from_folder.model, from_folder.dtype, from_folder.device) == (str(folder), "float32", "cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_is_heard(folder: Path, dtype: str) -> None:
    assert llmprune.evaluate(folder, tiny.ids(), dtype=dtype).dtype == dtype


def test_the_length_is_the_context_unless_asked_for(model: PreTrainedModel) -> None:
    assert llmprune.evaluate(model, [words(200)], tokenizer=TOKENIZER).length == tiny.CONTEXT
    assert llmprune.evaluate(model, [words(200)], tokenizer=TOKENIZER, length=10).length == 10


def test_dropout_is_off_and_the_mode_is_given_back() -> None:
    dropping = tiny.model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = llmprune.evaluate(dropping, tiny.ids()).perplexity
    assert not dropping.training
    assert llmprune.evaluate(dropping.train(), tiny.ids()).perplexity == expected
    assert dropping.training


def test_a_result_is_json_and_text(model: PreTrainedModel) -> None:
    found = llmprune.evaluate(model, tiny.ids())
    assert json.loads(json.dumps(found.to_json()))["perplexity"] == found.perplexity
    assert f"perplexity {found.perplexity:.4f}" in str(found)


@pytest.mark.parametrize(
    ("data", "options", "kind", "message"),
    [
        ([words(5)], {"length": 16}, DataError, "has 6 tokens, less than one window of 16: use --length 6"),
        ([words(5)], {"length": 49}, DataError, "context of 48 tokens"),
        ([words(5)], {"length": 0}, RecipeError, "length must be a whole number of at least 2, not 0"),
        ([words(5)], {"length": 1}, RecipeError, "length must be a whole number of at least 2, not 1"),
        ([words(5)], {"length": 4, "batch_size": -1}, RecipeError, "batch_size must be a whole number of at least 1"),
        ([words(50)], {"tokenizer": None}, DataError, "no tokenizer"),
        ([words(50)], {"dtype": "float8"}, RecipeError, "unknown dtype 'float8'"),
        ([[3, 4], [5]], {}, DataError, "a row of fewer than 2 tokens"),
        ([[3, 4], [5, tiny.VOCABULARY]], {}, DataError, f"row 2 holds the token id {tiny.VOCABULARY}"),
        ([[3] * 49], {}, DataError, "row 1 has 49 tokens"),
        ([[{"role": "user", "content": "hello"}]], {}, DataError, "holds messages; text is needed"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    model: PreTrainedModel, data: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as error:
        llmprune.evaluate(model, data, **{"tokenizer": TOKENIZER} | options)
    assert message in str(error.value)


def broken(fill: float) -> PreTrainedModel:
    made = tiny.model("llama")
    head: Tensor = made.get_output_embeddings().weight
    with torch.no_grad():
        head.mul_(fill)
    return made


def test_a_model_that_gives_nan_is_refused() -> None:
    with pytest.raises(NumericalError, match="gives NaN or infinite outputs: try --dtype float32"):
        llmprune.evaluate(broken(math.nan), tiny.ids())


def test_a_perplexity_beyond_all_numbers_is_refused() -> None:
    with pytest.raises(NumericalError, match="too large for a perplexity"):
        llmprune.evaluate(broken(1e6), tiny.ids())
