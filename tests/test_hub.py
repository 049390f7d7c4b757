"""Models from the Hub: the probe, the offline switch, and one line for each way in which a download fails."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import huggingface_hub
import pytest
from huggingface_hub import constants

from llmprune import hub
from llmprune.errors import CheckpointError

COMMIT = "a" * 40


@pytest.fixture(autouse=True)
def private_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache, no token, no proxy, and a client that knows of it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a Hub where nothing listens."""
    address = f"http://127.0.0.1:{closed_port()}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    return address


class Server:
    """A Hub on the loopback that answers every question for a model with one status and error code."""

    def __init__(self, root_status: int, status: int, code: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_response(root_status)
                self.end_headers()

            def do_GET(self) -> None:
                self.send_response(status)
                if code:
                    self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *details: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def cache_model(revision: str = "main") -> Path:
    """Put a snapshot of org/name into the local cache, as a download would."""
    folder = Path(constants.HF_HUB_CACHE) / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / revision).write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    return snapshot


@pytest.mark.parametrize(("status", "answer"), [(200, True), (404, True), (500, False), (503, False)])
def test_reachable(monkeypatch: pytest.MonkeyPatch, status: int, answer: bool) -> None:
    with Server(status, 200, "") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        assert hub.reachable() is answer


def test_not_reachable(dead: str) -> None:
    assert not hub.reachable()


def test_not_reachable_where_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert not hub.reachable(timeout_s=0.05)


def test_not_reachable_with_a_malformed_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "no address")
    assert not hub.reachable()


def test_the_offline_switch_of_the_user_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_probe", lambda *arguments: pytest.fail("the network was used"))
    assert not hub.reachable()
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        hub.fetch_model("org/name", None, ["*.json"])


@pytest.mark.parametrize("before", [False, True])
def test_offline_restores(monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    other = ModuleType("other")
    other.HF_HUB_OFFLINE = before  # type: ignore[attr-defined]
    with pytest.raises(KeyError), hub.offline(other):
        assert constants.HF_HUB_OFFLINE and other.HF_HUB_OFFLINE
        raise KeyError
    assert not constants.HF_HUB_OFFLINE and other.HF_HUB_OFFLINE is before


def test_offline_keeps_the_libraries_from_the_network(dead: str) -> None:
    with hub.offline(), pytest.raises(huggingface_hub.errors.OfflineModeIsEnabled):
        huggingface_hub.get_session().head(dead)


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_the_cache_serves_where_the_hub_does_not(dead: str, revision: str | None) -> None:
    snapshot = cache_model()
    assert hub.fetch_model("org/name", revision, ["*.json"]) == snapshot


@pytest.mark.parametrize(("revision", "what"), [(None, "'org/name'"), ("v2", "'org/name' at revision 'v2'")])
def test_neither_hub_nor_cache(dead: str, revision: str | None, what: str) -> None:
    with pytest.raises(CheckpointError) as error:
        hub.fetch_model("org/name", revision, ["*.json"])
    message = str(error.value)
    assert "\n" not in message and message.startswith(what)
    assert all(part in message for part in (dead, "does not answer", constants.HF_HUB_CACHE, "pass a local folder"))


@pytest.mark.parametrize("model_id", ["", "a/b/c", "--x", "a b", "org/name?", "org/" + "x" * 200])
def test_malformed_ids(dead: str, model_id: str) -> None:
    with pytest.raises(CheckpointError, match="is neither a local folder nor a model on the Hub") as error:
        hub.fetch_model(model_id, None, ["*.json"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "there is no model 'org/name' on"),
        (403, "GatedRepo", "'org/name' is gated: accept its terms at"),
        (404, "RevisionNotFound", "has no revision 'v2'"),
        (401, "", "refuses access to 'org/name' (HTTP 401): check HF_TOKEN"),
        (400, "", "cannot fetch 'org/name' from"),
    ],
)
def test_refusals(monkeypatch: pytest.MonkeyPatch, status: int, code: str, message: str) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    with Server(200, status, code) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        with pytest.raises(CheckpointError) as error:
            hub.fetch_model("org/name", "v2", ["*.json"])
    text = str(error.value)
    assert message in text and "\n" not in text and "hf_abc" not in text


def test_one_line_hides_secrets() -> None:
    error = OSError("\n  GET https://me:secret@mirror.org/x with hf_abcdefghijkl failed\nsecond line")
    assert hub.brief(error) == "OSError: GET https://***mirror.org/x with *** failed"


def test_one_line_of_an_error_without_a_message() -> None:
    assert hub.brief(TimeoutError()) == "TimeoutError"


def test_the_endpoint_is_shown_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://me:secret@mirror.org")
    assert hub.endpoint() == "https://mirror.org"
