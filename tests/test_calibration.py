"""Windows drawn as the papers' scripts draw them, without ever hanging, and batches that keep every token."""

import logging
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llmprune import calibration, data
from llmprune.calibration import Tokens
from llmprune.data import Documents
from llmprune.errors import DataError

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEMPLATE = "{% for message in messages %}<s>{{ message['role'] }}{{ message['content'] }}{% endfor %}"


def character_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per character, 10 for a; <s>, id 0, goes in front, as with Llama; a context of 8 tokens."""
    vocabulary = {"<s>": 0, "?": 1, " ": 2, "\n": 3} | {letter: 10 + index for index, letter in enumerate(LETTERS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="?", model_max_length=8)
    tokenizer.chat_template = template
    return tokenizer


TOKENIZER = character_tokenizer()


def ids(text: str) -> list[int]:
    return [0, *(2 if letter == " " else 3 if letter == "\n" else 10 + LETTERS.index(letter) for letter in text)]


def letters(count: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(LETTERS, k=count))


def texts(*rows: Any, separator: str | None = None) -> Documents:
    return Documents("somewhere", "text", list(rows), separator is not None, separator or "")


def draw(documents: Documents, samples: int | None, length: int, seed: int = 0) -> Tokens:
    return calibration.sample(documents, TOKENIZER, samples=samples, length=length, seed=seed)


def lists(tokens: Tokens) -> list[list[int]]:
    assert all(row.dtype == torch.int64 and row.dim() == 1 for row in tokens.rows)
    return [row.tolist() for row in tokens.rows]


def script_windows_of_a_text(stream: list[int], samples: int, length: int, seed: int) -> list[list[int]]:
    """The published loop for WikiText-2."""
    random.seed(seed)
    rows = []
    for _ in range(samples):
        i = random.randint(0, len(stream) - length - 1)
        rows.append(stream[i : i + length])
    return rows


def script_windows_of_documents(documents: list[list[int]], samples: int, length: int, seed: int) -> list[list[int]]:
    """The published loop for C4."""
    random.seed(seed)
    rows = []
    for _ in range(samples):
        while True:
            chosen = documents[random.randint(0, len(documents) - 1)]
            if len(chosen) > length:
                break
        i = random.randint(0, len(chosen) - length - 1)
        rows.append(chosen[i : i + length])
    return rows


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_one_text_is_sampled_as_in_the_scripts(seed: int) -> None:
    documents = texts(letters(300), letters(200, 1), separator="\n\n")
    tokens = draw(documents, 20, 16, seed)
    assert lists(tokens) == script_windows_of_a_text(ids("\n\n".join(documents.rows)), 20, 16, seed)
    assert (tokens.name, tokens.note) == ("somewhere", "20 windows of 16 tokens from the text of somewhere")


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_documents_are_sampled_as_in_the_scripts(seed: int) -> None:
    documents = texts(*(letters(7 * number % 60, number) for number in range(50)))
    tokens = draw(documents, 20, 32, seed)
    assert lists(tokens) == script_windows_of_documents([ids(row) for row in documents.rows], 20, 32, seed)
    assert tokens.note == "20 windows of 32 tokens from documents of somewhere"


@pytest.mark.parametrize("separator", ["", None])
def test_128_samples_by_default_that_the_seed_decides(separator: str | None) -> None:
    documents = texts(letters(500), separator=separator)
    first, again, other = (draw(documents, None, 8, seed) for seed in (1, 1, 2))
    assert len(first.rows) == 128
    assert lists(first) == lists(again) != lists(other)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_a_text_of_one_window() -> None:
    tokens = draw(texts(letters(15), separator=""), 4, 16)
    assert lists(tokens) == [ids(letters(15))]
    assert tokens.note == "1 window of 16 tokens, all of somewhere"


def test_short_documents_are_packed() -> None:
    documents = texts(*(letters(9, number) for number in range(30)))
    tokens = draw(documents, 5, 32)
    order = list(range(30))
    random.Random(0).shuffle(order)
    stream = [token for index in order for token in ids(documents.rows[index])]
    assert lists(tokens) == [stream[start : start + 32] for start in range(0, 160, 32)]
    assert tokens.note == "5 windows of 32 tokens packed from the documents of somewhere"


def test_packing_gives_what_there_is() -> None:
    tokens = draw(texts(*["abc"] * 10), 5, 16)
    assert [len(row) for row in tokens.rows] == [16, 16]
    assert tokens.note.endswith("somewhere, 5 asked for: it has 40 tokens")


def test_one_long_document_among_many_does_not_make_the_calibration() -> None:
    tokens = draw(texts(letters(100), *["abc"] * 20_000), 2, 50)
    assert len(tokens.rows) == 2 and "packed" in tokens.note


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (texts("abc", separator=""), "has 4 tokens, needs 16; use --length 4 or more text"),
        (texts("abc", "de"), "has 7 tokens, needs 16; use --length 7 or more text"),
    ],
)
def test_too_little_text(documents: Documents, message: str) -> None:
    with pytest.raises(DataError) as error:
        draw(documents, 2, 16)
    assert str(error.value) == f"calibration is shorter than one window: {message}"


def test_no_tokens_at_all() -> None:
    plain = character_tokenizer()
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(DataError, match="has 0 tokens, needs 16; use more text"):
        calibration.sample(texts("", ""), plain, samples=1, length=16, seed=0)


@pytest.mark.parametrize(("samples", "length"), [(0, 8), (-1, 8), (3, 0)])
def test_senseless_numbers(samples: int, length: int) -> None:
    with pytest.raises(DataError, match="both must be at least 1"):
        draw(texts(letters(99)), samples, length)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(LETTERS, max_size=40), min_size=1, max_size=8),
    st.sampled_from([None, "", " "]),
    st.integers(1, 6),
    st.integers(1, 30),
    st.integers(0, 3),
)
def test_sampling_ends_with_whole_windows(
    rows: list[str], separator: str | None, samples: int, length: int, seed: int
) -> None:
    documents = texts(*rows, separator=separator)
    total = len(ids(separator.join(rows))) if separator is not None else sum(len(ids(row)) for row in rows)
    if total < length:
        with pytest.raises(DataError, match="shorter than one window"):
            draw(documents, samples, length, seed)
        return
    tokens = draw(documents, samples, length, seed)
    assert 1 <= len(tokens.rows) <= samples
    assert all(len(row) == length for row in tokens.rows)


def test_token_ids_are_taken_as_they_stand() -> None:
    rows = [[5, 6, 7], [1], [2, 3]]
    documents = data.read(rows, "calibration")
    tokens = calibration.sample(documents, None, samples=None, length=2048, seed=0)
    assert lists(tokens) == rows and tokens.note == "3 rows of token ids as given in a list of 3 rows"
    assert lists(calibration.sample(documents, None, samples=2, length=2048, seed=0)) == rows[:2]
    assert lists(calibration.sample(documents, None, samples=9, length=2048, seed=0)) == rows


CHAT = [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yo"}]


def test_messages_go_through_the_chat_template_without_more_special_tokens() -> None:
    tokens = draw(Documents("chats", "messages", [CHAT], False, ""), 3, 13)
    assert lists(tokens) == [ids("userhi") + ids("botyo")]
    assert tokens.note.startswith("1 window of 13 tokens packed from the documents of chats, 3 asked for")


def test_messages_without_a_chat_template() -> None:
    documents = Documents("chats", "messages", [CHAT], False, "")
    with pytest.raises(DataError, match="the tokenizer has no chat template; give text"):
        calibration.sample(documents, character_tokenizer(None), samples=1, length=4, seed=0)


def test_messages_that_the_template_refuses() -> None:
    documents = Documents("chats", "messages", [CHAT], False, "")
    strict = character_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="chats: the chat template cannot render row 1: roles must alternate"):
        calibration.sample(documents, strict, samples=1, length=4, seed=0)


@pytest.mark.parametrize(
    "documents", [texts("a"), texts("a", separator=""), Documents("a", "messages", [CHAT], False, "")]
)
def test_no_tokenizer(documents: Documents) -> None:
    with pytest.raises(DataError, match="the model has no tokenizer; give input_ids"):
        calibration.sample(documents, None, samples=1, length=1, seed=0)


def test_a_document_that_is_no_text() -> None:
    with pytest.raises(DataError, match="somewhere: row 1 holds no text but a NoneType"):
        draw(texts(None), 1, 4)


def test_text_tokens_are_those_of_one_call() -> None:
    documents = texts("ab", "", "c", separator="\n\n")
    assert calibration.text_tokens(documents, TOKENIZER).tolist() == ids("ab\n\n\n\nc")


@pytest.mark.parametrize("kind", ["messages", "input_ids"])
def test_text_tokens_of_something_else(kind: str) -> None:
    with pytest.raises(DataError, match=f"rows holds {kind}; text is needed here"):
        calibration.text_tokens(Documents("rows", kind, [[1]], False, ""), TOKENIZER)


def test_long_texts_bring_no_warning(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    fresh = character_tokenizer()
    with caplog.at_level(logging.WARNING):
        calibration.sample(texts(letters(99)), fresh, samples=1, length=4, seed=0)
        calibration.text_tokens(texts(letters(99), separator=""), fresh)
    assert not caplog.records and "longer than" not in capsys.readouterr().err


def given_rows(rows: list[list[int]]) -> Tokens:
    return calibration.sample(Documents("mine", "input_ids", rows, False, ""), None, samples=None, length=1, seed=0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 9], [3, 10, 11]], "mine: row 2 holds the token id 10, but the vocabulary of the model has ids 0 to 9"),
        ([[0, -100]], "mine: row 1 holds the token id -100"),
        ([[1], [1, 2, 3, 4, 5]], "mine: row 2 has 5 tokens, but the model has 4 positions"),
    ],
)
def test_check_refuses(rows: list[list[int]], message: str) -> None:
    with pytest.raises(DataError) as error:
        calibration.check(given_rows(rows), vocabulary=10, context=4)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("context", [4, None])
def test_check_accepts(context: int | None) -> None:
    calibration.check(given_rows([[0, 9, 3, 4], [1]]), vocabulary=10, context=context)


@pytest.mark.parametrize("rows", [[[1, 2, 3]], [[1], [2, 3], [4]], [[1, 2], [3, 5]], [[3, 4], [1, 2]]])
def test_the_fingerprint_tells_rows_apart(rows: list[list[int]]) -> None:
    one = given_rows([[1, 2], [3, 4]]).fingerprint
    assert len(one) == 64 and one == given_rows([[1, 2], [3, 4]]).fingerprint
    assert one != given_rows(rows).fingerprint


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=3), min_size=1, max_size=12), st.integers(1, 5))
def test_batches_keep_order_and_content(rows: list[list[int]], size: int) -> None:
    tensors = calibration.batches(given_rows(rows), size)
    assert [row for tensor in tensors for row in tensor.tolist()] == rows
    assert all(tensor.dtype == torch.int64 and len(tensor) <= size for tensor in tensors)
    for one, two in pairwise(tensors):
        assert len(one) == size or one.shape[1] != two.shape[1]


def test_documents_that_lie_on_disk() -> None:
    datasets = pytest.importorskip("datasets")
    rows = [letters(40, number) for number in range(10)]
    documents = data.read(datasets.Dataset.from_dict({"text": rows}), "calibration")
    assert lists(draw(documents, 5, 32)) == lists(draw(texts(*rows), 5, 32))


def test_more_tokens_than_memory_holds_are_refused_before_any_is_drawn() -> None:
    documents = Documents("a text", "text", ["words"], True, "")
    with pytest.raises(DataError, match="ask for fewer samples"):
        calibration.sample(documents, None, samples=1_000_000_000, length=2048, seed=0)
