"""A small Hub on this machine, so that the unpatched `huggingface_hub` client has something real to talk to.

    with LoopbackHub(tmp_path) as hub:
        hub.put("alice/adapter", {"adapter_config.json": b"{}"})       # straight into the store, unchecked: for hostile content
        api = hub.api(token="hf_alice")                                 # the real client, in this process
        subprocess.run([...], env=hub.environment(token="hf_alice"))    # the real client, in a fresh one (read at import)
        hub.fault("GET .*/resolve/", "status", status=503, times=2)     # what goes wrong next
        hub.count("GET", r"/storage/")                                  # what was asked for

Two listeners: the Hub, and the storage that large files are redirected to (another origin, as with the real one, so that the client
must leave the token behind; the storage refuses a request that carries one). Contents lie in the given folder, by hash; the history
of each repository is in memory. Users are named by their tokens: `hf_alice` is alice; every user owns the namespace of that name.

Knows: whoami, create / delete / move, settings, YAML validation, preupload, LFS batch + upload + verify, commits (with 412 on a stale
parent), resolve with HEAD, ranges and ETags, model info, listing with filter, author, search, sort and pages, tree, paths, refs, tags,
branches, history, collections, private and gated repositories, error codes. Left out: Xet (the client falls back to LFS with
`HF_HUB_DISABLE_XET=1`, which `environment` sets), pull requests, data sets and Spaces, organisations beyond a namespace.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
import yaml

LFS_NAMES = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".onnx", ".h5")  # what .gitattributes sends to large storage
LFS_SIZE = 10_000_000  # bytes from which any file goes there
LICENSES = {"apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-3.0", "openrail", "unknown", "other"}
WITHDRAWN = {"jw", "iw", "in", "mo", "sh"}  # two-letter codes that ISO took back; the Hub refuses them


# ---- what a Hub holds --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """One file of a commit: where its bytes lie, and what git and LFS call them."""

    sha256: str
    size: int
    git_oid: str
    is_lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_oid

    @property
    def lfs(self) -> dict[str, Any] | None:
        return {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": 134} if self.is_lfs else None


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    sha: str
    parent: str | None
    title: str
    author: str
    date: str
    files: Mapping[str, File]


@dataclass
class Repo:
    """A repository: its commits by hash, its branches and tags, and who may see it."""

    id: str
    private: bool = False
    gated: str | bool = False
    granted: set[str] = field(default_factory=set)  # users whom a gated repository lets in
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    downloads: int = 0
    likes: int = 0
    created: str = field(default_factory=lambda: _now())

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def head(self) -> Commit:
        return self.commits[self.branches["main"]]


@dataclass
class Fault:
    """Something that goes wrong for requests whose "METHOD /path" matches."""

    pattern: str
    kind: str  # status, slow, drop, lose, cut, flip, trickle, stale: see LoopbackHub.fault
    times: int
    status: int
    seconds: float
    headers: dict[str, str]


@dataclass(frozen=True)
class Request:
    """One request as it was answered. `status` 0: no answer was sent."""

    method: str
    path: str
    user: str | None
    status: int
    range: str | None


class Refusal(Exception):
    """An answer other than success. `code` is what the client tells errors apart by."""

    def __init__(self, status: int, message: str, code: str | None = None, body: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message} if body is None else body


class _Dropped(Exception):
    """The connection ends without an answer."""


# ---- the Hub as a test sees it -----------------------------------------------------------------------------------------


class LoopbackHub:
    """The server, started by `with`. Everything the tests may turn is an attribute or a method here.

    Args:
        folder: Where contents are kept.
        users: Who has a token: token -> user.
        page_size: Entries of a page of any listing.
    """

    def __init__(self, folder: str | Path, users: Mapping[str, str] | None = None, page_size: int = 1000) -> None:
        self.folder = Path(folder) / "loopback_hub"
        self.folder.mkdir(parents=True, exist_ok=True)
        names = ("alice", "bob", "mallory")
        self.users = {f"hf_{name}": name for name in names} if users is None else dict(users)
        self.page_size = page_size
        self.repos: dict[str, Repo] = {}
        self.ignores_author = False  # a Hub that answers with more than it was asked for
        self.moved: dict[str, str] = {}  # former id -> id, as after a renaming
        self.collections: dict[str, list[str]] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._servers: list[_Server] = []
        self._ports = [0, 0]

    # -- starting and stopping

    def __enter__(self) -> LoopbackHub:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Listen; after `stop`, on the same ports as before."""
        for index, handler in enumerate((_HubHandler, _StorageHandler)):
            server = _Server(("127.0.0.1", self._ports[index]), handler)
            server.hub = self
            self._ports[index] = server.server_address[1]
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            self._servers.append(server)

    def stop(self) -> None:
        """Refuse connections and cut those that are open: the network is gone."""
        while self._servers:
            server = self._servers.pop()
            server.shutdown()
            server.server_close()
            server.cut_connections()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def storage(self) -> str:
        return f"http://localhost:{self._ports[1]}"  # not 127.0.0.1: some versions of the client tell hosts apart by name alone

    # -- clients

    def api(self, token: str | bool | None = False) -> Any:
        """The real client for this Hub, in this process. By default without a token."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=token)

    def environment(self, token: str | None = None, home: str | Path | None = None, **more: str) -> dict[str, str]:
        """Environment of a process whose client talks to this Hub. `home` is its cache (default: one in this Hub's folder)."""
        ours = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_OFFLINE")
        env = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        env |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.folder / "home" if home is None else home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return env | ({} if token is None else {"HF_TOKEN": token}) | more

    # -- contents, past all checks

    def put(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        private: bool = False,
        gated: str | bool = False,
        replace: bool = False,
        title: str = "files",
    ) -> str:
        """Commit files to a repository, which is made if need be. `replace`: the commit holds nothing else. Returns the commit's hash."""
        with self.lock:
            repo = self.repos.get(repo_id) or self.make_repo(repo_id, private=private, gated=gated)
            kept = {} if replace else dict(repo.head.files)
            kept |= {path: self.store(content, _is_large(path, len(content))) for path, content in files.items()}
            return self.append(repo, kept, title, repo.owner).sha

    def make_repo(self, repo_id: str, *, private: bool = False, gated: str | bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(repo_id, private, gated)
        self.moved.pop(repo_id, None)
        self.append(repo, {".gitattributes": self.store(b"*.safetensors filter=lfs\n", False)}, "initial commit", "system")
        return repo

    def append(self, repo: Repo, files: Mapping[str, File], title: str, author: str, branch: str = "main") -> Commit:
        """A new commit on a branch."""
        parent = repo.branches.get(branch)
        rows = sorted((path, file.sha256) for path, file in files.items())
        sha = hashlib.sha1(repr((parent, title, author, rows, repo.id, time.time_ns())).encode()).hexdigest()
        repo.commits[sha] = Commit(sha, parent, title, author, _now(), dict(files))
        repo.branches[branch] = sha
        return repo.commits[sha]

    def store(self, content: bytes, is_lfs: bool) -> File:
        digest = hashlib.sha256(content).hexdigest()
        path = self.folder / digest
        if not path.exists():
            part = path.with_suffix(f".{threading.get_ident()}")
            part.write_bytes(content)
            part.replace(path)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n".encode()
        return File(digest, len(content), _git_oid(pointer if is_lfs else content), is_lfs)

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """The bytes of a file, as they were committed."""
        return (self.folder / self.commit(repo_id, revision).files[path].sha256).read_bytes()

    def commit(self, repo_id: str, revision: str = "main") -> Commit:
        found = _find_commit(self.repos[repo_id], revision)
        assert found is not None, f"{repo_id} has no revision {revision!r}"
        return found

    def history(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Commits, newest first."""
        repo, commits = self.repos[repo_id], [self.commit(repo_id, revision)]
        while (parent := commits[-1].parent) is not None:
            commits.append(repo.commits[parent])
        return commits

    # -- faults and what was seen

    def fault(
        self, pattern: str, kind: str, *, times: int = 1, status: int = 503, seconds: float = 1.0, headers: Mapping[str, str] | None = None
    ) -> None:
        """Break the next `times` requests whose "METHOD /path" matches `pattern` (a regular expression, searched); -1: all of them.

        Kinds:
            status: answer with `status` and `headers` and do nothing.
            slow: wait `seconds`, then go on as usual.
            drop: close the connection; nothing is done.
            lose: do what is asked, then close the connection instead of answering.
            cut: announce the whole body and send half of it.
            flip: change one byte in the middle of the body.
            trickle: send the body in sixteen pieces, spread over `seconds`.
            stale: for commits: somebody else commits first.
        """
        assert kind in ("status", "slow", "drop", "lose", "cut", "flip", "trickle", "stale"), kind
        self.faults.append(Fault(pattern, kind, times, status, seconds, dict(headers or {})))

    def take_faults(self, request: str) -> list[Fault]:
        """The faults that hit this request, each counted down."""
        with self.lock:
            found = [fault for fault in self.faults if fault.times and re.search(fault.pattern, request)]
            for fault in found:
                fault.times -= 1
            return found

    def count(self, method: str, pattern: str, status: int | None = None) -> int:
        """How many requests there were, of a method and with a path that matches."""
        with self.lock:
            return sum(
                seen.method == method and re.search(pattern, seen.path) is not None and status in (None, seen.status)
                for seen in self.requests
            )


@pytest.fixture(name="hub")
def hub_fixture(tmp_path: Path) -> Iterator[LoopbackHub]:
    """`hub`: a running Hub. Import this name where it is used."""
    with LoopbackHub(tmp_path) as running:
        yield running


@pytest.fixture(name="online")
def online_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """`online`: this process may use the network, without Xet: what `environment` says to a fresh process, for one that is running."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@contextmanager
def no_network(hub: LoopbackHub) -> Iterator[None]:
    """The Hub is gone for a while."""
    hub.stop()
    try:
        yield
    finally:
        hub.start()


# ---- HTTP --------------------------------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    hub: LoopbackHub

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def cut_connections(self) -> None:
        for connection in list(self._open):
            with suppress(OSError):  # the other side was quicker
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that goes away in the middle is no news here


@dataclass(frozen=True)
class _Answer:
    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


Route = Callable[..., _Answer]
_ROUTES: list[tuple[str, re.Pattern[str], Route]] = []
_REPO, _REV = r"(?P<repo>[^/]+/[^/]+)", r"(?P<rev>[^/]+)"


def _route(methods: str, path: str) -> Callable[[Route], Route]:
    def register(function: Route) -> Route:
        _ROUTES.extend((method, re.compile(path), function) for method in methods.split())
        return function

    return register


def _json(value: Any, status: int = 200, **headers: str) -> _Answer:
    return _Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, applies faults, answers, writes it into the log."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server
    user: str | None = None

    @property
    def hub(self) -> LoopbackHub:
        return self.server.hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self) -> None:
        self.user, self.url = None, urlsplit(self.path)
        self.query = parse_qs(self.url.query)
        self.content = self._read_content()
        faults = self.hub.take_faults(f"{self.command} {self.path}")
        try:
            answer = self._answered(faults)
            self._log(0 if answer is None else answer.status)  # before it is sent: who has the answer finds the request in the log
            if answer is None:
                raise _Dropped
            self._send(answer, faults)
        except (_Dropped, OSError):
            self.close_connection = True

    def _answered(self, faults: list[Fault]) -> _Answer | None:
        """The answer, None if there is to be none."""
        kinds = {fault.kind for fault in faults}
        for fault in faults:
            if fault.kind == "slow":
                time.sleep(fault.seconds)
        if "drop" in kinds:
            return None
        broken = next((fault for fault in faults if fault.kind == "status"), None)
        if broken is not None:
            return _json({"error": "injected"}, broken.status, **broken.headers)
        answer = self._dispatched("stale" in kinds)
        return None if "lose" in kinds else answer

    def _log(self, status: int) -> None:
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, self.path, self.user, status, self.headers.get("Range")))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def _dispatched(self, stale: bool) -> _Answer:
        try:
            return self.dispatch(stale)
        except Refusal as refusal:
            said = {"X-Error-Message": str(refusal)} | ({} if refusal.code is None else {"X-Error-Code": refusal.code})
            return _json(refusal.body, refusal.status, **said)

    def dispatch(self, stale: bool) -> _Answer:
        raise NotImplementedError

    def _read_content(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _send(self, answer: _Answer, faults: list[Fault]) -> None:
        body, kinds = answer.body, {fault.kind: fault for fault in faults}
        if "flip" in kinds and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if "cut" in kinds and body:
            self.wfile.write(body[: len(body) // 2])
            raise _Dropped
        if "trickle" in kinds:
            step = max(1, len(body) // 16)
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                time.sleep(kinds["trickle"].seconds / 16)
            return
        self.wfile.write(body)


class _StorageHandler(_Handler):
    """Large files by their hash: GET with ranges, PUT. Whoever sends a token here has leaked it."""

    def dispatch(self, stale: bool) -> _Answer:
        if self.headers.get("Authorization") is not None:
            raise Refusal(400, "Only one auth mechanism allowed: the token of the Hub was sent to the storage.")
        digest = self.url.path.removeprefix("/storage/")
        if re.fullmatch(r"[0-9a-f]{64}", digest) is None:
            raise Refusal(404, "NoSuchKey")
        if self.command == "PUT":
            if hashlib.sha256(self.content).hexdigest() != digest:
                raise Refusal(400, "BadDigest")
            self.hub.store(self.content, True)
            return _Answer(headers={"ETag": f'"{digest}"'})
        if not (self.hub.folder / digest).exists():
            raise Refusal(404, "NoSuchKey")
        return _ranged(self, (self.hub.folder / digest).read_bytes(), {"ETag": f'"{digest}"'})


def _ranged(handler: _Handler, content: bytes, headers: Mapping[str, str]) -> _Answer:
    """All of the content, or the range that was asked for."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
    if wanted is None:
        return _Answer(content, 200, headers)
    start = int(wanted[1])
    end = min(int(wanted[2]) + 1 if wanted[2] else len(content), len(content))
    if start >= len(content):
        return _Answer(b"", 416, {**headers, "Content-Range": f"bytes */{len(content)}"})
    return _Answer(content[start:end], 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"})


class _HubHandler(_Handler):
    """The Hub's own addresses, one method each."""

    def dispatch(self, stale: bool) -> _Answer:
        self.user, self.stale = self._user(), stale
        for method, pattern, route in _ROUTES:
            match = pattern.fullmatch(self.url.path)
            if method == self.command and match is not None:
                with self.hub.lock:
                    return route(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
        raise Refusal(404, f"This Hub does not know {self.command} {self.url.path}")

    # -- who, and what they may see

    def _user(self) -> str | None:
        said = self.headers.get("Authorization")
        if said is None:
            return None
        token = said.removeprefix("Bearer ")
        if token not in self.hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def _signed_in(self) -> str:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        return self.user

    def _repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.user != repo.owner):
            raise Refusal(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def _own(self, repo_id: str) -> Repo:
        repo, user = self._repo(repo_id), self._signed_in()
        if repo.owner != user:
            raise Refusal(403, f"Forbidden: you must have write access to {repo_id}.")
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = _find_commit(repo, revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _asked(self) -> Any:
        return json.loads(self.content or b"{}")

    def _moved(self, repo: str) -> _Answer | None:
        """Where a renamed repository went, if it did: the Hub sends the client on."""
        if repo in self.hub.repos or repo not in self.hub.moved:
            return None
        return _Answer(b"", 307, {"Location": self.path.replace(repo, self.hub.moved[repo], 1)})

    # -- accounts and repositories

    @_route("GET", "/api/whoami-v2")
    def whoami(self) -> _Answer:
        name = self._signed_in()
        return _json({"type": "user", "id": name, "name": name, "fullname": name, "orgs": [], "auth": {"type": "access_token"}})

    @_route("POST", "/api/repos/create")
    def create(self) -> _Answer:
        asked, user = self._asked(), self._signed_in()
        owner = asked.get("organization") or user
        if owner != user:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        repo_id = f"{owner}/{asked['name']}"
        if repo_id in self.hub.repos:
            raise Refusal(409, "You already created this model repo", body={"error": "exists", "url": f"{self.hub.endpoint}/{repo_id}"})
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.make_repo(repo_id, private=bool(private))
        return _json({"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id})

    @_route("DELETE", "/api/repos/delete")
    def delete(self) -> _Answer:
        asked = self._asked()
        repo = self._own(f"{asked.get('organization') or self._signed_in()}/{asked['name']}")
        del self.hub.repos[repo.id]
        return _json({})

    @_route("POST", "/api/repos/move")
    def move(self) -> _Answer:
        asked = self._asked()
        repo = self._own(asked["fromRepo"])
        self.hub.moved[repo.id] = asked["toRepo"]
        del self.hub.repos[repo.id]
        repo.id = asked["toRepo"]
        self.hub.repos[repo.id] = repo
        return _json({})

    @_route("PUT", f"/api/models/{_REPO}/settings")
    def settings(self, repo: str) -> _Answer:
        found, asked = self._own(repo), self._asked()
        found.gated = asked.get("gated", found.gated)
        if "visibility" in asked or "private" in asked:
            found.private = asked.get("private", asked.get("visibility") == "private")
        return _json({})

    @_route("GET", f"/api/models/{_REPO}/auth-check(/write)?")
    def auth_check(self, repo: str) -> _Answer:
        self._check_gate(self._repo(repo))
        return _json({})

    # -- writing

    @_route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> _Answer:
        errors, warnings = _card_problems(self._asked()["content"])
        body = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
        if errors:
            raise Refusal(400, "Invalid metadata", body=body)
        return _json(body)

    @_route("POST", f"/api/models/{_REPO}/preupload/{_REV}")
    def preupload(self, repo: str, rev: str) -> _Answer:
        files = self._commit(self._own(repo), rev).files
        rows = [
            {
                "path": row["path"],
                "uploadMode": "lfs" if _is_large(row["path"], row["size"]) else "regular",
                "shouldIgnore": False,
                "oid": files[row["path"]].etag if row["path"] in files else None,
            }
            for row in self._asked()["files"]
        ]
        return _json({"files": rows})

    @_route("POST", rf"/{_REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: str) -> _Answer:
        self._own(repo)
        rows = []
        for asked in self._asked()["objects"]:
            row = {"oid": asked["oid"], "size": asked["size"]}
            if not (self.hub.folder / asked["oid"]).exists():
                verify = f"{self.hub.endpoint}/{repo}.git/info/lfs/objects/verify"
                row["actions"] = {"upload": {"href": f"{self.hub.storage}/storage/{asked['oid']}"}, "verify": {"href": verify}}
            rows.append(row)
        return _json({"transfer": "basic", "objects": rows})

    @_route("POST", rf"/{_REPO}\.git/info/lfs/objects/verify")
    def lfs_verify(self, repo: str) -> _Answer:
        self._own(repo)
        asked = self._asked()
        path = self.hub.folder / asked["oid"]
        if not path.exists() or path.stat().st_size != asked["size"]:
            raise Refusal(404, "The object was not uploaded")
        return _json({})

    @_route("POST", f"/api/models/{_REPO}/commit/{_REV}")
    def commit(self, repo: str, rev: str) -> _Answer:
        found, user = self._own(repo), self._signed_in()
        if self.stale:
            other = self.hub.store(f"someone else was here at {time.time_ns()}".encode(), False)
            self.hub.append(found, {**found.head.files, "other.txt": other}, "in between", user)
        if rev not in found.branches:
            raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        lines = [json.loads(line) for line in self.content.splitlines()]
        head = next(line["value"] for line in lines if line["key"] == "header")
        if head.get("parentCommit") not in (None, found.branches[rev]):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(found.commits[found.branches[rev]].files)
        for line in lines:
            self._apply(files, line["key"], line["value"])
        commit = self.hub.append(found, files, head["summary"], user, rev)
        return _json({"success": True, "commitOid": commit.sha, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{commit.sha}"})

    def _apply(self, files: dict[str, File], kind: str, value: dict[str, Any]) -> None:
        path = value.get("path", "")
        if kind == "file":
            content = base64.b64decode(value["content"])
            if path == "README.md" and (errors := _card_problems(content.decode("utf-8", "replace"))[0]):
                raise Refusal(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
            files[path] = self.hub.store(content, False)
        elif kind == "lfsFile":
            stored = self.hub.folder / value["oid"]
            if not stored.exists():
                raise Refusal(400, f"LFS object {value['oid']} was not uploaded")
            files[path] = self.hub.store(stored.read_bytes(), True)
        elif kind == "deletedFile":
            if path not in files:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            del files[path]
        elif kind == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]

    @_route("POST DELETE", f"/api/models/{_REPO}/tag/{_REV}")
    def tag(self, repo: str, rev: str) -> _Answer:
        return self._named(self._own(repo), "tags", rev)

    @_route("POST DELETE", f"/api/models/{_REPO}/branch/{_REV}")
    def branch(self, repo: str, rev: str) -> _Answer:
        return self._named(self._own(repo), "branches", rev)

    def _named(self, repo: Repo, kind: str, rev: str) -> _Answer:
        """Make or delete a tag (the address names what is tagged) or a branch (the address names the branch)."""
        names: dict[str, str] = getattr(repo, kind)
        if self.command == "DELETE":
            if names.pop(rev, None) is None:
                raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
            return _json({})
        asked = self._asked()
        name, start = (asked["tag"], rev) if kind == "tags" else (rev, asked.get("startingPoint", "main"))
        if name in names:
            raise Refusal(409, f"Reference {name} exists already")
        names[name] = self._commit(repo, start).sha
        return _json({})

    # -- reading

    @_route("GET HEAD", f"/{_REPO}/resolve/{_REV}/(?P<path>.+)")
    def resolve(self, repo: str, rev: str, path: str) -> _Answer:
        if (elsewhere := self._moved(repo)) is not None:
            return elsewhere
        found = self._repo(repo)
        if path not in ("README.md", ".gitattributes"):
            self._check_gate(found)
        commit = self._commit(found, rev)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        file = commit.files[path]
        headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": commit.sha}
        if file.is_lfs:
            linked = {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
            return _Answer(b"", 302, {**headers, **linked, "Location": f"{self.hub.storage}/storage/{file.sha256}"})
        content = (self.hub.folder / file.sha256).read_bytes()
        if self.command == "HEAD":
            return _Answer(b"", 200, {**headers, "Content-Length": str(len(content)), "Accept-Ranges": "bytes"})
        return _ranged(self, content, headers)

    def _check_gate(self, repo: Repo) -> None:
        if repo.gated and self.user != repo.owner and self.user not in repo.granted:
            raise Refusal(401 if self.user is None else 403, f"Access to model {repo.id} is restricted.", "GatedRepo")

    @_route("GET", f"/api/models/{_REPO}(/revision/{_REV})?")
    def info(self, repo: str, rev: str) -> _Answer:
        if (elsewhere := self._moved(repo)) is not None:
            return elsewhere
        found = self._repo(repo)
        row = self._row(found, self._commit(found, rev or "main"), blobs="blobs" in self.query)
        return _json(_expanded(row, self.query.get("expand", [])))

    @_route("GET", "/api/models")
    def listing(self) -> _Answer:
        rows = []
        for repo in self.hub.repos.values():
            if repo.private and self.user != repo.owner:
                continue
            row = self._row(repo, repo.head, blobs=False)
            if self._wanted(repo, row):
                rows.append(row)
        order = self.query.get("sort", ["downloads"])[0]
        rows.sort(key=lambda row: row.get(order) or 0, reverse=True)
        plain = ("author", "sha", "lastModified", "siblings", "cardData", "disabled", "gated", "model-index")
        expand, full = self.query.get("expand", []), "full" in self.query
        if not full:
            kept = {"cardData"} if "cardData" in self.query else set()
            rows = [_expanded(row, expand) if expand else {k: v for k, v in row.items() if k not in plain or k in kept} for row in rows]
        return self._paged(rows)

    def _wanted(self, repo: Repo, row: dict[str, Any]) -> bool:
        wanted = [part for value in self.query.get("filter", []) for part in value.split(",")]
        author = repo.owner if self.hub.ignores_author else self.query.get("author", [repo.owner])[0]
        search = self.query.get("search", [""])[0]
        task = self.query.get("pipeline_tag", [row.get("pipeline_tag")])[0]
        return set(wanted) <= set(row["tags"]) and author == repo.owner and search in repo.id and task == row.get("pipeline_tag")

    def _paged(self, rows: list[Any]) -> _Answer:
        start = int(self.query.get("cursor", ["0"])[0])
        size = min(self.hub.page_size, int(self.query.get("limit", [str(self.hub.page_size)])[0]))
        headers = {}
        if start + size < len(rows):
            rest = [(name, value) for name, values in self.query.items() if name != "cursor" for value in values]
            asked = "&".join(f"{quote(name)}={quote(value)}" for name, value in [*rest, ("cursor", str(start + size))])
            headers["Link"] = f'<{self.hub.endpoint}{self.url.path}?{asked}>; rel="next"'
        return _json(rows[start : start + size], **headers)

    def _row(self, repo: Repo, commit: Commit, *, blobs: bool) -> dict[str, Any]:
        """Everything the Hub says of a model."""
        card = {}
        if "README.md" in commit.files:
            text = (self.hub.folder / commit.files["README.md"].sha256).read_text("utf-8", "replace")
            card = _card_metadata(text) or {}
        siblings = [
            {"rfilename": path} | ({"size": file.size, "blobId": file.git_oid, "lfs": file.lfs} if blobs else {})
            for path, file in sorted(commit.files.items())
        ]
        return {
            "_id": hashlib.sha1(repo.id.encode()).hexdigest()[:24],
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.owner,
            "sha": commit.sha,
            "lastModified": commit.date,
            "createdAt": repo.created,
            "private": repo.private,
            "gated": repo.gated,
            "disabled": False,
            "downloads": repo.downloads,
            "likes": repo.likes,
            "tags": _tags(card),
            "siblings": siblings,
            **{key: card[key] for key in ("pipeline_tag", "library_name", "model-index") if key in card},
            **({"cardData": card} if card else {}),
        }

    @_route("GET", f"/api/models/{_REPO}/tree/{_REV}(/(?P<path>.+))?")
    def tree(self, repo: str, rev: str, path: str) -> _Answer:
        commit = self._commit(self._repo(repo), rev)
        prefix = f"{path.rstrip('/')}/" if path else ""
        under = [name for name in commit.files if name.startswith(prefix)]
        if path and not under:
            raise Refusal(404, f"{path} does not exist on {rev}", "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        folders = {name[: len(prefix) + at] for name in under for at, letter in enumerate(name[len(prefix) :]) if letter == "/"}
        names = [name for name in [*folders, *under] if recursive or "/" not in name[len(prefix) :]]
        return self._paged([_entry(commit, name) for name in sorted(names)])

    @_route("POST", f"/api/models/{_REPO}/paths-info/{_REV}")
    def paths_info(self, repo: str, rev: str) -> _Answer:
        commit = self._commit(self._repo(repo), rev)
        form = parse_qs(self.content.decode())
        folders = {name.rpartition("/")[0] for name in commit.files}
        return _json([_entry(commit, name) for name in form.get("paths", []) if name in commit.files or name in folders])

    @_route("GET", f"/api/models/{_REPO}/refs")
    def refs(self, repo: str) -> _Answer:
        found = self._repo(repo)
        rows = {
            kind: [{"name": name, "ref": f"refs/{path}/{name}", "targetCommit": sha} for name, sha in getattr(found, kind).items()]
            for kind, path in (("branches", "heads"), ("tags", "tags"))
        }
        return _json({**rows, "converts": [], "pullRequests": []})

    @_route("GET", f"/api/models/{_REPO}/commits/{_REV}")
    def commits(self, repo: str, rev: str) -> _Answer:
        found = self._repo(repo)
        commits = self.hub.history(repo, self._commit(found, rev).sha)
        rows = [{"id": c.sha, "title": c.title, "message": "", "date": c.date, "authors": [{"user": c.author}]} for c in commits]
        return self._paged(rows)

    @_route("GET", r"/api/collections/(?P<slug>.+)")
    def collection(self, slug: str) -> _Answer:
        if slug not in self.hub.collections:
            raise Refusal(404, "Collection not found")
        items = [{"_id": str(at), "id": repo_id, "type": "model", "position": at} for at, repo_id in enumerate(self.hub.collections[slug])]
        owner = {"name": slug.split("/")[0]}
        said = {"description": "", "theme": "green", "upvotes": 0, "position": 0, "private": False, "lastUpdated": _now()}
        return _json({"slug": slug, "title": slug, "owner": owner, "items": items, **said})


# ---- small things ------------------------------------------------------------------------------------------------------


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_large(path: str, size: int) -> bool:
    return path.endswith(LFS_NAMES) or size >= LFS_SIZE


def _find_commit(repo: Repo, revision: str) -> Commit | None:
    revision = re.sub("^refs/(heads|tags)/", "", revision)
    named = {**repo.tags, **repo.branches}.get(revision, revision)
    if named in repo.commits:
        return repo.commits[named]
    found = [sha for sha in repo.commits if len(named) >= 7 and sha.startswith(named)]
    return repo.commits[found[0]] if len(found) == 1 else None


def _entry(commit: Commit, name: str) -> dict[str, Any]:
    if name not in commit.files:
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
    file = commit.files[name]
    row: dict[str, Any] = {"type": "file", "path": name, "oid": file.git_oid, "size": file.size}
    return row | ({} if file.lfs is None else {"lfs": file.lfs})


def _expanded(row: dict[str, Any], expand: list[str]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key in ("_id", "id", *expand)} if expand else row


class _Yaml12(yaml.SafeLoader):
    """YAML as the Hub reads it: `no` is the word, only `true` and `false` are booleans."""


_Yaml12.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in rules if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")]
    for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml12.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$"), list("tf"))


def _card_metadata(text: str) -> dict[str, Any] | None:
    """The block between the dashes; None if there is none or it is no mapping."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, flags=re.DOTALL)
    try:
        read = None if match is None else yaml.load(match[1], _Yaml12)  # a SafeLoader
    except yaml.YAMLError:
        return None
    return read if isinstance(read, dict) else None


def _card_problems(text: str) -> tuple[list[str], list[str]]:
    """(errors, warnings) about a card's metadata, of the kind the Hub finds."""
    card = _card_metadata(text)
    if card is None:
        return ([] if "---" not in text else ["the metadata are no YAML mapping"]), ["empty or missing yaml metadata in repo card"]
    codes, bases, models = (_listed(card.get(field)) for field in ("language", "base_model", "model-index"))
    bad_codes = [c for c in codes if not isinstance(c, str) or not re.fullmatch("[a-z]{2,3}|code|multilingual", c) or c in WITHDRAWN]
    bad_bases = [base for base in bases if not isinstance(base, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)]
    errors = [f'"language" must only contain ISO 639-1, 639-2 or 639-3 codes, found {code!r}' for code in bad_codes]
    errors += [f'"base_model" with value {base!r} is not valid. Use a model id from the Hub.' for base in bad_bases]
    if "license" in card and not set(_listed(card["license"])) <= LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if not all(isinstance(model, dict) and "name" in model and isinstance(model.get("results"), list) for model in models):
        errors.append('"model-index" must hold a name and results')
    return errors, []


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _tags(card: dict[str, Any]) -> list[str]:
    """What filters see: the card's own tags, and the Hub's own made from its fields."""
    tags = [*_listed(card.get("tags")), *_listed(card.get("language")), *_listed(card.get("library_name"))]
    tags += _listed(card.get("pipeline_tag"))
    tags += [f"license:{value}" for value in _listed(card.get("license"))]
    tags += [f"dataset:{value}" for value in _listed(card.get("datasets"))]
    for base in _listed(card.get("base_model")):
        relation = card.get("base_model_relation")
        tags += [f"base_model:{base}"] + ([f"base_model:{relation}:{base}"] if relation else [])
    found = dict.fromkeys(str(tag) for tag in tags)
    return [*found, "region:us"]
