"""`python -m bench --gpu`: the tests marked `gpu`, op by op; then the rows; a table, JSON lines and pictures.

A row whose op's tests did not pass holds no number. What is not installed, or refuses, is named.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import checks, machine, results
from ..measure import Candidate, Clock, cuda_clock
from ..results import Row
from ..static import gpus

SHAPES = [(4096, 4096), (4096, 14336)]  # in x out features: attention, gate and up of an 8B model
DTYPES = ["bf16", "f32"]  # the command line's default; a GPU report is of bfloat16 unless others are named
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
OPS = ("lora_linear", "dequantize_4bit", "quantize_4bit")
# the tests of an op that a GPU runs: by the names of their files
TESTS = {
    "lora_linear": "test_*lora*.py", "dequantize_4bit": "test_*quantize*.py", "quantize_4bit": "test_*quantize*.py",
}  # fmt: skip
# of the whole model: what is written for GPUs; the quicker Llama layers of the CPU are not
MODES = ["ours-bf16", "bnb-bf16", "dense-bf16"]
GPU = "gpu"  # pytest's marker


def find_device() -> str:
    """`cuda`, or an error that says what is missing."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch {torch.__version__} is built without CUDA" if built is None else "torch sees none"
        raise SystemExit(f"error: the GPU report needs a CUDA device, and {why}. `python -m bench --static` reports on "
                         "the kernels' machine code without one.")  # fmt: skip
    return "cuda"


def test_files(op: str) -> list[Path]:
    return sorted((checks.ROOT / "tests").glob(TESTS[op]))


def verdict(op: str) -> checks.Verdict:
    """Of the `gpu` tests of an op. None that ran is no pass: skipped tests have proved nothing."""
    done = checks.pytest(test_files(op), GPU)
    if isinstance(done, str):
        return checks.Verdict(False, f"gpu tests of {op}: {done}")
    code, tail = done
    if code == 0 and re.search(r"\b\d+ passed", tail):
        return checks.Verdict(True, f"gpu tests of {op}: {tail}")
    return checks.Verdict(False, f"gpu tests of {op} {'did not run' if code in (0, 5) else 'fail'}: {tail}")


def peak_mib(call: Callable[[], object]) -> float:
    """Memory that a call adds at its peak to what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


@dataclass
class Run:
    """The report's questions to its surroundings; tests put a fake device and clock here."""

    device: str
    folder: Path
    name: str
    clock: Clock = cuda_clock
    peak: Callable[[Callable[[], object]], float] | None = peak_mib
    verdict: Callable[[str], checks.Verdict] = verdict
    bounds: dict[str, Any] = field(default_factory=dict)


def folder_of(name: str) -> Path:
    """bench/results/<gpu>, the GPU's name in small letters and hyphens."""
    return results.RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def bounds_of(name: str) -> dict[str, Any]:
    """The public peaks of a GPU that bench/static/gpus.py knows; none of another."""
    known = [n for n in gpus.GPUS if n.removeprefix("RTX ").lower() in name.lower()]
    if not known:
        return {"how": "no public numbers of this GPU in bench/static/gpus.py"}
    gpu = gpus.GPUS[max(known, key=len)]
    return {"gflops": gpu.tflops * 1e3, "gbs": gpu.gbs, "how": f"public specification of {max(known, key=len)}"}


def op_rows(op: str, args: argparse.Namespace) -> Iterator[Row]:
    module = importlib.import_module(f"bench.ops.{op}")
    yield from module.rows(args)


def step_rows(args: argparse.Namespace) -> Iterator[Row]:
    """The whole model, where there is one: a training step and decoding, each mode in a process of its own."""
    from ..suites import qlora

    try:
        folder = qlora.model_folder(args)
    except Exception as e:
        print(f"whole model: left out, {type(e).__name__}: {e}")
        return
    print(f"whole model: {folder.name}", file=sys.stderr)
    yield from qlora.rows(args)


def measured(row: Row, run: Run, judged: checks.Verdict, args: argparse.Namespace) -> Row:
    """The row with its numbers, or, where the tests of its op did not pass, without any and saying why."""
    if not judged.passed:
        return row.refuse(judged.text)
    if run.peak is not None and row.candidates:
        row.extra["peak MiB"] = {c.name: run.peak(_once(c)) for c in row.candidates}
    return row.measure(args.rounds, args.sample_s, args.budget_s, run.clock)


def _once(c: Candidate) -> Callable[[], object]:
    c.calls[0]()  # compiles, and allocates what stays
    return c.calls[0]


def report(run: Run, args: argparse.Namespace, parts: tuple[str, ...] = (*OPS, "step")) -> int:
    """Tests, rows, table, JSON lines and a picture for each part. Returns 1 where tests failed."""
    info = {**machine.describe(args.threads), "gpu": run.name}
    print(machine.line(info))
    print(f"bounds ({run.bounds.get('how')}): {run.bounds.get('gflops', 0):.0f} GFLOP/s bfloat16, "
          f"{run.bounds.get('gbs', 0):.0f} GB/s")  # fmt: skip
    commit, failed = machine.commit(), False
    for part in parts:
        judged = run.verdict("lora_linear" if part == "step" else part)
        print(judged.text, file=sys.stderr)
        failed |= not judged.passed
        header = results.header(info, run.bounds, commit, f"gpu {part}")
        rows = []
        found = step_rows(args) if part == "step" and judged.passed else op_rows(part, args) if part != "step" else []
        path = run.folder / f"{part}.jsonl"
        for row in found:
            rows.append(measured(row, run, judged, args))
            results.write_lines(results.as_lines(rows[-1:], header, judged.passed), path)
            print(f"{'measured' if judged.passed else 'refused'}: {row.title}", file=sys.stderr)
        if part == "step" and not judged.passed:
            print(f"whole model: no number, {judged.text}")
        if not rows:
            continue
        results.print_rows(rows, run.bounds, judged.passed, f"{part}, {run.name}", info["bnb"])
        for name, why in {k: v for row in rows for k, v in row.case.get("refused", {}).items()}.items():
            print(f"{name} was not run: {why}")
        if judged.passed:
            results.plot_rows(rows, run.folder / f"{part}.png", f"{part}, {run.name}, commit {commit}")
        print(f"{path}: {len(rows)} rows at commit {commit}")
    return int(failed)


def main(args: argparse.Namespace) -> int:
    device = find_device()
    name = torch.cuda.get_device_name()
    args.device = device
    args.shapes = args.shapes or SHAPES
    args.dtype = args.dtype if args.dtype != DTYPES else ["bf16"]
    args.modes = args.modes or MODES
    args.m = args.m or ([1, 16, 128, 2048] if args.quick else ROWS)
    run = Run(device, folder_of(name), name, bounds=bounds_of(name))
    return report(run, args)
