"""Publish a pruned model on the Hugging Face Hub, or refuse in one line before anything is uploaded.

Everything goes through huggingface_hub's own client and login, so its proxies, certificates, Xet and resuming hold.
A repository that exists is taken if nothing but .gitattributes is in it, or a former output of llmprune; any other is
left alone unless `overwrite` is given. Files of a former output that the new one does not have are deleted in the
same upload, and stay in the repository's history.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmprune import card, hub
from llmprune.checkpoint.sink import REPORT
from llmprune.errors import CheckpointError, HubError, RecipeError
from llmprune.inspection import inspect
from llmprune.locate import DEMO
from llmprune.runs import read_run

_NOT_UPLOADED = ["*.new", "*.partial", ".cache/*", "__pycache__/*"]


@dataclass(frozen=True)
class Published:
    """Where a model was published.

    Attributes:
        url: the page of the repository.
        commit: the commit that holds the upload.
    """

    repo: str
    url: str
    commit: str
    private: bool

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        visible = "private" if self.private else "public"
        return f"published {self.url} ({visible}, commit {self.commit[:8]})"


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    allow_gated: bool = False,
    overwrite: bool = False,
) -> Published:
    """Publish an output of `llmprune.prune` with a model card that is written from its `llmprune.json`.

    Args:
        folder: the output folder.
        repo: `organisation/name`, or a name in the user's own namespace.
        private: create the repository private.
        base_model: the base model's id on the Hub where the run was given a local folder; `none` if it is on no Hub.
        license: the licence where the base model's card names none.
        allow_gated: publish openly although the base model is gated.
        overwrite: replace a repository that holds something else.

    Raises:
        CheckpointError: the folder is no complete output, does not keep its promises, or its card is not filled in.
        RecipeError: the repository's name is malformed, or the base model or its licence is not known.
        HubError: there is no Hub or no valid token, the repository cannot be used, the base model is not open, or the
            connection was lost.
    """
    folder = Path(folder)
    run = _complete_run(folder)
    base = _base_id(run, base_model)
    client = _Client()
    client.sign_in()
    repo = client.full_name(repo)
    base_info = client.look_up(base) if base else None
    if base:
        _require_open(base_info, base, private, allow_gated)
    inherited = _inherited(folder, base_info, license)
    _require_free(client.look_up(repo), repo, private, overwrite)
    _require_promises_kept(folder)
    card.write_card(folder, run, repo, base, inherited)
    recipe = run["recipe"]
    return client.upload(folder, repo, private, f"llmprune: {recipe['method']} {recipe['pattern']}")


def _complete_run(folder: Path) -> dict[str, Any]:
    if folder.name.endswith(".partial") or any(folder.glob("*.partial")):
        raise CheckpointError(f"{folder} is the unfinished output of a run that is going on or was killed: prune again")
    return read_run(folder)


def _require_promises_kept(folder: Path) -> None:
    inspection = inspect(folder)
    if not inspection.verified:
        cause = inspection.faults[0] if inspection.faults else "llmprune.json promises nothing"
        raise CheckpointError(f"{folder} is not what its llmprune.json says ({cause}): prune the model again")


def _base_id(run: dict[str, Any], given: str | None) -> str | None:
    """Return the base model's id on the Hub, None where it is on no Hub."""
    if given is not None:
        return None if given == card.NOBODY else given
    model = str(run["model"])
    if model == DEMO:
        return None
    if model.count("/") == 1 and not model.startswith((".", "~", "/")) and not Path(model).exists():
        return model
    raise RecipeError(f"the base model was a folder ({model}): give its Hub id as --base-model ID, or 'none'")


class _Client:
    """The Hub's own client, with each of its errors in one line."""

    def __init__(self) -> None:
        from huggingface_hub import HfApi

        self._api = HfApi(library_name="llmprune")
        self._user = ""

    def sign_in(self) -> None:
        """Make sure that there is a Hub, and that it knows the token."""
        from huggingface_hub import get_token

        if not hub.reachable():
            raise HubError(f"cannot publish: {hub.obstacle()}")
        if get_token() is None:
            raise HubError("cannot publish without a token: run `hf auth login`, or set HF_TOKEN")
        with _refusals("log in"):
            self._user = self._api.whoami()["name"]

    def full_name(self, repo: str) -> str:
        """Return `repo` with its namespace, the user's own where it names none."""
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        name = repo if "/" in repo else f"{self._user}/{repo}"
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise RecipeError(f"'{repo}' cannot name a repository: those are named organisation/name") from None
        return name

    def look_up(self, repo: str) -> Any:
        """Return what the Hub says of a model repository, None where it shows none of that name."""
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

        with _refusals(f"look up '{repo}'"):
            try:
                return self._api.model_info(repo)
            except (RepositoryNotFoundError, HFValidationError):
                return None

    def upload(self, folder: Path, repo: str, private: bool, message: str) -> Published:
        """Create the repository where it is missing, and upload the folder; what is there already is not sent again."""
        with _quiet_in_pipes(), _refusals(f"publish '{repo}'"):
            url = self._api.create_repo(repo, private=private, exist_ok=True)
            commit = self._api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=message,
                ignore_patterns=list(_NOT_UPLOADED),
                delete_patterns=["*"],
            )
            return Published(repo, str(url), commit.oid, bool(self._api.model_info(repo).private))


def _require_free(info: Any, repo: str, private: bool, overwrite: bool) -> None:
    """Refuse a repository that holds something else, or that is open where a private one is wanted."""
    if info is None:
        return
    names = {sibling.rfilename for sibling in info.siblings or []}
    if not (names <= {".gitattributes"} or REPORT in names or overwrite):
        raise HubError(f"the repository '{repo}' holds something else: choose another name, or pass --overwrite")
    if private and not info.private:
        raise HubError(f"the repository '{repo}' exists and is public: make it private on the Hub first")


def _require_open(info: Any, base: str, private: bool, allow_gated: bool) -> None:
    """Refuse to show to everybody what is made from weights that are not."""
    if info is None:
        raise RecipeError(
            f"{hub.endpoint()} shows no base model '{base}': give its id there as --base-model ID, or 'none'"
        )
    if (info.gated or info.private) and not (private or allow_gated):
        kind = "gated" if info.gated else "private"
        raise HubError(
            f"the base model '{base}' is {kind}: pass --private, or --allow-gated if its licence lets you publish "
            "weights made from it"
        )


def _inherited(folder: Path, info: Any, license: str | None) -> dict[str, Any]:
    """Return metadata with a licence: the one given, else that of the base's card here, else of the one on the Hub."""
    on_hub = info.card_data.to_dict() if info is not None and info.card_data is not None else {}
    metadata: dict[str, Any] = on_hub | card.base_metadata(folder) | ({"license": license} if license else {})
    if not metadata.get("license"):
        raise RecipeError("the licence of the base model is not known: give it as --license, such as apache-2.0")
    return metadata


@contextmanager
def _quiet_in_pipes() -> Iterator[None]:
    """Keep the client's progress bars and notes on retries from a stderr that is no terminal."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as notes

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    level = notes.get_verbosity()
    notes.set_verbosity(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
        notes.set_verbosity(level)


@contextmanager
def _refusals(doing: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever broke; the classes are the transport's, which differs between releases
        raise HubError(f"cannot {doing}: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    """Return what went wrong, with the way out; a refusal of the Hub is told by its status."""
    response = getattr(error, "response", None)
    status, place = getattr(response, "status_code", 0), hub.endpoint()
    if status == 401:
        return f"{place} does not know the token: run `hf auth login`, or set HF_TOKEN to a valid one"
    if status == 403:
        return f"{place} says that the token may not do that: use one with the right to write there"
    if status == 409:
        return f"it was changed by somebody else meanwhile ({place}, HTTP 409): run the same command again"
    if status == 429 or status >= 500:
        return f"{place} is busy or broken (HTTP {status}): run the same command later, it goes on where it was"
    if status:
        return f"{place} refuses ({hub.one_line(error)})"
    return f"no connection to {place} ({hub.one_line(error)}): run the same command again, it goes on where it was"
