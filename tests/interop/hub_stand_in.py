"""A local stand-in for the Hugging Face Hub: repositories in memory, filled over HTTP as huggingface_hub does it.

Large files come by the Git LFS protocol; the stand-in does not speak Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_stand_in"


@dataclass
class Repository:
    """Files by path."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Hub:
    """What the server holds, and how it answers."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    refused: str | None = None
    """The last part of an address that is answered with 403."""

    def handle(self, method: str, path: str, body: bytes, authorization: str | None) -> tuple[int, Any]:
        """Status and JSON of a request."""
        if path.startswith("/blob/"):
            self.blobs[path.rpartition("/")[2]] = body
            return 200, {}
        if authorization != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        if self.refused is not None and path.endswith(self.refused):
            return 403, {"error": "Forbidden"}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.repositories[name] = Repository(asked.get("private") or asked.get("visibility") == "private")
            return 200, {"url": f"{self.url}/{name}"}
        if path == "/api/repos/delete":
            asked = json.loads(body)
            del self.repositories[f"{asked['organization']}/{asked['name']}"]
            return 200, {}
        if path.endswith("/objects/batch"):
            return 200, {"objects": [self._lfs_action(each) for each in json.loads(body)["objects"]]}
        name = "/".join(path.split("/")[3:5])
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return 200, {"files": [{**self._mode(each["path"]), "path": each["path"]} for each in files]}
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            self._commit(self.repositories[name], lines)
            oid = hashlib.sha1(body, usedforsecurity=False).hexdigest()
            return 200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid, "success": True}
        return 200, {"id": name, "sha": "0" * 40, "siblings": [], "private": self.repositories[name].private}

    def _mode(self, path: str) -> dict[str, Any]:
        is_large = path.endswith((".safetensors", ".gguf", ".onnx"))
        return {"uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": None}

    def _lfs_action(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {**asked, "actions": {"upload": {"href": f"{self.url}/blob/{asked['oid']}", "header": {}}}}

    def _commit(self, repository: Repository, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.blobs[value["oid"]]


@contextmanager
def hub() -> Iterator[Hub]:
    """A server on a free port of this machine."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            status, content = state.handle(self.command, path, body, self.headers.get("Authorization"))
            answer = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer)

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _answer  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
