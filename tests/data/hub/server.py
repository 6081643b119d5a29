"""A Hub on loopback: it serves the data sets below a folder, as OWNER/NAME, to the real client.

`owner/gated` exists but is refused; each has one revision, `main`, whose commit is `COMMIT`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "c0ffee" * 6 + "abcd"


@contextmanager
def serve(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields the address and the requests so far: method, path, status."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            requests.append(f"{self.command} {self.path} {status}")
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, X_Error_Code=code, X_Error_Message=code)

        def do_GET(self) -> None:
            parts = unquote(urlparse(self.path).path).removeprefix("/api").strip("/").split("/")
            folder = root / "/".join(parts[1:3])
            if parts[0] != "datasets" or len(parts) < 3 or not folder.is_dir():
                return (
                    self.refuse(403, "GatedRepo")
                    if parts[1:3] == ["owner", "gated"]
                    else self.refuse(401, "RepoNotFound")
                )
            kind, revision, *rest = [*parts[3:], "main", "main"][:2] if len(parts) < 5 else parts[3:]
            path = "/".join(rest)
            if revision not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
            if kind == "resolve":
                return self.send(files[path]) if path in files else self.refuse(404, "EntryNotFound")
            if kind == "tree":
                inside = [name for name in files if not path or name.startswith(f"{path}/")]
                if path and not inside:
                    return self.refuse(404, "EntryNotFound")
                deep = "recursive=true" in self.path.lower()
                return self.send_json(self.entries(files, path, inside, deep))
            return self.send_json(
                {"id": "/".join(parts[1:3]), "sha": COMMIT, "siblings": [{"rfilename": name} for name in sorted(files)]}
            )

        @staticmethod
        def entries(files: dict[str, Path], path: str, inside: list[str], deep: bool) -> list[dict[str, object]]:
            found: dict[str, dict[str, object]] = {}
            for name in sorted(inside):
                steps = name.removeprefix(f"{path}/" if path else "").split("/")
                for depth in range(1, len(steps)):
                    if deep or depth == 1:
                        parent = "/".join([*([path] if path else []), *steps[:depth]])
                        found[parent] = {"type": "directory", "oid": "0" * 40, "path": parent, "size": 0}
                if deep or len(steps) == 1:
                    oid = hashlib.sha1(name.encode()).hexdigest()
                    found[name] = {"type": "file", "oid": oid, "path": name, "size": files[name].stat().st_size}
            return list(found.values())

        def send_json(self, value: object) -> None:
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

        def send(self, file: Path) -> None:
            content = file.read_bytes()
            headers = {"X_Repo_Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            if span := self.headers.get("Range"):
                first, _, last = span.removeprefix("bytes=").partition("-")
                part = content[int(first) : int(last or len(content)) + 1]
                span = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
                return self.answer(206, part, Content_Range=span, **headers)
            return self.answer(200, content, **headers)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
