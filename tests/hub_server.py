"""A Hub of the tests' own on the loopback interface, with the endpoints that the real client and `datasets` ask for.

    with HubServer() as hub:  # hub.endpoint goes into HF_ENDPOINT
        hub.add("owner/name", {"config.json": b"..."})
        hub.add("datasets/owner/name", files_of(folder))
        hub.fail("GET", "model.safetensors", times=1, status=500)

Large files (.safetensors) are kept as the Hub keeps them: their ETag is their SHA-256, and they are uploaded apart from
the commit. Requests are listed in `hub.requests`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Commits (id -> path -> content), branches and tags (name -> commit)."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        digest = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[digest] = files
        self.refs[branch] = digest
        return digest


@dataclass
class Fault:
    """What goes wrong with requests whose method is `method` and whose path ends in `ending`, `times` times."""

    method: str
    ending: str
    times: int
    status: int | None = None  # answered instead
    error_code: str = ""  # X-Error-Code
    cut: int | None = None  # the body ends after so many bytes
    content: bytes | None = None  # another body of the same length
    delay: float = 0.0  # seconds before the answer


class HubServer:
    """See the module's text. `token`: what must come as a bearer token before anything is written; None: nothing."""

    def __init__(self, token: str | None = None) -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # SHA-256 -> content, uploaded
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self._lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A commit with these files; its id."""
        return self.repositories.setdefault(name, Repository()).commit(files, branch)

    def fail(self, method: str, ending: str, times: int = 1, **what: Any) -> None:
        """See `Fault`."""
        self.faults.append(Fault(method, ending, times, **what))

    def fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append(f"{method} {path}")
            for fault in self.faults:
                if fault.times and fault.method == method and path.endswith(fault.ending):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    # -- reading ----------------------------------------------------------------------------------------------------

    def _serve(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = self.server_hub.fault(self.command, path)
        if fault is not None:
            time.sleep(fault.delay)
            if fault.status is not None:
                return self._answer(fault.status, b"", {"X-Error-Code": fault.error_code})
        if path.startswith("/api/datasets/"):
            return self._describe_data(path.removeprefix("/api/"))
        name, found, rest = path.removeprefix("/").partition("/resolve/")
        repository = self.server_hub.repositories.get(name)
        if not found or repository is None:
            return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if repository.gated:
            return self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        revision, _, file = rest.partition("/")
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        content = repository.commits[commit].get(file)
        if content is None:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(file, content)}"', "Accept-Ranges": "bytes"}
        sent = content if fault is None or fault.content is None else fault.content
        status = 200
        if (wanted := self.headers.get("Range")) is not None:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last or len(content) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{min(end, len(content)) - 1}/{len(content)}"
            sent, status = sent[start:end], 206
        cut = fault.cut if fault is not None else None
        self._answer(status, sent if body else b"", headers, length=len(sent), cut=cut)

    def _describe_data(self, path: str) -> None:
        """datasets/OWNER/NAME, that at /revision/REVISION, and the list of files at /tree/REVISION/FOLDER."""
        kind, owner, name, *rest = path.split("/")
        repository = self.server_hub.repositories.get(f"{kind}/{owner}/{name}")
        if repository is None:
            return self._answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        if repository.gated:
            return self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        what, revision, *folder = rest or ["revision", "main"]
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = repository.commits[commit]
        if what == "revision":
            siblings = [{"rfilename": file} for file in sorted(files)]
            return self._json({"id": f"{owner}/{name}", "sha": commit, "siblings": siblings})
        listed = _entries(files, "/".join(folder), deep="recursive=true" in self.path.lower())
        if folder and not listed:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        self._json(listed)

    # -- writing ----------------------------------------------------------------------------------------------------

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub = self.server_hub
        fault = hub.fault("POST", path)
        if fault is not None and fault.status is not None:
            return self._answer(fault.status, b"{}", {"X-Error-Code": fault.error_code})
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._json({"error": "Invalid username or password."}, status=401)
        if path == "/api/repos/create":
            wanted = json.loads(content)
            name = f"{wanted['organization']}/{wanted['name']}"
            status = 409 if name in hub.repositories else 200
            hub.repositories.setdefault(name, Repository()).refs.setdefault("main", "0" * 40)
            hub.repositories[name].commits.setdefault("0" * 40, {})
            return self._json({"url": f"{hub.endpoint}/{name}"}, status=status)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._json(
                {"transfer": "basic", "objects": [self._upload(o) for o in json.loads(content)["objects"]]}
            )
        if path == "/lfs/verify":
            return self._json({})
        name, action, revision = self._parts(path)
        repository = hub.repositories[name]
        if action == "branch":
            repository.refs.setdefault(revision, repository.refs["main"])
            return self._json({})
        if action == "preupload":
            modes = [
                (f["path"], "lfs" if f["path"].endswith(".safetensors") else "regular")
                for f in json.loads(content)["files"]
            ]
            return self._json({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]})
        assert action == "commit", path
        files = dict(repository.commits[repository.refs[revision]])
        for line in content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files, revision)
        return self._json({"commitUrl": f"{hub.endpoint}/{name}/commit/{commit}", "commitOid": commit})

    def do_PUT(self) -> None:
        digest = self.path.rpartition("/")[2]
        content = self.rfile.read(int(self.headers["Content-Length"]))
        fault = self.server_hub.fault("PUT", self.path)
        if fault is not None and fault.status is not None:
            return self._answer(fault.status, b"", {})
        assert hashlib.sha256(content).hexdigest() == digest
        self.server_hub.large[digest] = content
        self._answer(200, b"", {})

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        digest, endpoint = wanted["oid"], self.server_hub.endpoint
        known = digest in self.server_hub.large
        actions = {"upload": {"href": f"{endpoint}/lfs/{digest}"}, "verify": {"href": f"{endpoint}/lfs/verify"}}
        return {"oid": digest, "size": wanted["size"], **({} if known else {"actions": actions})}

    @staticmethod
    def _parts(path: str) -> tuple[str, str, str]:
        """/api/models/OWNER/NAME/ACTION/REVISION"""
        _, _, _, owner, name, action, revision = path.split("/", 6)
        return f"{owner}/{name}", action, revision

    # -- answers ----------------------------------------------------------------------------------------------------

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(
        self, status: int, content: bytes, headers: dict[str, str], length: int | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            if value:
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content[:cut])
        if cut is not None and cut < len(content):
            self.close_connection = True


def _entries(files: dict[str, bytes], folder: str, deep: bool) -> list[dict[str, Any]]:
    """The files and folders below a folder, or only those in it."""
    found: dict[str, dict[str, Any]] = {}
    start = f"{folder}/" if folder else ""
    for file in sorted(name for name in files if name.startswith(start)):
        steps = file.removeprefix(start).split("/")
        for depth in range(1, len(steps)):
            if deep or depth == 1:
                parent = start + "/".join(steps[:depth])
                found[parent] = {"type": "directory", "oid": "0" * 40, "path": parent, "size": 0}
        if deep or len(steps) == 1:
            content = files[file]
            found[file] = {"type": "file", "oid": etag("", content), "path": file, "size": len(content)}
    return list(found.values())


def files_of(folder: Path) -> dict[str, bytes]:
    """The files below a folder by their paths from it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def etag(file: str, content: bytes) -> str:
    """As the Hub has them: SHA-256 of large files, git's hash of the others."""
    if file.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
