"""The bench: what it measures is stated right, and no speed-up is reported while tests fail or were skipped."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import __main__ as cli
from bench import checks, machine, results
from bench.measure import Candidate, Stats, copies_needed, interleave
from bench.results import Claim, Row, as_lines, write_lines


def row() -> Row:
    stats = {"ours": Stats([1.0, 1.1, 0.9]), "bnb": Stats([2.0, 2.4, 2.2]), "dense": Stats([0.5, 0.5, 0.5])}
    claims = [Claim("eval", ["ours"], ["bnb"], 2.0), Claim("absent", ["ours"], ["not run"], 1.0)]
    return Row("r", {"M": 4}, stats, claims, flops=1e9, nbytes=2e9)


def test_percentiles() -> None:
    s = Stats([float(v) for v in range(11)])
    assert (s.at(0.2), s.median, s.at(0.8)) == (2.0, 5.0, 8.0)
    assert Stats([3.0]).median == 3.0


def test_copies_are_twice_the_cache_and_never_one() -> None:
    assert copies_needed(1 << 20, 32 << 20) == 64
    assert copies_needed(1 << 40, 32 << 20) == 2
    assert copies_needed(1, 32 << 20, most=100) == 100


def test_samples_take_turns_over_all_copies() -> None:
    calls: list[str] = []

    def call(name: str):  # type: ignore[no-untyped-def]
        return lambda: calls.append(name)

    candidates = [Candidate("a", [call("a0"), call("a1")]), Candidate("b", [call("b0"), call("b1")])]
    stats = interleave(candidates, rounds=6, sample_s=1e-9)
    assert {len(s.samples) for s in stats.values()} == {6}
    timed = calls[6:]  # after the three warm-up calls of each
    first_of_round = [timed[i][0] for i in range(0, 12, 2)]
    assert first_of_round == ["a", "b"] * 3, "the order must be rotated"
    assert set(timed) == {"a0", "a1", "b0", "b1"}, "every copy must be used"


def test_lines_hold_rates_and_speed_ups() -> None:
    lines = {line["candidate"]: line for line in as_lines([row()], {"commit": "c"}, speedups=True)}
    assert lines["ours"]["gflops"] == 1.0
    assert lines["ours"]["gbs"] == 2.0
    (ratio,) = lines["ours"]["speedups"]
    assert (ratio["ratio"], ratio["met"], ratio["against"]) == (2.2, True, "bnb")
    assert lines["bnb"]["speedups"] == []


def test_no_speed_up_without_passing_tests() -> None:
    assert all("speedups" not in line for line in as_lines([row()], {}, speedups=False))


def test_lines_are_appended_as_json(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.jsonl"
    write_lines([{"a": 1}], path)
    write_lines([{"a": 2}], path)
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [1, 2]


def test_skipped_checks_are_no_verdict() -> None:
    verdict = checks.check_all(["lora_linear"], skip=True)
    assert not verdict.passed
    assert "skip-checks" in verdict.text


def test_an_op_without_tests_fails_its_check() -> None:
    assert not checks.check("no_such_op").passed


@pytest.mark.parametrize(("code", "passed"), [(0, True), (1, False)])
def test_checks_run_the_tests_and_remember_a_pass(
    code: int, passed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        runs.append(command)
        return SimpleNamespace(returncode=code, stdout="summary line\n")

    monkeypatch.setattr(checks, "SEEN", tmp_path / "seen.json")
    monkeypatch.setattr(subprocess, "run", run)
    first, second = checks.check("lora_linear"), checks.check("lora_linear")
    assert first.passed is second.passed is passed
    assert "summary line" in first.text
    assert len(runs) == (1 if passed else 2), "a pass is remembered, a failure is not"
    assert any("test_lora_linear" in part for part in runs[0])


def test_the_digest_sees_a_changed_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "a.inc"
    source.write_text("1")
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    before = checks.digest([])
    source.write_text("2")
    assert checks.digest([]) != before


def test_bounds_are_measured() -> None:
    bounds = machine.bounds(1)
    assert float(bounds["gflops"]) > 1
    assert float(bounds["gbs"]) > 0.1
    assert machine.bounds_line(bounds).startswith(f"bounds ({bounds['how']}): {bounds['gflops']:.0f} GFLOP/s float32")
    if bounds["how"] == "bench/peak.cpp" and "bf16" in machine.level():
        assert float(bounds["gflops_bf16"]) > 1


def test_products_in_bfloat16_have_its_bound() -> None:
    bounds = {"gflops": 100.0, "gflops_bf16": 200.0}
    assert results.products_bound(bounds, "ours bf16", {}) == 200
    assert results.products_bound(bounds, "native", {"dtype": "bf16"}) == 200
    assert results.products_bound(bounds, "ours f32", {"dtype": "f32"}) == 100
    assert results.products_bound({"gflops": 100.0}, "ours bf16", {}) == 100, "CPUs without such an instruction"


def test_shapes() -> None:
    assert cli.shape("576x1536") == (576, 1536)
    for bad in ("576", "axb", "0x4"):
        with pytest.raises(Exception, match="shape"):
            cli.shape(bad)


def test_the_command_reports_times_only_when_checks_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(machine, "bounds", lambda threads: {"gflops": 1.0, "gbs": 1.0, "how": "test"})
    out = tmp_path / "o.jsonl"
    code = cli.main(
        ["--op", "dequantize_4bit", "--shapes", "64x64", "--dtype", "f32", "--quick", "--skip-checks",
         "--rounds", "5", "--sample-s", "0.0001", "--json", str(out)]
    )  # fmt: skip
    assert code == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["candidate"] for line in lines} >= {"reference", "bitsandbytes"}
    assert all("speedups" not in line for line in lines)
    assert "speed-ups (ratio" not in capsys.readouterr().out
