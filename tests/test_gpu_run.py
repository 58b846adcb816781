"""The GPU run without a GPU: a fake device, and what goes wrong on machines that have one, planted.

Of the whole run the short form has the part `example` and one file of tests, the full form all parts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forms import matrix

from bench.gpu import files, plan, run, verdicts
from bench.gpu.faults import Faults
from bench.gpu.parts import tests as part_tests
from bench.gpu.verdicts import Verdicts

ROOT = Path(__file__).resolve().parent.parent
TOOL = [sys.executable, str(ROOT / "tools" / "gpu_run.py")]
ROW = "forward 64x64 M={} f32"
FAULTS = ",".join((
    "limit=0.4", "crash=example/M=4", "hang=example/M=16", "oom=example/M=64", "sticky=example/M=128",
    "crash=example/M=512 f32 with native",
))  # fmt: skip
WHY = {
    4: "the process was ended by SIGSEGV", 16: "did not finish in 0.4 s",
    64: "out of memory: OutOfMemoryError: CUDA out of memory (planted)",
    128: "the device was lost: RuntimeError: CUDA error: an illegal memory access was encountered (planted)",
}  # fmt: skip


def start(out: Path, *options: str, faults: str = FAULTS, parts: tuple[str, ...] = ("example",)) -> Any:
    command = [*TOOL, "--out", str(out), "--fake", faults, *(("--parts", *parts) if parts else ()), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(out: Path, *options: str, **more: Any) -> tuple[int, str]:
    process = start(out, *options, **more)
    text, _ = process.communicate(timeout=600)
    return process.returncode, text


def answer(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "sheet.json").read_text())
    return found


def killed_while_it_runs(out: Path, after: int, **more: Any) -> bool:
    """Start or resume a run and kill it when the folder has `after` lines. False where it ended before."""
    process = start(out, "--resume", **more)
    while process.poll() is None:
        if sum(len(list(files.lines(p))) for p in out.glob("*.jsonl")) >= after:
            process.kill()
            break
        time.sleep(0.002)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def read(path: Path) -> bytes:
    """A file of a process, which may have ended."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """A run with a fault of each sort, from its beginning to its end."""
    out = tmp_path_factory.mktemp("gpu") / "run"
    return (out, *finished(out))


def test_each_fault_costs_its_row_alone(whole: tuple[Path, int, str]) -> None:
    out, code, text = whole
    assert code == 0, text
    rows = files.rows(out / "example.jsonl")
    assert {m: rows[ROW.format(m)].get("absent") for m in (1, 4, 16, 64, 128, 512)} == {1: None, **WHY, 512: None}
    assert all(row["fake"] is True and row["failed"] == ("absent" in row) for row in rows.values() if "failed" in row)
    assert rows[ROW.format(512)]["refused"] == {"native": WHY[4]}, "a crash with one candidate costs this one"
    assert list(rows[ROW.format(512)]["times"]) == ["reference"]
    found = answer(out)
    assert found["fake"] is True
    assert found["failed"] == {f"example: {ROW.format(m)}": why for m, why in WHY.items()}
    assert found["refused"] == {f"native: {WHY[4]}": [ROW.format(512)]}
    assert "A fake device: no number here was measured" in (out / "sheet.md").read_text()
    log = (out / "logs" / "example.log").read_text()
    assert log.count("in come") == 3, "where the crashes came, and where the silent process stood"


def test_killed_at_five_points_and_resumed_it_ends_with_the_same_sheet(
    whole: tuple[Path, int, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    kills = [killed_while_it_runs(out, after) for after in (3, 7, 11, 15, 19)]
    assert all(kills)
    code, text = finished(out, "--resume")
    assert code == 0, text
    assert answer(out) == answer(whole[0])
    # a worker that outlives its runner would write beside the next one
    workers = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(out).encode() in read(p)]
    assert workers == []
    ends = [line["title"] for line in files.lines(out / "example.jsonl") if "title" in line and "begin" not in line]
    assert len(ends) == len(set(ends)), "no row that ended is done again"


def test_a_full_disk_leaves_whole_lines_and_the_run_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, text = finished(out, faults="disk=example/M=16")
    assert code == 4, text
    assert "no room left" in text
    data = (out / "example.jsonl").read_bytes()
    assert data.endswith(b"\n")
    assert len(data.splitlines()) == len(list(files.lines(out / "example.jsonl")))
    assert ROW.format(16) not in files.rows(out / "example.jsonl")
    code, text = finished(out, "--resume", faults="disk=example/M=16")
    assert code == 0, text
    assert answer(out)["failed"] == {}
    assert len(files.rows(out / "example.jsonl")) == 6


@pytest.mark.full_form
@pytest.mark.slow
def test_a_whole_run_names_exactly_what_was_planted(tmp_path: Path) -> None:
    """All parts, with a wrong kernel, a crash and a hang: in under ten minutes, and with the same sheet where it was
    killed at five points."""
    faults = "limit=60,wrong=rms_norm_backward/native,crash=lora_linear/forward 64x128 M=16,hang=gated/M=16"
    begin = time.monotonic()
    code, text = finished(tmp_path / "whole", faults=faults, parts=())
    assert time.monotonic() - begin < 600
    assert code == 1, text
    found = answer(tmp_path / "whole")
    assert {key.rsplit(" ", 2)[0] for key in found["wrong"]} == {"rms_norm native backward"}
    failed = {title.split(": ")[0]: why for title, why in found["failed"].items()}
    assert failed == {"lora_linear": "the process was ended by SIGSEGV", "gated": "did not finish in 60 s"}
    assert [found[name] for name in ("loose", "unfinished", "sanitizer")] == [{}, {}, {}]
    assert found["machine"]["backends"]["native"] == "chosen"
    assert all("rms_norm" in row or "native" not in row for row in found["refused"])
    lines = sum(len(list(files.lines(p))) for p in (tmp_path / "whole").glob("*.jsonl"))
    for share in (0.02, 0.2, 0.5, 0.8, 0.95):
        assert killed_while_it_runs(tmp_path / "run", int(share * lines), faults=faults, parts=())
    code, text = finished(tmp_path / "run", "--resume", faults=faults, parts=())
    assert code == 1, text
    assert answer(tmp_path / "run") == found


TESTS = """
import torch
import peft_kernels as pk
from peft_kernels.testing import assert_same_bits

def law(x):
    with pk.use_backend("native"):
        y = pk.rms_norm(x, torch.ones(8), 1e-6)
    assert torch.allclose(y, x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt())

def test_few_rows(): law(torch.randn(4, 8))
def test_many_rows(): law(torch.randn(100, 8))
def test_another():
    with pk.use_backend("native"):
        pk.gated(torch.randn(2, 8), torch.randn(2, 8))
def test_no_kernel(): assert 1 + 1 == 2
"""
CRASH = """
def test_crash():
    with pk.use_backend("native"):
        pk.gated(torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(2, 8, dtype=torch.bfloat16))
def test_after(): test_another()
"""


@pytest.mark.parametrize("crash", matrix([False, True], short=[False]))
def test_the_tests_judge_each_kernel_by_itself(crash: bool, tmp_path: Path) -> None:
    """One wrong kernel, one test that fails and one that ends its process: each is named, and the others pass."""
    file = tmp_path / "test_planted.py"
    file.write_text(TESTS + CRASH * crash)
    faults = f"limit=60,tests={file},wrong=rms_norm/native,crash=tests/test_crash,fail=tests/test_no_kernel"
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})  # one process: xdist's take longer to start than these tests
    try:
        code, text = finished(tmp_path / "run", faults=faults, parts=("tests",))
    finally:
        os.sched_setaffinity(0, before)
    assert code == 1, text
    found = answer(tmp_path / "run")
    assert list(found["wrong"]) == ["rms_norm native forward f32 1-8", "rms_norm native forward f32 65-512"]
    assert list(found["loose"].values()) == ["a failure (planted)"]
    crashed = f"tests: {files_title(tmp_path, 'test_crash')}" if crash else ""
    assert found["failed"] == ({crashed: "the process was ended by SIGSEGV"} if crash else {})
    judged = Verdicts.read(tmp_path / "run")
    right = {"verdict": "passed", "passed": 1 + crash, "failed": 0}
    assert judged.found["gated native forward f32 1-8"] == right
    assert judged.wrong("rms_norm", "native", "step", "f32", 100)
    assert judged.wrong("rms_norm", "native", "forward", "f32", 9) is None


COLLECT = """
import sys, pytest
from importlib.machinery import PathFinder
found = PathFinder.find_spec
def find_spec(name, *args):
    return None if name.split(".")[0] in sys.argv[1].split(",") else found(name, *args)
PathFinder.find_spec = find_spec
sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", "--full", "-p", "no:cacheprovider", "-p",
                      "no:hypothesispytest", "-n", "0", *sys.argv[2:]]))
"""


@pytest.mark.full_form
def test_a_machine_without_our_test_packages_has_all_gpu_tests() -> None:
    """The files that are chosen by their text have the `gpu` tests of all, and need no package that few have."""

    def collected(without: str, *paths: str) -> set[str]:
        command = [sys.executable, "-c", COLLECT, without, *paths]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:]
        return {line for line in done.stdout.splitlines() if "::" in line}

    chosen = collected("hypothesis,bitsandbytes,peft,sklearn,matplotlib", *map(str, part_tests.test_files()))
    assert chosen == collected("", "tests")
    assert len(chosen) > 300


def files_title(folder: Path, name: str) -> str:
    """pytest's name of a test, which has the folder or not."""
    return next(t for t in files.rows(folder / "run" / "tests.jsonl") if t.endswith(name))


def test_what_is_asked_for_wrongly_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / files.SETTINGS).write_text('{"fake": false}')
    for options, says in (
        (["--fake"], "has a run already"), (["--fake", "--resume"], "do not go together"),
        (["--fake", "crash=example"], r"expected crash=PART/TEXT.*got 'crash=example'"),
        (["--parts", "no_such"], "invalid choice"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            run.main(["--out", str(tmp_path), *options])
        assert stopped.value.code == 2
        assert re.search(says, capsys.readouterr().err)
    with run.alone(tmp_path), pytest.raises(SystemExit, match="another run"):
        run.main(["--out", str(tmp_path), "--resume"])


def test_when_the_time_is_over_the_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--out", str(tmp_path), "--fake", "--parts", "example", "--minutes", "0.02"]) == 3
    assert "go on with --resume" in capsys.readouterr().out
    assert run.main(["--out", str(tmp_path), "--fake", "--parts", "example", "--resume"]) == 0
    assert len(files.rows(tmp_path / "example.jsonl")) == 6


def test_rows_of_another_tree_are_done_again(tmp_path: Path) -> None:
    line = {"title": ROW.format(1), "absent": "of another tree", "digest": "0123"}
    files.append(tmp_path / "example.jsonl", line)
    assert run.main(["--out", str(tmp_path), "--fake", "--parts", "example"]) == 0
    assert "absent" not in files.rows(tmp_path / "example.jsonl")[ROW.format(1)]
    assert answer(tmp_path)["failed"] == {}


def test_a_row_that_ends_every_run_is_left_out(tmp_path: Path) -> None:
    """Where the whole machine goes down with a row, no process is left that could write why."""
    run.main(["--out", str(tmp_path), "--fake", "--parts", "after"])
    digest = files.settings(tmp_path)["digest"]
    for _ in range(6):
        files.append(tmp_path / "example.jsonl", {"title": ROW.format(4), "begin": "x", "digest": digest})
    assert run.main(["--out", str(tmp_path), "--fake", "--parts", "example", "--resume"]) == 0
    assert "6 times" in files.rows(tmp_path / "example.jsonl")[ROW.format(4)]["absent"]


def test_what_a_killed_run_left_behind_is_ended(tmp_path: Path) -> None:
    """A profiler or pytest outlives the worker that started it."""
    out = tmp_path / "run"
    left, other = (
        subprocess.Popen(["sleep", "60"], env={**os.environ, verdicts.ENV: str(where)}) for where in (out, tmp_path)
    )
    assert run.main(["--out", str(out), "--fake", "--parts", "after"]) == 0
    assert left.wait(10) == -signal.SIGKILL
    assert other.poll() is None, "of another run"
    other.kill()
    other.wait()


def test_without_a_gpu_the_error_says_so(tmp_path: Path) -> None:
    """torch is a stand-in, which takes no seconds to import."""
    (tmp_path / "torch.py").write_text(
        "class cuda: is_available = lambda: False\nclass version: cuda = None\n__version__ = '2.0'\n"
    )
    command = [*TOOL, "--out", str(tmp_path / "run"), "--parts", "after"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout
    assert "needs a CUDA device, and torch 2.0 is built without CUDA. `python -m bench --static`" in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on the PATH")
def test_make_installs_nothing_for_it() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # as from a shell
    done = subprocess.run(["make", "-n", "gpu-report"], cwd=ROOT, capture_output=True, text=True, env=env)
    (line,) = done.stdout.splitlines()
    assert "tools/gpu_run.py --out runs/gpu" in line


def test_it_starts_with_the_standard_library_alone() -> None:
    code = "import sys; sys.path.insert(0, '.'); import bench.gpu.run; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {name.split(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names) <= {"bench", "__main__"}


def test_a_half_written_line_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    files.append(path, {"title": "a"})
    with path.open("ab") as f:
        f.write(b'{"title": "b", "ti')
    files.append(path, {"title": "c"})
    assert list(files.rows(path)) == ["a", "c"]
    with pytest.raises(ValueError, match="JSON"):
        files.append(path, {"x": float("nan")})


def test_every_part_has_its_place() -> None:
    modules = {p.stem for p in (ROOT / "bench" / "gpu" / "parts").glob("*.py")} - {"__init__"}
    assert modules == set(plan.parts())
    assert sum(plan.share_s(part, 45.0) for part in plan.parts()) == pytest.approx(45 * 60)


def test_a_fault_comes_at_one_row(tmp_path: Path) -> None:
    faults = Faults.parse("crash=a/M=1, disk=a/M=2")
    assert [faults.of(tmp_path, "a", t) for t in ("M=16", "M=12", "M=2", "M=16", "M=2")] == [
        "crash", None, "disk", "crash", None]  # fmt: skip
    assert faults.of(tmp_path, "b", "M=16") is None
