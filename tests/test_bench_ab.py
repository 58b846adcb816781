"""The comparison of two checkouts: what runs, in which order, and which line is called slower."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import pytest

from bench import __main__ as cli
from bench import machine, pipes, results
from bench.ab import checkouts, compare
from bench.measure import Stats
from bench.suites import multi, multi_train, qlora

SUITE = """
import time
from types import SimpleNamespace

def rows(args):
    for m in args.m:
        case = {"suite": "dora", "what": "forward", "K": 64, "N": 32, "M": m, "base": "f32"}
        ours = SimpleNamespace(name="DoRA", calls=[lambda: time.sleep(SECONDS)] * 2, enter=None)
        theirs = SimpleNamespace(name="PEFT DoRA", calls=[lambda: 1 / 0], enter=None)
        yield SimpleNamespace(title=f"row M={m}", case=case, candidates=[ours, theirs])
"""
COMMAND = """
import argparse

def parser():
    p = argparse.ArgumentParser()
    p.add_argument("--suite")
    p.add_argument("--only", nargs="+")
    p.add_argument("--shapes", nargs="+")
    p.add_argument("--m", nargs="+", type=int)
    p.add_argument("--quick", action="store_true")
    return p
"""


def fake_checkout(folder: Path, seconds: float) -> Path:
    """A checkout whose bench has one suite, which sleeps, and which does without torch, to be quick."""
    suites = folder / "bench" / "suites"
    suites.mkdir(parents=True)
    (suites / "dora.py").write_text(SUITE.replace("SECONDS", str(seconds)))
    (folder / "bench" / "__main__.py").write_text(COMMAND)
    (folder / "torch.py").write_text("def set_num_threads(count): pass\n")
    return folder


def line(a: float, again: float, b: float, candidate: str = "DoRA", **case: object) -> compare.Line:
    stats = {side: Stats([s]) for side, s in zip(checkouts.SIDES, (a, again, b), strict=True)}
    return compare.Line("row", candidate, case, stats)


@pytest.mark.parametrize(
    ("a", "again", "b", "passed"),
    [(1.0, 1.0, 1.04, True), (1.0, 1.0, 1.06, False), (1.0, 1.1, 1.14, True), (1.0, 0.9, 1.14, True),
     (1.0, 1.1, 1.16, False), (1.0, 1.0, 0.5, True)],
)  # fmt: skip
def test_a_line_may_be_slower_by_five_percent_and_what_a_differs_from_itself(
    a: float, again: float, b: float, passed: bool
) -> None:
    assert line(a, again, b).passed is passed


def test_a_line_whose_a_differs_from_itself_is_noisy() -> None:
    assert [line(1.0, again, 1.0).noisy for again in (1.04, 0.96, 1.06, 0.94)] == [False, False, True, True]


def test_batches_of_64_adapters_at_576_may_be_slower_by_ten_percent() -> None:
    def slack(candidate: str, suite: str, k: int) -> float:
        return line(1.0, 1.0, 1.0, candidate, suite=suite, K=k).slack

    assert slack("64", "multi", 576) == slack("model 64", "multi", 576) == 0.10
    assert slack("16", "multi", 576) == slack("64", "multi", 2048) == slack("64", "dora", 576) == 0.05


def test_only_our_candidates_run() -> None:
    ours = ["DoRA", "LoRA", "1", "64", "model 16", "ours", "m=4", "ours bf16", "frozen"]
    theirs = ["PEFT DoRA", "PEFT 16", "PEFT", "bnb eval bf16", "torch dense f32", "PEFT+bnb bf16"]
    assert [name for name in ours + theirs if compare.is_ours(name, {"base": "NF4"})] == ours
    assert not compare.is_ours("frozen", {"base": "f32"}), "torch's layer alone is not ours"
    for row in (*qlora.WHOLE_MODELS, *multi.WHOLE_MODELS, *multi_train.WHOLE_MODELS):
        assert any(mode.startswith("ours") for mode in row.modes)


def test_sides_take_turns_in_every_order() -> None:
    called: list[tuple[str, str]] = []

    def sample(side: str, name: str) -> float:
        called.append((name, side))
        return 1.0

    stats = checkouts.in_turns(["x", "y"], sample, rounds=12, budget_s=60)
    assert all(len(s.samples) == 12 for by_side in stats.values() for s in by_side.values())
    turns = [called[i : i + 3] for i in range(0, len(called), 3)]
    assert all(len({name for name, _ in turn}) == 1 for turn in turns), "the sides of a name come one after another"
    for name in ("x", "y"):
        orders = Counter(tuple(side for _, side in turn) for turn in turns if turn[0][0] == name)
        assert set(orders) == set(checkouts.ORDERS), "no side always follows the same other one"


def test_a_budget_leaves_five_rounds() -> None:
    stats = checkouts.in_turns(["x"], lambda *_: 1.0, rounds=15, budget_s=0)
    assert len(stats["x"]["B"].samples) == checkouts.LEAST_ROUNDS


def test_checkouts_that_measure_different_things_are_refused() -> None:
    with pytest.raises(ValueError, match="same work in both"):
        checkouts.same_replies("a row", {"A": {"title": "x"}, "A'": {"title": "x"}, "B": {"title": "y"}})


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no checkout|expected the packages of"):
        checkouts.commit_of(tmp_path)


def test_a_process_that_dies_says_why(tmp_path: Path) -> None:
    process = pipes.Process("it", tmp_path, ["-c", "raise SystemExit('out of luck')"], {})
    try:
        with pytest.raises(RuntimeError, match=r"it ended with status 1: out of luck"):
            process.receive()
    finally:
        process.close()


def test_a_slower_checkout_is_found_and_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = fake_checkout(tmp_path / "a", 0.004), fake_checkout(tmp_path / "b", 0.012)
    monkeypatch.setattr(machine, "ROOT", b)
    monkeypatch.setattr(checkouts, "commit_of", lambda checkout: checkout.name)
    monkeypatch.setattr(machine, "describe", lambda threads: {})
    monkeypatch.setattr(machine, "line", lambda info: "a machine")
    monkeypatch.setattr(compare, "ROUNDS_AGAIN", 6)
    out = tmp_path / "o.jsonl"
    command = ["--suite", "dora", "--against", str(a), "--quick", "--m", "8", "--threads", "1", "--json", str(out)]
    assert cli.main(command) == 1
    assert "1 rows, 1 measured again, 1 slower than allowed" in capsys.readouterr().out
    first, second = (json.loads(text) for text in out.read_text().splitlines())
    assert (first["counts"], second["counts"]) == (False, True)
    assert (first["again"], second["again"]) == (False, True)
    assert len(second["B_samples_s"]) == 6
    assert second["row"] == "row M=8"
    assert second["b_of_a"] > second["allowed"]
    assert first["commits"] == {"A": "a", "B": "b"}


def test_a_line_is_found_again_by_its_shape() -> None:
    args = argparse.Namespace(suite="multi", quick=True, shapes=None, m=None, methods=None, modes=None)
    comparison = compare.Comparison(args, ["forward"], Path("a"), Path("b"))
    assert comparison.layer_parts() == ["forward"]
    assert comparison.whole_models() == []
    assert comparison.argv(["forward"], [(576, 64)], [8], ["oft"]) == [
        "--suite", "multi", "--only", "forward", "--quick", "--shapes", "576x64", "--m", "8", "--methods", "oft",
    ]  # fmt: skip


@pytest.mark.parametrize("suite", ["pool", "serve"])
def test_suites_that_measure_themselves_are_refused(suite: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--against compares the suites"):
        cli.main(["--suite", suite, "--against", str(tmp_path)])


@pytest.mark.parametrize(
    ("cpu", "core"),
    [(("AuthenticAMD", 0x1A, 0x02), "zen5"), (("AuthenticAMD", 0x19, 0x11), "zen4"),
     (("AuthenticAMD", 0x19, 0x01), "zen3"), (("AuthenticAMD", 0x17, 0x31), "zen2"),
     (("AuthenticAMD", 0x30, 0x01), "amd-epyc"), (("GenuineIntel", 6, 0x8F), "amd-epyc"), (None, "amd-epyc")],
)  # fmt: skip
def test_files_of_results_name_the_core(
    cpu: tuple[str, int, int] | None, core: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cpu_family", lambda: cpu)
    monkeypatch.setattr(machine, "cpu_name", lambda: "AMD EPYC")
    assert machine.name(2) == f"{core}-2threads"
    assert results.default_path("qlora", machine.name(2)).name == f"qlora-{core}-2threads.jsonl"
