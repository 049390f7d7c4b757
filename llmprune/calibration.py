"""Documents become the token sequences that the model sees during calibration, and those become batches."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch

from llmprune.documents import Documents
from llmprune.errors import DataError, first_line
from llmprune.progress import Progress

_MOST_TOKENS = 1 << 28  # a thousand times the papers' 128 x 2048; two gigabytes of token ids
DEFAULT_SAMPLES = 128
_ATTEMPTS_PER_SAMPLE = 1000

Encode = Callable[[int], torch.Tensor]


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used."""

    chat_template: Any

    def __call__(self, text: str, /, *, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        """Return a mapping whose `input_ids` are the token ids of `text`."""

    def apply_chat_template(self, conversation: list[dict[str, str]], /, *, tokenize: bool) -> Any:
        """Return `conversation` as one text."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """All sequences that the model will see, in order.

    Attributes:
        rows: int64 [length] each; the lengths may differ where the user gave token ids.
        name: the data as the caller named it.
        fingerprint: sha256 in hex over the lengths and ids.
        note: one line on how the rows were made.
    """

    rows: list[torch.Tensor]
    name: str
    fingerprint: str
    note: str


def sample(documents: Documents, tokenizer: Tokenizer | None, *, samples: int | None, length: int, seed: int) -> Tokens:
    """Return `samples` windows (128 if None) of `length` tokens each, drawn with `seed`.

    The draws come in the order of the SparseGPT and Wanda scripts. One text is tokenised once, and windows start
    anywhere in it. Of separate documents one is drawn after another, those of no more than `length` tokens passed
    over, and a window is drawn in each. Where too few are long enough, all are put end to end in shuffled order and
    cut into windows that do not overlap, as many as there are. Token ids from the user are taken as they stand: all
    rows, or the first `samples`, whatever their `length`.

    Raises:
        DataError: the data does not fill one window, there is no tokenizer or chat template for it, or a row is not
            what the documents say.
    """
    count = DEFAULT_SAMPLES if samples is None else samples
    if count < 1 or length < 1:
        raise DataError(f"cannot draw {count} windows of {length} tokens; both must be at least 1")
    if documents.kind == "input_ids":
        return _as_given(documents, samples)
    if count * length > _MOST_TOKENS:
        raise DataError(
            f"{count} windows of {length} tokens are more than {_MOST_TOKENS} tokens: ask for fewer samples"
        )
    if documents.joined:
        return _from_text(documents, text_tokens(documents, tokenizer), count, length, random.Random(seed))
    encode = _encoder(documents, _present(documents, tokenizer))
    rows = _draw(encode, len(documents.rows), count, length, random.Random(seed))
    if not rows:
        return _packed(documents, encode, count, length, random.Random(seed))
    return _tokens(documents, rows, f"{_windows(count, length)} from documents of {documents.name}")


def text_tokens(documents: Documents, tokenizer: Tokenizer | None) -> torch.Tensor:
    """Return the ids, int64 [tokens], of one text: its rows joined and tokenised in one call.

    Special tokens are added as the tokenizer does by default, as in the papers.

    Raises:
        DataError: the documents are not text, or there is no tokenizer.
    """
    if documents.kind != "text":
        raise DataError(f"{documents.name} holds {documents.kind}; text is needed here")
    return _encoded(_present(documents, tokenizer), documents.separator.join(documents.rows), True)


def check(tokens: Tokens, *, vocabulary: int, context: int | None) -> None:
    """Raise a DataError unless every id is in [0, vocabulary) and no row is longer than `context` positions."""
    for number, row in enumerate(tokens.rows, start=1):
        outside = row[(row < 0) | (row >= vocabulary)]
        if len(outside):
            raise DataError(
                f"{tokens.name}: row {number} holds the token id {int(outside[0])}, but the vocabulary of the model "
                f"has ids 0 to {vocabulary - 1}; use the tokenizer of the model"
            )
        if context is not None and len(row) > context:
            raise DataError(
                f"{tokens.name}: row {number} has {len(row)} tokens, but the model has {context} positions; "
                f"use at most {context} tokens a row"
            )


def batches(tokens: Tokens, batch_size: int) -> list[torch.Tensor]:
    """Return the rows in order as int64 [b, length] with b <= `batch_size`, each of consecutive rows of one length."""
    groups: list[list[torch.Tensor]] = []
    for row in tokens.rows:
        if groups and len(groups[-1]) < batch_size and len(groups[-1][0]) == len(row):
            groups[-1].append(row)
        else:
            groups.append([row])
    return [torch.stack(group) for group in groups]


def _tokens(documents: Documents, rows: list[torch.Tensor], note: str) -> Tokens:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(row.numpy().astype("<i8").tobytes())
    return Tokens(rows, documents.name, digest.hexdigest(), note)


def _as_given(documents: Documents, samples: int | None) -> Tokens:
    rows = [torch.tensor(row, dtype=torch.int64) for row in documents.rows[:samples]]
    return _tokens(documents, rows, f"{len(rows)} rows of token ids as given in {documents.name}")


def _from_text(documents: Documents, ids: torch.Tensor, count: int, length: int, rng: random.Random) -> Tokens:
    _need_one_window(len(ids), length)
    if len(ids) == length:
        return _tokens(documents, [ids], f"{_windows(1, length)}, all of {documents.name}")
    rows = []
    for _ in range(count):
        start = rng.randint(0, len(ids) - length - 1)
        rows.append(ids[start : start + length])
    return _tokens(documents, rows, f"{_windows(count, length)} from the text of {documents.name}")


def _encoder(documents: Documents, tokenizer: Tokenizer) -> Encode:
    """Return a function from the index of a document to its token ids."""
    if documents.kind == "messages" and tokenizer.chat_template is None:
        raise DataError(f"{documents.name} holds messages, but the tokenizer has no chat template; give text")

    # A long document may be drawn again and again, so the last ones are kept.
    @lru_cache(maxsize=DEFAULT_SAMPLES)
    def encode(index: int) -> torch.Tensor:
        row = documents.rows[index]
        if documents.kind == "messages":
            # The template writes the special tokens itself.
            return _encoded(tokenizer, _chat(documents.name, index, row, tokenizer), False)
        if not isinstance(row, str):
            raise DataError(f"{documents.name}: row {index + 1} holds no text but a {type(row).__name__}")
        return _encoded(tokenizer, row, True)

    return encode


def _encoded(tokenizer: Tokenizer, text: str, special: bool) -> torch.Tensor:
    # Not verbose: a text longer than the context is no mistake here, it is cut into windows.
    return torch.tensor(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"], dtype=torch.int64)


def _chat(name: str, index: int, row: list[dict[str, str]], tokenizer: Tokenizer) -> str:
    try:
        return str(tokenizer.apply_chat_template(row, tokenize=False))
    except Exception as error:  # a template is a program of the model's authors and may raise anything
        raise DataError(f"{name}: the chat template cannot render row {index + 1}: {first_line(error)}") from error


def _draw(encode: Encode, documents: int, count: int, length: int, rng: random.Random) -> list[torch.Tensor]:
    """Return `count` windows from documents drawn at random, or none at all if too few documents are long enough."""
    short: set[int] = set()
    rows: list[torch.Tensor] = []
    with Progress(count, "calibration", "sample") as bar:
        for _ in range(_ATTEMPTS_PER_SAMPLE * count):
            index = rng.randint(0, documents - 1)
            ids = torch.empty(0) if index in short else encode(index)
            if len(ids) > length:
                start = rng.randint(0, len(ids) - length - 1)
                rows.append(ids[start : start + length])
                bar.step()
            else:
                short.add(index)
            if len(rows) == count:
                return rows
            if len(short) == documents:
                return []
    return []


def _packed(documents: Documents, encode: Encode, count: int, length: int, rng: random.Random) -> Tokens:
    order = list(range(len(documents.rows)))
    rng.shuffle(order)
    pieces: list[torch.Tensor] = []
    total = 0
    for index in order:
        pieces.append(encode(index))
        total += len(pieces[-1])
        if total >= count * length:
            break
    _need_one_window(total, length)
    stream = torch.cat(pieces)
    rows = [stream[start : start + length] for start in range(0, total - length + 1, length)][:count]
    note = f"{_windows(len(rows), length)} packed from the documents of {documents.name}"
    return _tokens(documents, rows, note if len(rows) == count else f"{note}, {count} asked for: it has {total} tokens")


def _windows(count: int, length: int) -> str:
    return f"{count} window{'s' if count > 1 else ''} of {length} tokens"


def _need_one_window(tokens: int, length: int) -> None:
    if tokens < length:
        way_out = f"use --length {tokens} or more text" if tokens else "use more text"
        raise DataError(f"calibration is shorter than one window: has {tokens} tokens, needs {length}; {way_out}")


def _present(documents: Documents, tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise DataError(f"{documents.name} holds {documents.kind}, but the model has no tokenizer; give input_ids")
    return tokenizer
