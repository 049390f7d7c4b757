"""What llmprune raises when a user, a file or the numbers are at fault.

Every message is one line that names the thing, the cause and the way out. The command line prints it and exits
with status 2; anything that is not an `LlmpruneError` is a bug of llmprune.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

_SHOWN = 20  # names in one message
_LONGEST = 2000  # characters of a message
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{12,}|(?<=://)[^/@\s]+@")


class LlmpruneError(Exception):
    """Base of all errors that llmprune raises on purpose.

    As text it is one line without tokens or passwords, whatever the names and values are that it quotes.
    """

    def __str__(self) -> str:
        return redact(one_line(super().__str__()))[:_LONGEST]


class RecipeError(LlmpruneError):
    """An option is unknown, out of range, or contradicts another one."""


class PatternError(LlmpruneError):
    """A sparsity pattern cannot be read, or does not fit a weight matrix."""


class CheckpointError(LlmpruneError):
    """A checkpoint is missing, incomplete, damaged, or not of a kind that can be pruned."""


class UnsupportedModelError(LlmpruneError):
    """The model is not a causal language model whose decoder blocks llmprune can find and stream."""


class DataError(LlmpruneError):
    """Calibration or evaluation data cannot be read, or does not fit the model."""


class NumericalError(LlmpruneError):
    """A weight, an activation or a statistic is not finite, or a solve failed at every damping."""


class HubError(LlmpruneError):
    """The Hub cannot be reached, does not know the token, or refuses what was asked of it."""


class ResourceError(LlmpruneError):
    """Memory ran out."""


class RankError(LlmpruneError):
    """Another process of the run has left, is lost or cannot be reached; or the processes do not fit together."""


class Interrupted(KeyboardInterrupt):
    """The user or the system stopped a run of which a part is kept; the first argument says how to continue it."""


@contextmanager
def saying_what_is_kept(kept: Callable[[], str]) -> Iterator[None]:
    """Have an interruption of the block say what `kept` returns; where that is empty, the interruption stays as it is.

    Raises:
        Interrupted: the block was interrupted, and something is kept.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if not (words := kept()):
            raise
        cause = error.args[1:] if isinstance(error, Interrupted) else error.args
        raise Interrupted(words, *cause) from None


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Have a NumericalError of the block say which matrix it is about.

    Raises:
        NumericalError: the block's, with the name.
    """
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{name}: {error}") from None


def one_line(text: str) -> str:
    """Return a text without what a terminal would act upon, such as names from a checkpoint may hold."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def first_line(error: object) -> str:
    """Return the first line of what an error says, its class where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def redact(text: str, mark: str = "***") -> str:
    """Return a text with a mark in place of the Hub's access tokens, and of user names and passwords in addresses."""
    return _SECRET.sub(mark, text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that offers the nearest known name, or lists them all when none is near."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{near[0]}'?"
    more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
    return f"known: {', '.join(names[:_SHOWN])}{more}"
