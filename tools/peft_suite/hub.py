"""A plugin of pytest, `-p hub`: the Hub's addresses are answered from a folder of tiny random models (models.py).

huggingface_hub lets a process exchange its HTTP client. Ours answers the three addresses that the tests use (a file, a
repository's description, the list of its files), so that revisions, caches and offline modes are the true ones. Nothing
is downloaded; models are made when they are first asked for. `datasets.load_dataset` knows the four sets of the tests.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

STORE = Path(os.environ["PEFT_SUITE_HUB"])
# Read when huggingface_hub is imported.
os.environ["HF_HOME"] = str(STORE / "cache")
os.environ["HF_HUB_DISABLE_XET"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ.pop(name, None)

import models  # noqa: E402 (after the environment is set)

_REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
_FILE = re.compile(rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_INFO = re.compile(r"/api/models/(?P<repo>.+?)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+)(?:/.*)?)?")


def folder_of(repo: str, revision: str = "main") -> Path:
    """The folder of a repository's revision, which is made where it is not there yet."""
    folder = STORE / repo.replace("/", "--") / revision
    done = folder.with_name(f"{revision}.done")
    if done.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{revision}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers ask at once
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            models.make(repo, revision, folder)
            done.touch()
    return folder


def _commit(repo: str, revision: str) -> str:
    return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()


@functools.cache  # files of a folder that is done stay
def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _httpx() -> Any:
    """The HTTP library that huggingface_hub uses."""
    from huggingface_hub.utils import _http

    return getattr(_http, "httpx2", None) or _http.httpx


def answer(request: Any) -> Any:
    """The Hub's response to a request of huggingface_hub."""

    def respond(status: int, headers: dict[str, str] | None = None, **content: Any) -> Any:
        return _httpx().Response(status, headers=headers, **content)

    path = urllib.parse.unquote(request.url.path)
    match = _FILE.fullmatch(path) or _INFO.fullmatch(path)
    repo = "" if match is None else match["repo"]
    revisions = models.revisions(repo)
    if match is None or not revisions:
        return respond(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository Not Found"}, json={})
    asked = match["revision"] or "main"
    revision = next((r for r in revisions if asked in (r, _commit(repo, r))), None)
    if revision is None:
        return respond(404, {"X-Error-Code": "RevisionNotFound"}, json={"error": "Invalid rev id"})
    folder, commit = folder_of(repo, revision), _commit(repo, revision)
    if match.re is _FILE:
        if not (file := folder / match["file"]).is_file():
            return respond(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, json={})
        headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if request.method == "HEAD":
            return respond(200, headers | {"Content-Length": str(file.stat().st_size)})
        return respond(200, headers, content=file.read_bytes())
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    if match["what"] == "tree":
        sizes = {name: file.stat().st_size for name, file in files.items()}
        return respond(200, json=[
            {"type": "file", "path": name, "size": size, "oid": _etag(files[name])} for name, size in sizes.items()
        ])  # fmt: skip
    return respond(200, json={
        "_id": commit, "id": repo, "modelId": repo, "sha": commit, "private": False, "tags": [], "downloads": 0,
        "likes": 0, "siblings": [{"rfilename": name} for name in files],
    })  # fmt: skip


def _quotes(datasets: Any) -> Any:
    said = "the quick brown fox jumps over"
    rows = {
        "quote": [f"“Quote number {i} : {said} {i * 7} lazy dogs.”" for i in range(64)],
        "author": [f"Author {i % 9}" for i in range(64)], "tags": [["a", "b"]] * 64,
    }  # fmt: skip
    return datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)})


def _iris(datasets: Any) -> Any:
    from sklearn.datasets import load_iris

    iris, names = load_iris(), ["SepalLengthCm", "SepalWidthCm", "PetalLengthCm", "PetalWidthCm"]
    rows = {"Id": list(range(1, 151)), **dict(zip(names, iris.data.T.tolist(), strict=True))}
    rows["Species"] = [str(iris.target_names[t]) for t in iris.target]
    return datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)})


def _glue(datasets: Any) -> Any:
    films = [f"this film is number {i}" for i in range(200)]
    rows = {"sentence": films, "label": [i % 2 for i in range(200)], "idx": list(range(200))}
    return datasets.DatasetDict({part: datasets.Dataset.from_dict(rows) for part in ("train", "validation", "test")})


def _cats(datasets: Any) -> Any:
    import numpy as np
    from PIL import Image

    pixels = np.random.RandomState(0).randint(0, 255, (480, 640, 3), dtype=np.uint8)
    return {"test": {"image": [Image.fromarray(pixels)]}}


SETS: dict[str, Callable[[Any], Any]] = {
    "ybelkada/english_quotes_copy": _quotes, "Abirate/english_quotes": _quotes, "scikit-learn/iris": _iris,
    "nyu-mll/glue": _glue, "huggingface/cats-image": _cats,
}  # fmt: skip


def install() -> None:
    import datasets
    import huggingface_hub
    from huggingface_hub.utils import _http

    def client() -> Any:
        transport, hooks = _httpx().MockTransport(answer), {"request": [_http.hf_request_event_hook]}
        return _httpx().Client(transport=transport, event_hooks=hooks, follow_redirects=True)

    huggingface_hub.set_client_factory(client)
    given = datasets.load_dataset

    def load_dataset(path: str, *args: Any, split: str | None = None, **kwargs: Any) -> Any:
        if path not in SETS:
            return given(path, *args, split=split, **kwargs)
        found = SETS[path](datasets)
        return found[split] if split else found

    datasets.load_dataset = datasets.load.load_dataset = load_dataset


install()
