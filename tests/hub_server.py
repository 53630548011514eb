"""A model hub on loopback: the few addresses that huggingface_hub asks for when it downloads a snapshot or uploads files."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "1234567890abcdef1234567890abcdef12345678"


@dataclass
class Hub:
    """What the hub has, and what was done to it."""

    url: str
    folders: dict[str, Path] = field(default_factory=dict)
    """Repository -> the files of its one commit, which branch main and tag v1 mean."""
    gated: set[str] = field(default_factory=set)
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    """What was uploaded, by repository/path."""
    num_requests: int = 0


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        found: Hub = self.server.hub  # type: ignore[attr-defined]
        found.num_requests += 1
        return found

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, parts = self.hub, unquote(urlsplit(self.path).path).strip("/").split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        verb = next((part for part in ("resolve", "revision", "tree") if part in parts[2:]), None)
        revision = parts[parts.index(verb, 2) + 1] if verb else "main"
        if repo in hub.gated:
            self.refuse(403, "GatedRepo")
        elif repo not in hub.folders:
            self.refuse(401, "RepoNotFound")
        elif revision not in ("main", "v1", COMMIT):
            self.refuse(404, "RevisionNotFound")
        elif parts[0] == "api":
            files = sorted(path for path in hub.folders[repo].iterdir() if path.is_file())
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": COMMIT} for f in files]
            info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
            self.answer(json.dumps(tree if verb == "tree" else info).encode())
        else:
            self.answer((hub.folders[repo] / parts[-1]).read_bytes())

    def do_POST(self) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_good":
            self.refuse(401, "")
        elif path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self.answer(
                json.dumps(
                    {"url": f"{hub.url}/{'/'.join(json.loads(body)[key] for key in ('organization', 'name'))}"}
                ).encode()
            )
        elif path == "/api/validate-yaml":
            self.answer(b'{"errors": [], "warnings": []}')
        elif "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer(json.dumps({"files": files}).encode())
        elif "/commit/" in path:
            repo = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    hub.files[f"{repo}/{entry['value']['path']}"] = base64.b64decode(entry["value"]["content"])
            answer = {"success": True, "commitOid": COMMIT, "commitUrl": f"{hub.url}/{repo}/commit/{COMMIT}"}
            self.answer(json.dumps(answer).encode())
        else:
            self.refuse(404, "EntryNotFound")

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
