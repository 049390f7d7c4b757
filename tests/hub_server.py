"""A Hub on the loopback: as much of the Hugging Face Hub's HTTP interface as its own client needs.

It knows accounts by their tokens, public, private and gated model repositories, git-LFS uploads, commits and
downloads, and it can be told to fail. Clients must have HF_HUB_DISABLE_XET set, as it does not speak Xet.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN, READER_TOKEN = "hf_testerswritetoken", "hf_readersownreadtoken"
ACCOUNTS = {TOKEN: ("tester", "write"), READER_TOKEN: ("reader", "read")}
LFS_SUFFIXES = (".safetensors", ".bin")
_REPO = r"(?P<repo>[^/]+/[^/]+)"


@dataclass
class Repo:
    """A model repository at its only revision."""

    private: bool = False
    gated: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr((len(self.commits), sorted(self.files))).encode()).hexdigest()


@dataclass
class Fault:
    """What the next `times` requests whose method and path match `what` get: a status, or a cut connection."""

    what: str
    status: int | None
    times: int
    code: str = ""


class FakeHub:
    """The state of the Hub, and its address."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.lock = threading.Lock()

    def fail(self, what: str, status: int | None, times: int = 1, code: str = "") -> None:
        """Answer the next requests that match the regular expression `what` with `status`; None cuts the line."""
        self.faults.append(Fault(what, status, times, code))

    def fault(self, request: str) -> Fault | None:
        """Return the fault that strikes this request, used up by one."""
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.what, request):
                    fault.times -= 1
                    return fault
        return None

    def requests(self, what: str) -> list[str]:
        """Return the requests so far that match a regular expression."""
        return [line for line in self.log if re.search(what, line)]


class Answer(Exception):
    """Ends the handling of a request."""

    def __init__(self, status: int, body: Any = None, raw: bytes | None = None, **headers: str) -> None:
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.raw = json.dumps(body).encode() if raw is None else raw


def refusal(status: int, code: str, message: str) -> Answer:
    return Answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)


class Handler(BaseHTTPRequestHandler):
    """One request: who asks, is it struck by a fault, which route answers it."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one packet: two would wait for each other (delayed acknowledgement)
    hub: FakeHub

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.route, self.query, self.body = unquote(url.path), parse_qs(url.query), self._read()
        request = f"{self.command} {self.route}"
        self.hub.log.append(request)
        if fault := self.hub.fault(request):
            if fault.status is None:
                self.close_connection = True
                self.connection.close()
                return
            self._send(refusal(fault.status, fault.code, "struck by a fault"))
            return
        try:
            self._dispatch()
        except Answer as answer:
            self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _dispatch(self) -> None:
        if self.route == "/":
            raise Answer(200, {})
        for method, pattern, handle in ROUTES:
            found = re.fullmatch(pattern, self.route)
            if found and self.command in method.split():
                handle(self, **found.groupdict())
        raise refusal(404, "", f"no route {self.command} {self.route}")

    def _read(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.raw)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.raw)

    def account(self) -> tuple[str, str] | None:
        """Return the name and role of who asks; None where no token was sent."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        known = ACCOUNTS.get(header.removeprefix("Bearer "))
        if known is None:
            raise refusal(401, "", "Invalid username or password.")
        return known

    def writer(self, namespace: str) -> None:
        name, role = self.account() or ("", "")
        if not name:
            raise refusal(401, "", "Invalid username or password.")
        if role != "write" or namespace != name:
            raise refusal(403, "", f"You don't have the rights to write under the namespace {namespace!r}.")

    def readable(self, repo: str) -> Repo:
        found, account = self.hub.repos.get(repo), self.account()
        if found is None or (found.private and (account is None or account[0] != repo.split("/")[0])):
            raise refusal(404 if account else 401, "RepoNotFound", "Repository not found")
        return found


def whoami(request: Handler) -> None:
    account = request.account()
    if account is None:
        raise refusal(401, "", "Invalid username or password.")
    name, role = account
    token = {"type": "access_token", "accessToken": {"displayName": "t", "role": role}}
    raise Answer(200, {"type": "user", "name": name, "orgs": [], "auth": token})


def create(request: Handler) -> None:
    asked = json.loads(request.body)
    namespace = asked.get("organization") or (request.account() or ("",))[0]
    request.writer(namespace)
    repo = f"{namespace}/{asked['name']}"
    url = f"{request.hub.address}/{repo}"
    if repo in request.hub.repos:
        raise Answer(409, {"error": "You already created this model repo", "url": url})
    private = bool(asked.get("private")) or asked.get("visibility") == "private"
    request.hub.repos[repo] = Repo(private=private, files={".gitattributes": b""})
    raise Answer(200, {"url": url, "name": repo, "id": repo})


def info(request: Handler, repo: str) -> None:
    found = request.readable(repo)
    text = found.files.get("README.md", b"").decode()
    licence = re.search(r"^license: (.+)$", text, re.MULTILINE)
    raise Answer(
        200,
        {
            "id": repo, "modelId": repo, "sha": found.commit, "private": found.private, "tags": [],
            "gated": "manual" if found.gated else False, "downloads": 0, "likes": 0,
            "cardData": {"license": licence[1]} if licence else None,
            "siblings": [{"rfilename": name} for name in found.files],
        },
    )  # fmt: skip


def tree(request: Handler, repo: str) -> None:
    raise Answer(200, [_entry(name, data) for name, data in request.readable(repo).files.items()])


def paths_info(request: Handler, repo: str) -> None:
    body = request.body.decode()
    wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
    files = request.readable(repo).files
    raise Answer(200, [_entry(name, files[name]) for name in wanted if name in files])


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if name.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def validate_card(request: Handler) -> None:
    content = json.loads(request.body)["content"]
    errors = [] if content.startswith("---\n") else [{"message": "empty or missing yaml metadata in repo card"}]
    raise Answer(200 if not errors else 400, {"errors": errors, "warnings": []})


def preupload(request: Handler, repo: str) -> None:
    request.writer(repo.split("/")[0])
    modes = {True: "lfs", False: "regular"}
    raise Answer(
        200,
        {
            "files": [
                {"path": f["path"], "uploadMode": modes[f["path"].endswith(LFS_SUFFIXES)], "shouldIgnore": False}
                for f in json.loads(request.body)["files"]
            ]
        },
    )


def lfs_batch(request: Handler, repo: str) -> None:
    request.writer(repo.split("/")[0])
    objects = []
    for asked in json.loads(request.body)["objects"]:
        answer = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in request.hub.objects:
            answer["actions"] = {"upload": {"href": f"{request.hub.address}/lfs/{asked['oid']}", "header": {}}}
        objects.append(answer)
    raise Answer(200, {"transfer": "basic", "objects": objects})


def lfs_upload(request: Handler, oid: str) -> None:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise refusal(400, "", "the bytes do not have this SHA-256")
    request.hub.objects[oid] = request.body
    raise Answer(200, {})


def commit(request: Handler, repo: str) -> None:
    request.writer(repo.split("/")[0])
    found = request.readable(repo)
    with request.hub.lock:
        for line in request.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                found.commits.append(value["summary"])
            elif operation["key"] == "file":
                found.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                found.files[value["path"]] = request.hub.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del found.files[value["path"]]
    url = f"{request.hub.address}/{repo}/commit/{found.commit}"
    raise Answer(200, {"success": True, "commitOid": found.commit, "commitUrl": url, "hookOutput": ""})


def resolve(request: Handler, repo: str, name: str) -> None:
    found = request.readable(repo)
    if name not in found.files:
        raise Answer(404, {}, X_Error_Code="EntryNotFound", X_Error_Message="not found", X_Repo_Commit=found.commit)
    data = found.files[name]
    headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": found.commit, "Accept_Ranges": "bytes"}
    span = re.match(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if span is None:
        raise Answer(200, raw=data, **headers)
    start, stop = int(span[1]), int(span[2] or len(data) - 1)
    headers["Content_Range"] = f"bytes {start}-{stop}/{len(data)}"
    raise Answer(206, raw=data[start : stop + 1], **headers)


ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", validate_card),
    ("GET HEAD", rf"/api/models/{_REPO}(?:/revision/[^/]+)?", info),
    ("GET", rf"/api/models/{_REPO}/tree/.+", tree),
    ("POST", rf"/api/models/{_REPO}/paths-info/.+", paths_info),
    ("POST", rf"/api/models/{_REPO}/preupload/.+", preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", lfs_upload),
    ("POST", rf"/api/models/{_REPO}/commit/.+", commit),
    ("GET HEAD", rf"/{_REPO}/resolve/[^/]+/(?P<name>.+)", resolve),
]


@contextmanager
def serve() -> Iterator[FakeHub]:
    """Run a Hub inside the block."""
    handler = type("BoundHandler", (Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub = handler.hub = FakeHub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
