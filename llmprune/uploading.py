"""The Hub's own client as far as publishing needs it, with each of its errors in one line.

Everything goes through huggingface_hub and its login, so its proxies, certificates, Xet and resuming hold.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmprune import hub
from llmprune.errors import HubError, RecipeError

_NOT_UPLOADED = ("*.new", "*.partial", ".cache/*", "__pycache__/*")


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


class Client:
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

    def read(self, repo: str, name: str) -> bytes:
        """Return the bytes of a file in a model repository."""
        with _quiet_in_pipes(), _refusals(f"read {name} of '{repo}'"), TemporaryDirectory(prefix="llmprune-") as folder:
            return Path(self._api.hf_hub_download(repo, name, local_dir=folder)).read_bytes()

    def upload(self, folder: Path, repo: str, private: bool, message: str, told: dict[str, bytes]) -> Published:
        """Create the repository where it is missing, and upload the folder; what is there already is not sent again.

        Args:
            told: contents of files, by name, that take the place of what the folder has under that name.
        """
        with _quiet_in_pipes(), _refusals(f"publish '{repo}'"), _shown(folder, told) as shown:
            url = self._api.create_repo(repo, private=private, exist_ok=True)
            commit = self._api.upload_folder(
                repo_id=repo,
                folder_path=shown,
                commit_message=message,
                ignore_patterns=list(_NOT_UPLOADED),
                delete_patterns=["*"],
            )
            return Published(repo, str(url), commit.oid, bool(self._api.model_info(repo).private))


@contextmanager
def _shown(folder: Path, told: dict[str, bytes]) -> Iterator[Path]:
    """Yield a folder of links to the files of another, with some contents exchanged; the files themselves stay."""
    with TemporaryDirectory(prefix="llmprune-") as temporary:
        for path in filter(Path.is_file, folder.rglob("*")):
            name = path.relative_to(folder)
            target = Path(temporary) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (content := told.get(name.as_posix())) is not None:
                target.write_bytes(content)
            else:
                target.symlink_to(path.resolve())
        yield Path(temporary)


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
        return f"{place} refuses ({hub.brief(error)})"
    return f"no connection to {place} ({hub.brief(error)}): run the same command again, it goes on where it was"
