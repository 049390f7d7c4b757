"""The Hugging Face Hub: is it there, and a model's files as a local folder.

Without a network the libraries retry for half a minute before they give up. Here the Hub is probed once, and what
cannot be fetched fails within seconds in one line. No message holds a token or the password of a mirror.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue
from types import ModuleType

from llmprune.errors import CheckpointError, redact


def reachable(timeout_s: float = 3.0) -> bool:
    """Return whether the Hub answers within `timeout_s` seconds; at once False where HF_HUB_OFFLINE is set.

    The request goes through huggingface_hub's own session, so its proxies, certificates and endpoint hold.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answer: Queue[bool] = Queue()
    # A thread, as the time that a dead name server or a silent address costs has no limit in the client.
    threading.Thread(target=_probe, args=(constants.ENDPOINT, timeout_s, answer), daemon=True).start()
    try:
        return answer.get(timeout=timeout_s)
    except Empty:
        return False


def _probe(endpoint: str, timeout_s: float, answer: "Queue[bool]") -> None:
    from huggingface_hub import get_session

    try:
        answer.put(get_session().head(endpoint, timeout=timeout_s).status_code < 500)
    except Exception:  # the error classes are the transport's, which differs between releases of huggingface_hub
        answer.put(False)


@contextmanager
def offline(*configurations: ModuleType) -> Iterator[None]:
    """Keep huggingface_hub from the network inside the block: what is not in its cache fails at once.

    The switch is read from the environment when a library is imported; `configurations` are further modules that
    hold a copy of it named HF_HUB_OFFLINE, such as `datasets.config`.
    """
    from huggingface_hub import constants

    modules = (constants, *configurations)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]


def obstacle() -> str:
    """Return why the Hub cannot be used now, as part of a sentence; to be called after `reachable()` said False."""
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{endpoint()} does not answer"


def endpoint() -> str:
    """Return the address of the Hub in use, without a user name or password."""
    from huggingface_hub import constants

    return redact(constants.ENDPOINT, "")


def brief(error: BaseException) -> str:
    """Return the kind of `error` and the first line of its message, tokens and passwords blotted out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redact(": ".join([type(error).__name__, *lines[:1]]))


def fetch_model(model_id: str, revision: str | None, patterns: list[str]) -> Path:
    """Return the local folder of the files of `model_id` at `revision` whose names match `patterns`.

    The files come from the Hub, or from the local cache where the Hub cannot be reached.

    Raises:
        CheckpointError: the id is malformed, there is no such model or revision, access is refused, the download
            breaks off, or the Hub cannot be reached and the model is not in the local cache.
    """
    from huggingface_hub import snapshot_download

    online = reachable()
    try:
        return Path(
            snapshot_download(model_id, revision=revision, allow_patterns=patterns, local_files_only=not online)
        )
    except Exception as error:  # whatever broke, the way out is the same, and the classes are the transport's
        raise CheckpointError(_refusal(error, model_id, revision, online)) from error


def _refusal(error: Exception, model_id: str, revision: str | None, online: bool) -> str:
    """Return what went wrong with a download, in one line with the way out; the order is from narrow to wide."""
    from huggingface_hub import errors

    place = endpoint()
    if isinstance(error, errors.HFValidationError):
        return f"'{model_id}' is neither a local folder nor a model on the Hub; those are named organisation/name"
    if isinstance(error, errors.GatedRepoError):
        return f"'{model_id}' is gated: accept its terms at {place}/{model_id}, then `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no model '{model_id}' on {place}, or it is private: check the name, "
            "log in with `hf auth login`, or pass a local folder"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"'{model_id}' on {place} has no revision '{revision}': name a branch, a tag or a full commit hash"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"{place} refuses access to '{model_id}' (HTTP {error.response.status_code}): check HF_TOKEN"
    if isinstance(error, errors.LocalEntryNotFoundError) and not online:
        return _not_cached(model_id, revision)
    return f"cannot fetch '{model_id}' from {place} ({brief(error)}): try again, or pass a local folder"


def _not_cached(model_id: str, revision: str | None) -> str:
    from huggingface_hub import constants

    what = f"'{model_id}'" if revision is None else f"'{model_id}' at revision '{revision}'"
    return (
        f"{what} is no local folder, and as a model on the Hub it cannot be had: {obstacle()}, "
        f"and {constants.HF_HUB_CACHE} does not hold all of it; pass a local folder"
    )
