"""A small Hub for tests: models only, in memory, on loopback, spoken to by the real clients.

Xet is not served, so the client must upload by LFS. It reads HF_HUB_DISABLE_XET when it is first
imported: tests/conftest.py sets it, and `HubStandIn.environment` holds it and the rest for a
subprocess. In one process pass ``endpoint=hub.url``, ``token=`` and ``cache_dir=``.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from socketserver import TCPServer
from typing import Any, NamedTuple, Self, cast
from urllib.parse import parse_qs, unquote, urlsplit

MAX_BODY_BYTES = 512 * 1024**2
LFS_SUFFIXES = (".safetensors", ".bin", ".h5", ".onnx")
USER = "tester"  # owns a repository whose name has no namespace
HIDDEN = "<hidden>"  # stands in `Request.headers` for a secret

Json = dict[str, Any]


class Request(NamedTuple):
    """A request as it arrived: path quoted and with its query, names of headers in lower case."""

    method: str
    path: str
    headers: dict[str, str]


class Commit(NamedTuple):
    """One commit with all files of the repository, not only those it changed."""

    oid: str
    title: str
    files: dict[str, bytes]


class _Call(NamedTuple):
    """A request that found its route; parts of the path that the route does not have are empty."""

    request: Request
    query: dict[str, str]
    body: bytes
    repo: str = ""
    rev: str = ""
    path: str = ""


class _Reply(NamedTuple):
    status: int = 200
    body: bytes = b""
    headers: Json = {}  # noqa: RUF012 - never changed


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = "", commit: str = "") -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        body = json.dumps({"error": message}).encode()
        self.reply = _Reply(status, body, {name: v for name, v in headers.items() if v})


def _json(data: Any, status: int = 200) -> _Reply:
    return _Reply(status, json.dumps(data).encode(), {"Content-Type": "application/json"})


def _is_lfs(path: str, size: int) -> bool:
    return size > 0 and path.endswith(LFS_SUFFIXES)  # the client never sends empty files by LFS


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _entry(path: str, data: bytes) -> Json:
    """A file under the names that the tree and the model info have for its properties."""
    entry: Json = {"type": "file", "path": path, "rfilename": path, "size": len(data)}
    blob = data
    if _is_lfs(path, len(data)):
        sha256 = _sha256(data)
        blob = f"oid sha256:{sha256}\nsize {len(data)}\n".encode()  # what git itself would hold
        sizes = {"size": len(data), "pointerSize": len(blob)}
        entry["lfs"] = {"oid": sha256, "sha256": sha256} | sizes
    oid = _sha1(b"blob %d\0%b" % (len(blob), blob))
    return entry | {"oid": oid, "blobId": oid}


class HubStandIn:
    """The server, which listens on 127.0.0.1 within a ``with``, and what it holds, then and later.

    Attributes:
        url: What a client calls its endpoint.
        requests: Every request in the order of arrival, refused ones too.
        repos: The commits of each repository, oldest first; the first is empty, as on creation.
    """

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[Request] = []
        self.repos: dict[str, list[Commit]] = {}
        self._large: dict[tuple[str, str], bytes] = {}  # (repo id, sha256) -> content
        self._faults: list[tuple[str, str, int, bool]] = []  # the arguments of `fail_next`
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()  # waits for the threads of open requests

    def files(self, repo_id: str) -> dict[str, bytes]:
        """Files of the head commit; ``KeyError`` if there is no such repository."""
        return dict(self.repos[repo_id][-1].files)

    def commits(self, repo_id: str) -> list[str]:
        """Titles of the commits, oldest first."""
        return [commit.title for commit in self.repos[repo_id]]

    def fail_next(
        self, method: str, path_prefix: str, status: int, times: int = 1, *, after: bool = False
    ) -> None:
        """Answer the next ``times`` requests of this method and path with ``status``.

        ``after`` carries them out first, so that only the reply is lost. The client itself retries
        408, 429 and 5xx of most requests (never of a commit), and pauses a second or more.
        """
        with self._lock:
            self._faults += [(method, path_prefix, status, after)] * times

    def environment(self, home: Path, token: str = "hf_standin") -> dict[str, str]:
        """Variables that make a subprocess use this Hub, with its caches in ``home``."""
        places = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}
        on = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")
        switches = dict.fromkeys(on, "1") | {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
        return places | switches | {"HF_TOKEN": token, "NO_PROXY": "127.0.0.1"}

    def _answer(self, request: Request, body: bytes) -> _Reply:
        with self._lock:
            for method, prefix, status, after in self._faults:
                if method == request.method and request.path.startswith(prefix):
                    self._faults.remove((method, prefix, status, after))
                    if after:
                        self._route(request, body)
                    raise _Refusal(status, "A fault injected by the test.")
            return self._route(request, body)

    def _route(self, request: Request, body: bytes) -> _Reply:
        url = urlsplit(request.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        for methods, pattern, public, action in _ROUTES:
            if request.method in methods and (match := re.fullmatch(pattern, url.path)):
                if not public and "authorization" not in request.headers:
                    raise _Refusal(401, "Invalid username or password.")
                parts = {name: unquote(part) for name, part in match.groupdict("").items()}
                return action(self, _Call(request, query, body, **parts))
        raise _Refusal(404, f"The stand-in does not serve {request.method} {url.path}.")

    def _at(self, repo: str, revision: str) -> Commit:
        if repo not in self.repos:
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        if revision in ("main", ""):
            return self.repos[repo][-1]
        for commit in self.repos[repo]:
            if commit.oid == revision:
                return commit
        raise _Refusal(404, f"Invalid rev id: {revision!a}", "RevisionNotFound")

    def _append(self, repo: str, title: str, files: dict[str, bytes]) -> str:
        history = self.repos.setdefault(repo, [])
        entries = [_entry(path, files[path]) for path in sorted(files)]
        oid = _sha1(json.dumps([repo, title, len(history), entries]).encode())
        history.append(Commit(oid, title, files))
        return oid

    def _whoami(self, call: _Call) -> _Reply:
        auth = {"type": "access_token", "accessToken": {"displayName": USER, "role": "write"}}
        return _json({"type": "user", "id": "0", "name": USER, "orgs": [], "auth": auth})

    def _create(self, call: _Call) -> _Reply:
        wanted = json.loads(call.body)
        if wanted.get("type", "model") != "model":
            raise _Refusal(400, "The stand-in holds models only.")
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if repo in self.repos:
            url = f"{self.url}/{repo}"
            return _json({"error": "You already created this model repo", "url": url}, 409)
        self._append(repo, "initial commit", {})
        return _json({"url": f"{self.url}/{repo}"})

    def _info(self, call: _Call) -> _Reply:
        commit = self._at(call.repo, call.rev)
        siblings = [_entry(path, data) for path, data in sorted(commit.files.items())]
        if "blobs" not in call.query:
            siblings = [{"rfilename": sibling["rfilename"]} for sibling in siblings]
        return _json({"id": call.repo, "sha": commit.oid, "siblings": siblings, "private": False})

    def _tree(self, call: _Call) -> _Reply:
        commit, entries = self._at(call.repo, call.rev), list[Json]()
        folder = PurePosixPath(call.path)
        inside = [path for path in sorted(commit.files) if folder in PurePosixPath(path).parents]
        if call.path and not inside:
            raise _Refusal(404, "Entry not found", "EntryNotFound", commit.oid)
        folders = {parent for path in inside for parent in PurePosixPath(path).parents}
        for name in sorted(str(one) for one in folders if folder in one.parents):
            oid = _sha1(name.encode())
            entries.append({"type": "directory", "path": name, "size": 0, "oid": oid})
        entries += [_entry(path, commit.files[path]) for path in inside]
        if call.query.get("recursive", "").lower() not in ("true", "1"):
            entries = [one for one in entries if PurePosixPath(one["path"]).parent == folder]
        return _json(entries)

    def _preupload(self, call: _Call) -> _Reply:
        files, answers = self._at(call.repo, call.rev).files, list[Json]()
        for wanted in json.loads(call.body)["files"]:
            path = wanted["path"]
            mode = "lfs" if _is_lfs(path, wanted["size"]) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            if path in files:
                entry = _entry(path, files[path])
                answers[-1]["oid"] = entry.get("lfs", entry)["oid"]
        return _json({"files": answers})

    def _lfs_batch(self, call: _Call) -> _Reply:
        self._at(call.repo, "main")
        store = f"{self.url}/{call.repo}.git/info/lfs"
        objects: list[Json] = json.loads(call.body)["objects"]
        for item in objects:
            if (call.repo, item["oid"]) not in self._large:
                upload, verify = {"href": f"{store}/{item['oid']}"}, {"href": f"{store}/verify"}
                item["actions"] = {"upload": upload, "verify": verify}
        return _json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, call: _Call) -> _Reply:
        if _sha256(call.body) != call.path:
            raise _Refusal(400, f"The content sent for {call.path} has another sha256.")
        self._large[call.repo, call.path] = call.body
        return _Reply()

    def _lfs_verify(self, call: _Call) -> _Reply:
        wanted = json.loads(call.body)
        if len(self._large.get((call.repo, wanted["oid"]), b"")) != wanted["size"]:
            raise _Refusal(404, f"There is no {wanted['oid']} of {wanted['size']} bytes.")
        return _Reply()

    def _commit(self, call: _Call) -> _Reply:
        head = self._at(call.repo, "main")
        if call.rev != "main" or "create_pr" in call.query:
            raise _Refusal(501, "The stand-in commits to main only and has no pull requests.")
        header, *changes = [json.loads(line) for line in call.body.splitlines()]
        if not head.oid.startswith(header["value"].get("parentCommit", "")):
            raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for change in changes:
            self._change(call.repo, files, change["key"], change["value"])
        oid = self._append(call.repo, header["value"]["summary"], files)
        return _json({"commitOid": oid, "commitUrl": f"{self.url}/{call.repo}/commit/{oid}"})

    def _change(self, repo: str, files: dict[str, bytes], key: str, value: Json) -> None:
        path = value["path"]
        if key == "file":
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile" and (repo, value["oid"]) in self._large:
            files[path] = self._large[repo, value["oid"]]
        elif key in ("deletedFile", "deletedFolder"):
            inside = path.rstrip("/") + "/" if key == "deletedFolder" else None
            doomed = [f for f in files if (f.startswith(inside) if inside else f == path)]
            if not doomed:
                raise _Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in doomed:
                del files[name]
        else:
            raise _Refusal(400, f"{key} of {path!a} is unknown or was not uploaded before.")

    def _resolve(self, call: _Call) -> _Reply:
        commit = self._at(call.repo, call.rev)
        if call.path not in commit.files:
            raise _Refusal(404, "Entry not found", "EntryNotFound", commit.oid)
        data = commit.files[call.path]
        entry = _entry(call.path, data)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{entry["oid"]}"'}
        if lfs := entry.get("lfs"):
            headers |= {"X-Linked-Etag": f'"{lfs["oid"]}"', "X-Linked-Size": str(lfs["size"])}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", call.request.headers.get("range", ""))
        if match is None or call.request.method == "HEAD":
            return _Reply(200, data, headers | {"Accept-Ranges": "bytes"})
        part = data[int(match[1]) : int(match[2] or len(data)) + 1]
        if not part:
            return _Reply(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
        span = f"bytes {match[1]}-{int(match[1]) + len(part) - 1}/{len(data)}"
        return _Reply(206, part, headers | {"Content-Range": span})


def _always(data: Json) -> Callable[[HubStandIn, _Call], _Reply]:
    return lambda hub, call: _json(data)


_REPO, _REV, _PATH = r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)", "(?P<rev>[^/]+)", "(?P<path>.+)"
_MODEL, _LFS = f"/api/models/{_REPO}", rf"/{_REPO}\.git/info/lfs"
# Methods, path, whether it needs no token, and what answers.
_ROUTES: list[tuple[str, str, bool, Callable[[HubStandIn, _Call], _Reply]]] = [
    ("GET", "/api/agent-harnesses", True, _always({"standardEnvVars": [], "harnesses": {}})),
    ("GET", "/api/whoami-v2", False, HubStandIn._whoami),
    ("POST", "/api/repos/create", False, HubStandIn._create),
    ("POST", "/api/validate-yaml", True, _always({"errors": [], "warnings": []})),
    ("GET", f"{_MODEL}(?:/revision/{_REV})?", True, HubStandIn._info),
    ("GET", f"{_MODEL}/tree/{_REV}(?:/{_PATH})?", True, HubStandIn._tree),
    ("POST", f"{_MODEL}/preupload/{_REV}", False, HubStandIn._preupload),
    ("POST", f"{_MODEL}/commit/{_REV}", False, HubStandIn._commit),
    ("POST", f"{_LFS}/objects/batch", False, HubStandIn._lfs_batch),
    ("PUT", f"{_LFS}/(?P<path>[0-9a-f]{{64}})", True, HubStandIn._lfs_put),
    ("POST", f"{_LFS}/verify", False, HubStandIn._lfs_verify),
    ("GET HEAD", f"/{_REPO}/resolve/{_REV}/{_PATH}", True, HubStandIn._resolve),
]


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close waits for them
    request_queue_size = 64  # the default of 5 makes parallel downloads wait for a second

    def __init__(self, hub: HubStandIn) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own asks the resolver for the host's name
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10  # seconds of silence, so that no stalled client keeps its thread alive

    def _serve(self) -> None:
        hub = cast(_Server, self.server).hub
        headers = {name.lower(): value for name, value in self.headers.items()}
        headers |= {name: HIDDEN for name in ("authorization", "cookie") if name in headers}
        request = Request(self.command, self.path, headers)
        hub.requests.append(request)
        try:
            reply = hub._answer(request, self._read_body())
        except _Refusal as refusal:
            reply = refusal.reply
        self.send_response(reply.status)
        length = {"Content-Length": len(reply.body), "Connection": "close"}
        for name, value in (reply.headers | length).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _read_body(self) -> bytes:
        if "Transfer-Encoding" in self.headers:
            raise _Refusal(411, "The stand-in needs a Content-Length.")
        size = int(self.headers.get("Content-Length", 0))
        if not 0 <= size <= MAX_BODY_BYTES:
            raise _Refusal(413, f"The stand-in takes at most {MAX_BODY_BYTES} bytes.")
        return self.rfile.read(size)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the output of tests quiet: `HubStandIn.requests` is the log."""
