"""Rows of the GPU run without a GPU: the order of the graph clock against a stand-in of torch.cuda, what a row refuses,
parts on a fake device, and what Nsight Compute's pages are read as."""

from __future__ import annotations

import contextlib
import importlib
import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forms import matrix
from lora_tools import needs_native

from bench import machine, results
from bench.gpu import clock, device, plan, rows
from bench.gpu.parts import ceilings, ncu
from bench.measure import Candidate
from peft_kernels import tuning

Run = Callable[[], object]


class Cuda:
    """torch.cuda as far as `clock.record` uses it; `seen` has what was asked of it, in order."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.capturing = False
        outer = self

        class Stream:
            def wait_stream(self, other: object) -> None:
                outer.seen.append("wait")

        class CUDAGraph:
            def replay(self) -> None:
                outer.seen.append("replay")

        self.Stream, self.CUDAGraph, self.current = Stream, CUDAGraph, Stream()

    def current_stream(self) -> Any:
        return self.current

    def synchronize(self) -> None:
        assert not self.capturing, "nothing may wait within a capture"
        self.seen.append("synchronize")

    @contextlib.contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        self.side = stream
        yield

    @contextlib.contextmanager
    def graph(self, graph: object, stream: object) -> Iterator[None]:
        assert stream is self.side, "the stream that was warmed up"
        self.seen.append("begin")
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False
            self.seen.append("end")


def test_a_graph_is_captured_after_calls_on_its_stream_and_replayed() -> None:
    cuda = Cuda()
    calls = [lambda name=name: cuda.seen.append(name) for name in "abc"]
    replay = clock.record(clock.over_copies(Candidate("x", calls), 6), cuda)
    once = list("abcabc")
    assert cuda.seen == ["wait", *once, *once, "wait", "synchronize", "begin", *once, "end", "replay", "synchronize"]
    cuda.seen.clear()
    replay()
    assert cuda.seen == ["replay"]


def test_what_refuses_a_capture_ends_it() -> None:
    cuda = Cuda()

    def refuses() -> None:
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        clock.record(refuses, cuda)
    assert cuda.seen[-1] == "end"


@pytest.mark.parametrize(
    ("copies", "once", "calls"), [(12, 3e-6, 504), (12, 1e-3, 12), (1, 1e-4, 20), (64, 0.0, 512), (2, 5.0, 2)]
)
def test_a_graph_holds_every_copy_equally_often(copies: int, once: float, calls: int) -> None:
    found = clock.in_graph(copies, once)
    assert found == calls
    assert found % copies == 0
    assert found <= max(copies, clock.NODES)


class Ticking:
    """A device of which each call of a candidate takes what its name says, and Python a second more unless replayed."""

    fake = False

    def __init__(self) -> None:
        self.now, self.replaying, self.lost, self.order = 0.0, False, False, list[str]()
        self.tried = ""

    def call(self, name: str, seconds: float) -> Run:
        def run() -> None:
            assert name.startswith(self.tried or "nobody"), "another candidate would be blamed"
            self.order.append(name)
            self.now += seconds + (0.0 if self.replaying else 1.0)

        return run

    def eager_clock(self, run: Run) -> float:
        before = self.now
        run()
        return self.now - before

    def graphed(self, run: Run) -> Run:
        def replay() -> None:
            self.replaying = True
            run()
            self.replaying = False

        return replay

    def trying(self, candidate: str) -> None:
        self.tried = candidate

    def synchronize(self) -> None:
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Ticking:
    monkeypatch.setattr(clock, "peak_mib", lambda call: 1.5)
    return Ticking()


def test_both_clocks_say_seconds_of_a_call(ticking: Ticking) -> None:
    candidates = [Candidate(n, [ticking.call(f"{n}{i}", s) for i in range(2)]) for n, s in (("x", 0.25), ("y", 0.5))]
    found = clock.measure(candidates, ticking)
    assert {n: s.median for n, s in found.eager.items()} == {"x": 1.25, "y": 1.5}
    assert {n: s.median for n, s in found.graph.items()} == {"x": 0.25, "y": 0.5}
    assert found.calls == {"x": 2, "y": 2}
    assert found.peak == {"x": 1.5, "y": 1.5}
    assert not found.failed
    assert not found.uncaptured
    assert ticking.order.count("x0") == pytest.approx(ticking.order.count("x1"), abs=6), "copies take turns"


def test_a_candidate_that_fails_costs_itself_alone(ticking: Ticking) -> None:
    count = iter(range(100))

    def later() -> None:
        if next(count) > 3:
            raise ValueError("the fifth call\nand more")

    def not_in_graphs() -> None:
        if ticking.replaying:
            raise RuntimeError("cannot be captured")

    candidates = [Candidate("good", [ticking.call("good", 0.5)]), Candidate("at once", [lambda: 1 / 0]),
                  Candidate("later", [later]), Candidate("eager", [not_in_graphs])]  # fmt: skip
    found = clock.measure(candidates, ticking)
    assert set(found.eager) == {"good", "eager"}
    assert set(found.graph) == {"good"}
    assert found.failed == {"at once": "ZeroDivisionError: division by zero", "later": "ValueError: the fifth call"}
    assert found.uncaptured == {"eager": "RuntimeError: cannot be captured"}


def test_a_lost_device_names_its_candidate(ticking: Ticking) -> None:
    def breaks() -> None:
        ticking.lost = True

    with pytest.raises(clock.DeviceLost, match="bad: RuntimeError: CUDA error: an illegal") as caught:
        clock.measure([Candidate("good", [ticking.call("good", 1.0)]), Candidate("bad", [breaks])], ticking)
    assert caught.value.candidate == "bad"


# ---- rows ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def fake(tmp_path: Path) -> device.Device:
    return device.find(tmp_path, fake=True)


def test_bounds_of_a_gpu_are_its_ceilings(fake: device.Device) -> None:
    found = ceilings.bounds(fake)
    assert set(found) == {"gbs", "gflops_bf16", "how"}
    assert machine.bounds_line(found).endswith(f"{found['gflops_bf16']:.0f} GFLOP/s bfloat16, {found['gbs']:.0f} GB/s")
    assert results.products_bound(found, "cuda", {"dtype": "bf16"}) == found["gflops_bf16"]
    assert results.products_bound(found, "cuda", {"dtype": "f32"}) == 0


def row_of(fake: device.Device) -> rows.Row:
    return rows.Row(fake, "lora_linear", "forward", 4, "64x128", 2e9, 1e6, {"weight": "nf4"})


def test_a_wrong_result_gets_no_number(fake: device.Device) -> None:
    row, exact = row_of(fake), torch.ones(4, 8)
    row.add("right", [lambda: (exact * 1.001, None)])
    row.add("wrong", [lambda: (exact * 1.1, None)])
    row.add("no number", [lambda: (exact * float("nan"), None)])
    row.base("another", [lambda: exact * 3])
    found = row.measure(exact)
    assert set(found["times"]) == {"right", "another"}
    assert "off by 0.1 of" in found["refused"]["wrong"]
    assert "off by 1e+09 of" in found["refused"]["no number"]
    json.dumps(found, allow_nan=False)


def test_what_the_tests_found_wrong_is_not_run(fake: device.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.Device, "wrong", lambda self, op, backend, *rest: f"{backend} fails at {rest}")
    row = row_of(fake)
    row.ours([lambda: 1 / 0], panels=True)
    row.add("torch", [lambda: torch.ones(1)])
    found = row.measure()
    assert set(found["times"]) == {"torch"}
    assert set(found["refused"]) == {"native fused", "native panels"}
    assert found["refused"]["native fused"] == "native fails at ('forward', 'bf16', 4)"


def test_a_candidate_that_lost_a_process_is_left_out(fake: device.Device) -> None:
    noted: list[str] = []
    fake.begin("row", {"crashed": "signal 11"}, noted.append)
    row = row_of(fake)
    row.add("crashed", [lambda: 1 / 0])
    row.add("torch", [lambda: torch.ones(1)])
    assert set(row.measure()["times"]) == {"torch"}
    assert set(noted) == {"torch"}


def test_panels_are_forced_within_the_call_alone(fake: device.Device) -> None:
    row, seen = row_of(fake), []
    row.ours([lambda: seen.append(tuning.panels("sm_90").from_M)], panels=True)
    for candidate in row.candidates:
        candidate.calls[0]()
    assert [c.name for c in row.candidates] == ["native fused", "native panels"]
    assert seen == [rows.NEVER, 1]
    assert tuning.panels("sm_90").from_M == tuning.table("sm_90")["panels"]["from_M"]


def test_configurations_are_noted_with_the_others() -> None:
    shape = tuning.Shape(16, 4096, 4096, 16, 16)
    with rows.configurations() as found:
        chosen = tuning.choose("forward", "sm_90", shape)
    assert found["forward"]["config"]["BM"] == chosen.BM
    assert len(found["forward"]["others"]) == len(tuning.rows("forward", "sm_90", shape)) - 1
    tuning.choose("project", "sm_90", shape)
    assert set(found) == {"forward"}, "outside nothing is noted"


def test_the_bound_is_of_what_this_run_measured(tmp_path: Path) -> None:
    fake = device.find(tmp_path, fake=True)
    assert rows.bounds(fake, 1e12, 1e9) == {}
    lines = [{"title": "copy", "gbs": 1000.0}, {"title": "gemm", "tflops": 500.0}]
    (tmp_path / "ceilings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert rows.bounds(fake, 1e12, 1e9) == {"bound_s": pytest.approx(2e-3), "bound_by": "products"}
    assert rows.bounds(fake, 1e11, 1e9) == {"bound_s": pytest.approx(1e-3), "bound_by": "memory"}
    fake.name = "NVIDIA H100 80GB HBM3"
    assert rows.bounds(fake, 0.0, 3350e9)["data_sheet_bound_s"] == pytest.approx(1.0)
    assert rows.data_sheet("NVIDIA GeForce RTX 4090").gbs == 1008  # type: ignore[union-attr]
    assert rows.data_sheet("Some other GPU") is None


# ---- parts -----------------------------------------------------------------------------------------------------------
MINE = ("ceilings", "panels", "decode", "lora_linear", "dora_linear", "multi_lora_linear", "lora_mixture",
        "lora_linear_stacked", "rotations", "gated", "rms_norm", "llama", "qlora", "tune", "ncu",
        "others")  # fmt: skip
NEEDS = {"llama": ("transformers", "peft"), "qlora": ("transformers", "peft"), "tune": ("triton",)}


@pytest.mark.parametrize("name", MINE)
def test_titles_of_a_part_are_its_own_and_few_on_a_fake_device(name: str, fake: device.Device, tmp_path: Path) -> None:
    part = importlib.import_module(f"bench.gpu.parts.{name}")
    real = device.Device("cuda", "H100", 90, False, ("cuda", "triton"), tmp_path)
    for titles in (part.titles(fake), part.titles(real)):
        assert titles
        assert len(set(titles)) == len(titles)
    assert len(part.titles(fake)) <= len(part.titles(real))
    assert name in plan.PLAN
    assert part.LIMIT_S > 0


@needs_native
@pytest.mark.parametrize("name", matrix(MINE, ("ceilings", "panels", "rms_norm", "tune", "ncu")))
def test_a_part_on_a_fake_device(name: str, fake: device.Device) -> None:
    """The rows are JSON, and of times say that they stand in."""
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    part = importlib.import_module(f"bench.gpu.parts.{name}")
    for title in part.titles(fake)[:2]:
        fake.begin(title)
        found = part.row(title, fake)
        json.dumps(found, allow_nan=False)
        if "times" in found:
            assert found["stands_in"].startswith("native")
            ours = {n: t for n, t in found["times"].items() if n.startswith(("native", "ours"))}
            assert ours or name == "others", found["refused"]
            assert all(s > 0 for t in found["times"].values() for s in t.values())
            assert not [n for n, why in found["refused"].items() if "is off by" in why]
        elif name == "tune":
            kernels = {one["kernel"] for one in found["timed"]}
            assert kernels <= {"project", "forward", "backward", "outer"}
            assert all(len(one["times"]) > 1 for one in found["timed"])
        elif name == "ncu":
            assert found["absent"]
        else:
            assert found.get("absent") or found["seconds"] > 0


def test_a_tuned_table_is_the_runs_own(fake: device.Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path / "user"))
    from bench.gpu.parts import tune

    with tune.tables_in(fake):
        from peft_kernels import tuning_user

        assert tuning_user.path("sm_90").is_relative_to(fake.out / "cache")
    assert tuning_user.path("sm_90").is_relative_to(tmp_path / "user")


PAGE = '''==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Block Size","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","void pk::gemv(Call)","(256, 1, 1)","(64, 1, 1)","SOL","Duration","us","12.50"
"0","7","void pk::gemv(Call)","(256, 1, 1)","(64, 1, 1)","SOL","DRAM Throughput","%","81.2"
"0","7","void pk::gemv(Call)","(256, 1, 1)","(64, 1, 1)","SOL","Something else","%","1"
"1","7","void pk::finish(Call)","(256, 1, 1)","(2, 1, 1)","SOL","Elapsed Cycles","cycle","21,437"
'''


def program(folder: Path, text: str) -> None:
    path = folder / "ncu"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_the_counters_of_every_launch_are_read(
    fake: device.Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "page").write_text(PAGE)
    program(tmp_path, f'echo "$@" > {tmp_path}/words; cat {tmp_path}/page')
    found = ncu.row("gemv", fake)
    first, second = found["launches"]
    assert first["kernel"] == "void pk::gemv(Call)"
    assert first["values"]["Duration"] == {"value": 12.5, "unit": "us"}
    assert set(first["values"]) == {"Duration", "DRAM Throughput"}
    assert second["values"]["Elapsed Cycles"]["value"] == 21437
    words = (tmp_path / "words").read_text()
    assert "--profile-from-start off" in words
    assert words.strip().endswith("-m bench.gpu.profiled gemv")
    program(tmp_path, "echo '==ERROR== ERR_NVGPUCTRPERM - The user does not have permission'; exit 1")
    assert "ERR_NVGPUCTRPERM" in ncu.row("gemv", fake)["absent"]
