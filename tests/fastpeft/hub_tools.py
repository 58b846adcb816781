"""A Hugging Face Hub on this machine: the routes by which files are read, and commits written."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


class Hub:
    """Repositories as `files[repo][revision][path]`, and what was asked for: (method, path, token)."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.commits: list[dict[str, Any]] = []
        self.created: list[dict[str, Any]] = []
        self.url = ""

    def put(self, repo: str, folder: Path, revision: str = "main", subfolder: str = "") -> None:
        there = self.files.setdefault(repo, {}).setdefault(revision, {})
        for path in folder.rglob("*"):
            if path.is_file():
                there[f"{subfolder}/{path.relative_to(folder)}".lstrip("/")] = path.read_bytes()

    def tokens(self) -> set[str | None]:
        return {token for _, _, token in self.asked}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def noted(self) -> str:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization")
        self.hub.asked.append((self.command, path, token and token.removeprefix("Bearer ")))
        return path

    def do_GET(self) -> None:
        if self.path.startswith("/api/"):  # what huggingface_hub asks for itself
            return self.answer(404)
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.noted())
        repo = self.hub.files.get(match[1]) if match else None
        if match is None or repo is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if (files := repo.get(match[2])) is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if (body := files.get(match[3])) is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        commit = hashlib.sha1(match[2].encode()).hexdigest()
        return self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=commit)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path, body = self.noted(), self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            self.hub.created.append(content := json.loads(body))
            repo = f"{content.get('organization') or 'me'}/{content['name']}"
            self.hub.files.setdefault(repo, {"main": {}})
            return self.json({"url": f"{self.hub.url}/{repo}"})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path)
        assert match is not None, path
        repo, what, revision = match.groups()
        if what == "branch":
            self.hub.files[repo].setdefault(revision, dict(self.hub.files[repo]["main"]))
            return self.json({})
        if what == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self.json({"files": [{"path": name, **plain} for name in names]})
        lines = [json.loads(line) for line in body.decode().splitlines()]
        files = {v["path"]: base64.b64decode(v["content"]) for v in (x["value"] for x in lines if x["key"] == "file")}
        self.hub.files[repo][revision].update(files)
        head = next(line["value"] for line in lines if line["key"] == "header")
        self.hub.commits.append({"repo": repo, "revision": revision, "files": sorted(files), **head})
        oid = hashlib.sha1(body).hexdigest()
        return self.json({"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None})


@contextmanager
def local_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that huggingface_hub talks to in place of the real one, with an empty cache."""
    from huggingface_hub import constants, hf_api

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
