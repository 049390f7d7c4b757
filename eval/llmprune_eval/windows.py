"""A text becomes the windows that a model is measured on, by the convention of the pruning papers.

The text is tokenized in one call with the tokenizer's default special tokens and cut into windows that do not
overlap; the tail is dropped.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmprune.calibration import Tokens, text_tokens
from llmprune.documents import Documents
from llmprune.errors import DataError
from llmprune.options import require_whole

MOST_WINDOWS = {"c4": 256}  # as SparseGPT's and Wanda's code
_LOGIT_BYTES = 256 << 20  # of fp32 logits at a time
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Amount:
    """How much of a text is measured on, and how much at once; None is the default of each."""

    length: int | None = None
    windows: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        require_whole("length", self.length, 2)
        require_whole("windows", self.windows, 1)
        require_whole("batch_size", self.batch_size, 1)


@dataclass(frozen=True)
class Windows:
    """What a model is measured on.

    Attributes:
        tokens: one row a window.
        bytes_per_token: of the whole text, the dropped tail included; None where the data came as token ids.
    """

    tokens: Tokens
    bytes_per_token: float | None

    @property
    def longest(self) -> int:
        """Tokens in the longest window."""
        return max(len(row) for row in self.tokens.rows)

    def same_ids(self, other: "Windows") -> bool:
        """Say whether another model's tokenizer cuts the text into the very same ids."""
        mine, theirs = self.tokens.rows, other.tokens.rows
        return len(mine) == len(theirs) and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))

    def bits_per_byte(self, loss: float) -> float | None:
        """Return the cross-entropy per byte of the text, of a mean `loss` in nats a token."""
        return None if self.bytes_per_token is None else loss / math.log(2) / self.bytes_per_token


def cut(text: Documents, tokenizer: Any, length: int, most: int | None = None) -> Windows:
    """Return the first `most` windows of `length` tokens of a text; rows of token ids are taken as they are.

    Raises:
        DataError: the text is shorter than a window, or a row of token ids leaves nothing to predict.
    """
    if text.kind == "input_ids":
        rows = [torch.tensor(row, dtype=torch.int64) for row in text.rows]
        if any(len(row) < 2 for row in rows):
            raise DataError(f"{text.name} has a row of fewer than 2 tokens, which leaves nothing to predict")
        return _first(most, rows, text.name, "each row of token ids is one window, used as given", None)
    ids = text_tokens(text, tokenizer)
    rows = list(ids[: len(ids) // length * length].view(-1, length))[: MOST_WINDOWS.get(text.name)]
    if not rows:
        raise DataError(f"{text.name} has {len(ids)} tokens, less than one window of {length}: use --length {len(ids)}")
    joined = f"rows joined with {text.separator!r}" if len(text.rows) > 1 else "text as it stands"
    left = len(ids) - len(rows) * length
    note = f"{joined}, one tokenizer call, windows of {length} that do not overlap, tail of {left} tokens dropped"
    size = len(text.separator.join(text.rows).encode())
    return _first(most, rows, text.name, note, size / len(ids))


def _first(most: int | None, rows: list[Tensor], name: str, note: str, bytes_per_token: float | None) -> Windows:
    if most is not None and most < len(rows):
        note, rows = f"{note}; only the first {most} of {len(rows)} windows", rows[:most]
    return Windows(Tokens(rows, name, "", note), bytes_per_token)


def fitting_batch(windows: Windows, vocabulary: int) -> int:
    """Return how many windows go through a model at once."""
    return max(1, min(_BATCH_TOKENS, _LOGIT_BYTES // (4 * vocabulary)) // windows.longest)
