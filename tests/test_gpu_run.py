"""The GPU run without a GPU: a fake device, and what goes wrong on machines that have one, planted.

Of the whole run the short form has the part `example` and one file of tests, the full form all parts.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forms import matrix

from bench.gpu import files, plan, run, sheet, verdicts
from bench.gpu.device import Device
from bench.gpu.faults import Faults
from bench.gpu.parts import sanitizer
from bench.gpu.parts import tests as part_tests
from bench.gpu.verdicts import Verdicts
from bench.gpu.worker import withheld

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
        pk.swiglu(torch.randn(2, 8), torch.randn(2, 8))
def test_no_kernel(): assert 1 + 1 == 2
"""
CRASH = """
def test_crash():
    with pk.use_backend("native"):
        pk.swiglu(torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(2, 8, dtype=torch.bfloat16))
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
    assert judged.found["swiglu native forward f32 1-8"] == right
    assert judged.wrong("rms_norm", "native", "step", "f32", 100)
    assert judged.wrong("rms_norm", "native", "forward", "f32", 9) is None


COLLECT = """
import sys, pytest
for name in sys.argv[1].split(",") if sys.argv[1] else ():
    sys.modules[name] = None
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
    assert sum(plan.PLAN.values()) <= 60 * plan.MINUTES * 1.1


@pytest.mark.parametrize(
    ("failing", "passed", "wrong"),
    [
        ({"t": {"a cuda forward f32 1-8"}}, {"a cuda forward f32 1-8": 99}, {"a cuda forward f32 1-8"}),
        # the forward passes by itself
        ({"t": {"a cuda forward x 1", "a cuda backward x 1"}}, {"a cuda forward x 1": 1}, {"a cuda backward x 1"}),
        # and so it does for other rows
        ({"t": {"a cuda forward x 1", "a cuda backward x 1"}}, {"a cuda forward x 9": 1}, {"a cuda backward x 1"}),
        # nothing tells them apart
        ({"t": {"a cuda forward x 1", "b cuda forward x 1"}}, {}, {"a cuda forward x 1", "b cuda forward x 1"}),
        # the forward fails by itself, which explains the rest
        ({"s": {"a cuda forward x 1"}, "t": {"a cuda forward x 1", "a cuda backward x 1"}}, {}, {"a cuda forward x 1"}),
        ({"t": set()}, {}, set()),
    ],
)  # fmt: skip
def test_who_is_blamed(failing: dict[str, set[str]], passed: dict[str, int], wrong: set[str]) -> None:
    assert verdicts.blamed(failing, passed) == wrong


def test_keys_of_calls() -> None:
    import torch

    x, packed = torch.zeros(3, 5, 8, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.uint8)
    assert verdicts.key_of("lora_linear_backward", "cuda", (x, x)) == "lora_linear cuda backward bf16 9-64"
    assert verdicts.key_of("dequantize_4bit", "cuda", (packed, torch.float16)) == "dequantize_4bit cuda forward f16 any"
    assert verdicts.key_of("dora_norm", "triton", (packed,)) == "dora_norm triton forward any any"
    judged = Verdicts({"dora_norm triton forward any any": {"verdict": "wrong", "why": "w"}})
    assert judged.wrong("dora_norm", "triton", "forward", "bf16", 77) == "wrong by its tests: w"
    assert [verdicts.class_of(m) for m in (0, 1, 8, 9, 64, 65, 512, 513, 9999)] == [
        "1-8", "1-8", "1-8", "9-64", "9-64", "65-512", "65-512", "513-", "513-"]  # fmt: skip


def test_numbers_of_wrong_kernels_are_withheld(tmp_path: Path) -> None:
    judged = Verdicts({"a cuda backward bf16 1-8": {"verdict": "wrong", "why": "w"}})
    device = Device("cpu", "fake", 0, True, ("native",), tmp_path, judged)
    row = {"op": "a", "direction": "step", "dtype": "bf16", "m": 4,
           "times": {"cuda": {"eager_s": 1.0}, "cuda panels": {}, "triton": {"eager_s": 2.0}}}  # fmt: skip
    kept = withheld(row, device)
    assert list(kept["times"]) == ["triton"]
    assert set(kept["refused"]) == {"cuda", "cuda panels"}
    assert withheld({**row, "direction": "forward"}, device)["times"] == row["times"]


def test_crossovers_and_shares() -> None:
    def row(m: int, **times: float) -> dict[str, Any]:
        case = {"op": "a", "direction": "forward", "dtype": "bf16", "shape": "s", "m": m, "bound_s": 1e-6}
        return {**case, "title": f"M={m}", "times": {k: {"graph_s": v, "eager_s": 9.0} for k, v in times.items()}}

    rows = [row(512, cuda=8e-6, triton=4e-6, dense=3e-6), row(1, cuda=2e-6, triton=3e-6, dense=9e-6),
            row(16, cuda=2e-6, dense=9e-6)]  # fmt: skip
    found = sheet.answer({"x": {r["title"]: r for r in rows}}, Verdicts(), {}, {"digest": "d"})
    name = "a forward bf16 s"
    assert found["crossovers"] == {name: {"all": ["1 cuda", "512 dense"], "ours": ["1 cuda", "512 triton"]}}
    assert found["shares"][name]["512"] == "triton 4 us, 25% of the bound"
    rows[0]["times"]["dense"].pop("graph_s")
    assert sheet.seconds(rows[0])["cuda"] == 9.0, "one clock for all candidates of a row"
    assert "From this" not in sheet.text(found)
    assert "512 triton" in sheet.text(found)


SANITIZER = """#!/bin/sh
while [ "$1" != --log-file ]; do shift; done
cat > "${2%\\%p.log}7.log" <<'END'
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at void (anonymous namespace)::gemv_kernel<int>(Call)+0x1f0 in lora_gemv.cu:60
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f is out of bounds
=========
========= Invalid __global__ read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<4>(int)+0x10
=========
========= Error: Race reported between Write access at void mma::kernel<int>(Problem)+0x1 in a.cuh:1 and Read access
========= ERROR SUMMARY: 3 errors
END
echo "5 passed in 1 s"
"""


def test_the_sanitizers_findings_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    device = Device("cuda", "a GPU", 90, False, ("cuda",), tmp_path)
    row = sanitizer.row("memcheck", device)
    assert (row["findings"], row["in_others"], row["finished"], row["tests"]) == (2, 1, True, "5 passed in 1 s")
    assert "Invalid __global__ read of size 4 bytes; at void (anonymous namespace)::gemv_kernel" in row["words"][0]
    tool.write_text("#!/bin/sh\necho no such device\n")
    assert sanitizer.row("memcheck", device) == {"absent": "memcheck wrote no report: no such device"}


def test_the_names_of_our_kernels_are_found() -> None:
    sources = [p.read_text() for p in (ROOT / "csrc" / "cuda").glob("*.cu*")]
    declared = sum(len(re.findall(r"^(?:template .*)?__global__ ", text, flags=re.M)) for text in sources)
    assert sum(len(re.findall(sanitizer.KERNEL, text)) for text in sources) == declared > 20
    assert {"gemv_kernel", "dx_kernel", "quantize_kernel"} <= sanitizer.kernels()


def test_a_fault_comes_at_one_row(tmp_path: Path) -> None:
    faults = Faults.parse("crash=a/M=1, disk=a/M=2")
    assert [faults.of(tmp_path, "a", t) for t in ("M=16", "M=12", "M=2", "M=16", "M=2")] == [
        "crash", None, "disk", "crash", None]  # fmt: skip
    assert faults.of(tmp_path, "b", "M=16") is None
