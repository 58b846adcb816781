"""Nothing that a client of the server is told shows where its files lie or what is in them; the log has the whole."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastpeft import LoraConfig
from fastpeft.apps.serve.errors import failed, unusable
from fastpeft.config.types import NoMatchingPeftModuleError, PeftError
from fastpeft.files.checks import AdapterFileError, KeyMismatchError
from fastpeft.files.write_errors import WriteError
from fastpeft.pool import AdapterLoadError, UnknownAdapterError
from fastpeft.pool import files as pool_files
from forms import by_form
from safetensors.torch import load_file, save_file
from serve_tools import Running, make_adapter, make_tiny_model, running

SECRET = "hunter2-of-the-server"
FIRST_BYTES = str(int.from_bytes(SECRET[:8].encode(), "little"))
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("where-it-lies")
    make_tiny_model(root / "model")
    (root / "adapters").mkdir()
    make_adapter(root, "a0", 0)
    (root / "secret").write_text(SECRET * 9)
    (root / "short").write_text(SECRET[:7])
    return root


@pytest.fixture(scope="module")
def server(world: Path) -> Iterator[Running]:
    with running(world, by_request=True) as server:
        yield server


def told(world: Path, response: httpx.Response) -> str:
    """The text of an answer, in which nothing of the server's may be."""
    text = response.text + str(response.headers)
    for hidden in (str(world), world.name, str(world.resolve()), SECRET, SECRET[:7], FIRST_BYTES, "Traceback"):
        assert hidden not in text, text
    return response.text


def config(folder: Path, text: str | None = None, **changes: Any) -> None:
    content = {**json.loads((folder / CONFIG).read_text()), **changes}
    (folder / CONFIG).write_text(json.dumps(content) if text is None else text)


def header(folder: Path, content: Any, data: bytes = b"") -> None:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)


def tensors(folder: Path, **more: Any) -> None:
    save_file({**load_file(folder / WEIGHTS), **more}, folder / WEIGHTS)


def link(folder: Path, name: str, target: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


def other(folder: Path, name: str, how: Any) -> None:
    (folder / name).unlink()
    how(folder / name)


NAN = torch.tensor(float("nan"))
ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
SHAPES: dict[str, Any] = {"text": SECRET, "list": [SECRET], "dict": {SECRET: SECRET}}
# Every field of a configuration with a value of one shape, or of each.
FIELDS = {
    f"{shape} for {field}": lambda d, field=field, shape=shape: config(d, **{field: SHAPES[shape]})
    for i, field in enumerate(vars(LoraConfig()))
    for shape in by_form(short=[list(SHAPES)[i % 3]], full_form=list(SHAPES))
}
BROKEN: dict[str, Any] = {
    **FIELDS,
    "unknown field": lambda d: config(d, **{SECRET: SECRET}),
    "pattern": lambda d: config(d, target_modules=f"({SECRET}"),
    "slow pattern": lambda d: config(d, target_modules=rf"({SECRET}|.|..|\w+|[^!]+)*[!?]"),
    "key in patterns": lambda d: config(d, rank_pattern={f"({SECRET}": 2}),
    "long": lambda d: config(d, target_modules=[SECRET * 100]),
    "text": lambda d: config(d, text=SECRET),
    "open text": lambda d: config(d, text=f'{{"peft_type": "{SECRET}'),
    "twice": lambda d: config(d, text=f'{{"{SECRET}": 1, "{SECRET}": 2}}'),
    "list": lambda d: config(d, text=f'["{SECRET}"]'),
    "nan": lambda d: config(d, text=f'{{"{SECRET}": NaN}}'),
    "deep": lambda d: config(d, text=f'{{"{SECRET}": ' + "[" * 40 + "]" * 40 + "}"),
    "not utf-8": lambda d: (d / CONFIG).write_bytes(SECRET.encode() + b"\xff"),
    "linked config": lambda d: link(d, CONFIG, d.parent.parent / "secret"),
    "linked weights": lambda d: link(d, WEIGHTS, d.parent.parent / "secret"),
    "linked short": lambda d: link(d, WEIGHTS, d.parent.parent / "short"),
    "linked manifest": lambda d: link(d, "fastpeft_manifest.json", d.parent.parent / "secret"),
    "linked to nothing": lambda d: link(d, WEIGHTS, d.parent.parent / SECRET),
    "linked in a loop": lambda d: link(d, WEIGHTS, d / WEIGHTS),
    "inner link": lambda d: ((d / SECRET).write_text(SECRET), link(d, WEIGHTS, d / SECRET)),
    "no weights": lambda d: (d / WEIGHTS).unlink(),
    "pickle": lambda d: (d / WEIGHTS).rename(d / "adapter_model.bin"),
    "pipe": lambda d: other(d, WEIGHTS, os.mkfifo),
    "folder": lambda d: other(d, WEIGHTS, os.mkdir),
    "config is a folder": lambda d: other(d, CONFIG, os.mkdir),
    "raw": lambda d: (d / WEIGHTS).write_bytes(SECRET.encode() * 9),
    "cut": lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-100]),
    "cut header": lambda d: (d / WEIGHTS).write_bytes((99).to_bytes(8, "little") + SECRET.encode()),
    "header text": lambda d: header(d, SECRET.encode()),
    "header name": lambda d: header(d, {SECRET: "x"}),
    "header twice": lambda d: header(d, b'{"%b":%b,"%b":%b}' % ((SECRET.encode(), json.dumps(ENTRY).encode()) * 2)),
    "header dtype": lambda d: header(d, {SECRET: {**ENTRY, "dtype": SECRET}}, b"1234"),
    "header shape": lambda d: header(d, {SECRET: {**ENTRY, "shape": [SECRET]}}, b"1234"),
    "header gap": lambda d: header(d, {SECRET: {**ENTRY, "data_offsets": [4, 8]}}, b"12345678"),
    "header half bytes": lambda d: header(d, {SECRET: {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"0"),
    "header metadata": lambda d: header(d, {"__metadata__": {SECRET: [SECRET]}}),
    "other tensors": lambda d: save_file({SECRET: torch.zeros(1)}, d / WEIGHTS),
    "more tensors": lambda d: tensors(d, **{SECRET: torch.zeros(1)}),
    "nan tensor": lambda d: tensors(d, **{next(iter(load_file(d / WEIGHTS))): NAN}),
    "nan in it": lambda d: save_file({k: v * NAN for k, v in load_file(d / WEIGHTS).items()}, d / WEIGHTS),
    "large": lambda d: save_file({k: v.double() * 1e300 for k, v in load_file(d / WEIGHTS).items()}, d / WEIGHTS),
    "integers": lambda d: save_file({k: v.int() for k, v in load_file(d / WEIGHTS).items()}, d / WEIGHTS),
}  # fmt: skip
HARMLESS = {"linked manifest", "unknown field"}  # and fields that serving passes over


def test_answers_show_nothing_of_broken_files(server: Running, world: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One folder for each kind, asked for as the pool finds it and as a request loads it."""
    caplog.set_level(logging.WARNING)
    folders = {f"b{i}": kind for i, kind in enumerate(BROKEN)}
    for name, kind in folders.items():
        shutil.copytree(world / "adapters" / "a0", world / "adapters" / name)
        (world / "adapters" / name / "fastpeft_manifest.json").unlink()
        BROKEN[kind](world / "adapters" / name)
    try:
        assert server.pool is not None
        server.pool.rescan()
        statuses: dict[str, int] = {}
        for name, kind in folders.items():
            ways = (
                lambda n=name: server.complete(n, "hello", 1),
                lambda n=name: server.post("/v1/load_lora_adapter", lora_name=f"{n}-again", lora_path=n),
            )
            for ask in by_form(short=ways[int(name[1:]) % 2 :][:1], full_form=ways):
                response = ask()
                text = told(world, response)
                statuses[kind] = response.status_code
                if response.status_code != 200:
                    assert response.status_code == 422, (kind, text)
                    assert f"adapter '{name}" in text
                    assert "cannot be used: " in text
                    assert "log of the server" not in text, kind  # every kind has its own words
        served = {kind for kind, status in statuses.items() if status == 200}
        assert HARMLESS <= served <= HARMLESS | FIELDS.keys()
        assert len(FIELDS.keys() - served) > len(FIELDS) / 2
        for path in ("/v1/models", "/v1/models/b0", "/health", "/metrics", "/v1/models/nothing", "/nothing"):
            told(world, server.client.get(path))
        assert {entry["root"] for entry in server.client.get("/v1/models").json()["data"]} == {"base"}
        whole = caplog.text
        assert SECRET in whole
        assert str(world / "adapters" / f"b{list(BROKEN).index('open text')}" / CONFIG) in whole
    finally:
        for name in folders:
            shutil.rmtree(world / "adapters" / name)
        server.pool.rescan()


def every_error(world: Path) -> list[BaseException]:
    text = f"{world}/{SECRET}: {SECRET}"
    plain = (ValueError, RuntimeError, TypeError, NotImplementedError, KeyError, PeftError, NoMatchingPeftModuleError,
             AdapterFileError, KeyMismatchError, MemoryError, RecursionError, AssertionError, UnicodeError, EOFError,
             torch.OutOfMemoryError)  # fmt: skip
    codes = (errno.EACCES, errno.EMFILE, errno.EIO, errno.ENOENT)
    systems = [OSError(code, text, f"{world}/{SECRET}") for code in codes]
    return [*(kind(text) for kind in plain), *systems, OSError(text), WriteError(errno.ENOSPC, text, text)]


def test_answers_show_nothing_of_any_error(server: Running, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an adapter's load or a forward raises."""
    for i, error in enumerate(every_error(world)):
        name = f"e{i}"
        shutil.copytree(world / "adapters" / "a0", world / "adapters" / name)

        def raises(*_: Any, error: BaseException = error) -> Any:
            raise error

        try:
            with monkeypatch.context() as patch:
                patch.setattr(pool_files, "open_adapter", raises)
                response = server.complete(name, "hello", 1)
            assert response.status_code == 422, (error, response.text)
            told(world, response)
        finally:
            shutil.rmtree(world / "adapters" / name)
    for error in (AdapterLoadError("x", SECRET), UnknownAdapterError("x", SECRET)):
        assert SECRET not in json.dumps(unusable(error).body())
    for error in every_error(world):
        assert SECRET not in json.dumps(failed("the engine failed", error, "engine_error").body())


def test_paths_of_a_request_are_quoted_and_those_of_the_server_are_not(server: Running, world: Path) -> None:
    (world / "adapters" / "loop").symlink_to("loop")
    try:
        for name, path in (
            ("a0", "a0"), ("x", "nothing"), ("x", ".."), ("x", "loop"), ("x", "loop/y"), ("x", "x" * 5000), ("x", "\0"),
            ("x/y", "a0"), ("base", "a0"), ("x", "a0/adapter_config.json"),
        ):  # fmt: skip
            response = server.post("/v1/load_lora_adapter", lora_name=name, lora_path=path)
            assert response.status_code in (400, 404, 422), response.text
            told(world, response)
    finally:
        (world / "adapters" / "loop").unlink()


def test_a_failed_forward_shows_nothing(server: Running, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{world}/{SECRET}")

    with monkeypatch.context() as patch:
        patch.setattr(server.engine.model.model.layers[0], "forward", fails)
        response = server.complete("a0", "hello", 2)
    assert response.status_code >= 500
    told(world, response)
