"""A small Hugging Face Hub on this machine: what ``huggingface_hub`` asks of the real one to upload and fetch files.

Repositories live in memory. Large files (safetensors) take the way of Git LFS, small ones travel inside the commit, as
on the Hub: https://huggingface.co/docs/hub/api
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest

SHA = "c0ffee" + "0" * 34
"""The name of every revision."""
KINDS = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}


class HubServer:
    """The server as a context manager; ``url`` is its ``HF_ENDPOINT``."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        """Files by path, by repository: ``owner/name`` for models, ``datasets/owner/name`` and so on for others."""
        self.visibility: dict[str, str] = {}
        self.token = "hf_secret"
        """Requests with another token are refused."""
        self.refused: list[str] = []
        """Requests that had another token or none."""
        self.unwanted: str | None = None
        """Files of this name are refused, as when a quota is used up."""
        self.hold: Callable[[], bool] = lambda: True
        """Commits wait until this is true, at most 60 seconds."""
        self.commits: list[list[str]] = []
        """The paths of each commit, in order of arrival."""
        self.at_once = self.most_at_once = 0
        """Commits that are under way now, and the most there were."""
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Status, content (bytes, or something to be JSON) and headers for a request."""
        if path.startswith("/objects/"):  # the storage behind LFS, whose addresses are signed instead
            self._objects[path.removeprefix("/objects/")] = body
            return 200, b"", {}
        if path == "/api/agent-harnesses":  # a question of the client about itself
            return 404, {}, {}
        if token != f"Bearer {self.token}":
            self.refused.append(path)
            return 401, {"error": "Invalid credentials"}, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/(\w+)/([^/]+)", path):
            return self._api(match[3], KINDS[match[1]] + match[2], body)
        if match := re.fullmatch(r"/((?:datasets/|spaces/)?[^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        if match := re.fullmatch(r"/((?:datasets/|spaces/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._resolve(match[1], match[2], method)
        return 404, {"error": f"{method} {path}"}, {}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        kind = asked.get("type") or "model"
        name = KINDS[f"{kind}s"] + f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            return 409, {"error": "You already created this repository", "url": f"{self.url}/{name}"}, {}
        if kind == "space" and not asked.get("sdk"):
            return 400, {"error": "a space needs an sdk"}, {}
        self.repositories[name] = {}
        self.visibility[name] = asked.get("visibility", "private" if asked.get("private") else "public")
        return 200, {"url": f"{self.url}/{name}"}, {}

    def _api(self, call: str, name: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        files = self.repositories[name]
        if call == "preupload":
            paths = [entry["path"] for entry in json.loads(body)["files"]]
            if any(path.split("/")[-1] == self.unwanted for path in paths):
                return 403, {"error": "storage limit reached"}, {}
            modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in paths]
            entries = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in zip(paths, modes)]
            return 200, {"files": entries}, {}
        if call == "commit":
            return self._commit(name, body)
        if call == "revision":
            siblings = [{"rfilename": path} for path in files]
            return 200, {"id": name, "modelId": name, "sha": SHA, "siblings": siblings, "tags": [], "private": True}, {}
        if call == "tree":
            described = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
            return 200, described, {}
        return 404, {"error": call}, {}

    def _commit(self, name: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        with self._lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        end = time.monotonic() + 60
        while not self.hold() and time.monotonic() < end:
            time.sleep(0.02)
        paths = []
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.repositories[name][value["path"]] = self._objects[value["oid"]]
            else:
                continue
            paths.append(value["path"])
        with self._lock:
            self.commits.append(sorted(paths))
            self.at_once -= 1
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{SHA}", "commitOid": SHA}, {}

    def _batch(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.url}/objects/{entry['oid']}"}}}
            for entry in asked["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _resolve(self, name: str, path: str, method: str) -> tuple[int, Any, dict[str, str]]:
        data = self.repositories.get(name, {}).get(path)
        if data is None:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": SHA}
        return 200, data, headers


ADDRESSES_ARE_READ = """
import importlib, huggingface_hub.constants
importlib.reload(huggingface_hub.constants)
"""
"""What a program begins with whose process may have imported huggingface_hub before it knew where the hub is."""


def use_for_programs(hub: HubServer, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Let programs that are started from here take ``hub`` for the real one, with their cache in ``home``.

    Its address is read when huggingface_hub is imported, so that it makes no difference here.
    """
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlparse(self.path).path)
            status, content, headers = hub.answer(self.command, path, self.headers.get("Authorization", ""), body)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = do_PUT = _serve

        def log_message(self, *arguments: object) -> None:
            """Quiet."""

    return Handler
