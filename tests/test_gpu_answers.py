"""Answers that follow from rows of a GPU run alone: where one way overtakes another, proposed rows, and the tables
that tools/freeze_tuned.py writes. All numbers here are made up."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import freeze_tuned
import pytest

from bench.gpu import answers
from peft_kernels import tuning

FUSED, PANELS = "triton fused", "triton panels"
Row = dict[str, Any]


def timed_row(m: int, times: dict[str, float], **values: Any) -> Row:
    given = {name: {"graph_s": s, "eager_s": 1.0} for name, s in times.items()}
    return {"op": "lora_linear", "direction": "forward", "dtype": "bf16", "m": m, "shape": "4096x4096",
            "weight": "nf4", "times": given, "title": f"{m} {sorted(values.items())}", **values}  # fmt: skip


# ---- crossovers ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("first", "wins"),
    [((3, 3, 1, 1), 512), ((1, 1, 1, 1), 1), ((3, 3, 3, 3), None), ((1, 3, 1, 1), 512), ((1, 1, 1, 3), None),
     ((3, 2, 1, 1), 512)],
)  # fmt: skip
def test_a_crossing_lasts_to_the_largest_number_of_rows(first: tuple[float, ...], wins: int | None) -> None:
    times = {m: (float(one), 2.0) for m, one in zip((1, 64, 512, 2048), first, strict=True)}
    assert answers.crossing(times) == wins


def test_crossovers_of_our_ways() -> None:
    rows = [timed_row(m, {"cuda": 1.0, FUSED: f, PANELS: 4.0, "dense F.linear": 0.1})
            for m, f in ((16, 2.0), (512, 0.5))]  # fmt: skip
    rows.append(timed_row(8192, {FUSED: 5.0, PANELS: 4.0}))
    found = {(one["first"], one["second"]): one for one in answers.crossovers(rows)}
    assert set(found) == {(PANELS, FUSED), (FUSED, "cuda"), (PANELS, "cuda")}
    assert found[PANELS, FUSED]["from_m"] == 8192
    assert found[PANELS, FUSED]["ratios"] == {16: 0.5, 512: 0.125, 8192: 1.25}
    assert found[FUSED, "cuda"]["from_m"] == 512, "where both were measured"
    assert found[PANELS, "cuda"]["from_m"] is None
    assert answers.in_words(found[FUSED, "cuda"]) == (
        "lora_linear forward 4096x4096: triton fused is faster than cuda from M = 512 on (M=16 0.50x, M=512 2.00x)"
    )
    assert "not up to M = 512" in answers.in_words(found[PANELS, "cuda"])


def test_a_pair_is_compared_by_one_clock() -> None:
    row = timed_row(1, {"a": 1.0, "b": 2.0})
    assert answers.pair(row, "a", "b") == (1.0, 2.0)
    del row["times"]["b"]["graph_s"]
    assert answers.pair(row, "a", "b") == (1.0, 1.0), "the eager clock, of both"
    assert answers.pair(row, "a", "c") is None


# ---- proposed rows ---------------------------------------------------------------------------------------------------
BASE = tuning.Config(BM=16, BN=64, BK=128, BR=16, num_stages=4, programs=264)
WIDER, TALLER = replace(BASE, BN=128), replace(BASE, BM=64, LEFT=False)


def tuned(m: int, *times: tuple[tuning.Config, float], kernel: str = "forward", n: int = 4096, **values: Any) -> Row:
    """A row of the part `tune`."""
    shape = asdict(tuning.Shape(m, n, 4096, 16, 16))
    one = {"kernel": kernel, "shape": shape, "times": [{"seconds": s, "config": asdict(c)} for c, s in times]}
    return {"title": f"{kernel} {n} {m}", "arch": "sm_90", "capability": 90, "timed": [one], **values}


def test_the_fastest_over_all_shapes_is_proposed() -> None:
    rows = [tuned(16, (BASE, 1.0), (WIDER, 0.5), (TALLER, 0.9)),
            tuned(16, (BASE, 10.0), (WIDER, 30.0), (TALLER, 8.0), n=14336)]  # fmt: skip
    assert answers.proposed(rows)["kernels"] == {"forward": [{
        "bits": 16, "max_M": 16, "max_r": 16, "min_blocksize": 64, "BM": 64, "BN": 64, "BK": 128, "BR": 16,
        "num_stages": 4, "programs": 264, "LEFT": False, "source": "measured",
    }]}  # fmt: skip


def test_noise_changes_nothing() -> None:
    (row,) = answers.proposed([tuned(16, (BASE, 1.0), (WIDER, 0.99))])["kernels"]["forward"]
    assert row["BN"] == 64
    (row,) = answers.proposed([tuned(16, (BASE, 1.0), (WIDER, 0.97))])["kernels"]["forward"]
    assert row["BN"] == 128


def test_neighbours_of_one_configuration_are_one_row() -> None:
    rows = [tuned(m, (BASE, 1.0), (WIDER, s)) for m, s in ((1, 2.0), (4, 2.0), (16, 0.5), (64, 2.0))]
    found = answers.proposed(rows)["kernels"]["forward"]
    assert [(row["max_M"], row["BN"]) for row in found] == [(4, 64), (16, 128), (64, 64)]


def test_what_is_wrong_gets_no_row() -> None:
    def wrong(op: str, backend: str, direction: str, dtype: str, m: int) -> str | None:
        return "its test fails" if (backend, direction) == ("triton", "backward") or m == 1 else None

    rows = [tuned(1, (BASE, 1.0)), tuned(16, (BASE, 1.0)), tuned(16, (BASE, 1.0), kernel="outer")]
    found = answers.proposed(rows, wrong)
    assert [row["max_M"] for row in found["kernels"]["forward"]] == [16]
    assert "outer" not in found["kernels"]
    assert {"forward, up to 1 rows: its test fails", "outer, up to 16 rows: its test fails"} <= set(found["refused"])


def pairs(fused: float, weight: str = "nf4", **values: Any) -> list[Row]:
    """The pair at three numbers of rows: panels take 2 s a 1024 rows and 2 more, fused kernels `fused` a 1024."""
    return [timed_row(m, {FUSED: fused * m / 1024, PANELS: 2 + 2 * m / 1024}, weight=weight, **values)
            for m in (512, 1024, 4096)]  # fmt: skip


def test_panels_from_the_forced_pair() -> None:
    found, why = answers.panels([*pairs(5.0), *pairs(9.0, "dense")])
    assert found == {"from_M": 1024, "from_M_dense": 512}
    assert why == []
    # over both shapes: one gains more than the other loses
    rows = [*pairs(5.0), *pairs(1.9, shape="4096x14336"), *pairs(1.0, "dense")]
    found, why = answers.panels(rows)
    assert found == {"from_M": 4096, "from_M_dense": 4097}, "never, as far as was measured"
    found, why = answers.panels(pairs(5.0))
    assert found == {"from_M": 1024}
    assert why == ["from_M_dense: no row has both ways for every shape and direction"]


def test_panels_of_a_wrong_kernel_are_not_read() -> None:
    found, why = answers.panels(pairs(5.0), lambda op, backend, direction, dtype, m: "wrong" if m > 512 else None)
    assert found == {"from_M": 512 + 1}
    assert "from_M, forward of 4096 rows: wrong" in why


def test_two_architectures_are_no_table() -> None:
    with pytest.raises(ValueError, match="one architecture"):
        answers.proposed([tuned(1, (BASE, 1.0)), tuned(1, (BASE, 1.0), arch="sm_80")])


# ---- the tables ------------------------------------------------------------------------------------------------------
@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the tuned tables, which `tuning` reads."""
    folder = tmp_path / "tuned"
    shutil.copytree(tuning.FOLDER, folder)
    monkeypatch.setattr(tuning, "FOLDER", folder)

    def forget() -> None:
        for cached in (tuning.table, tuning._rows, tuning.architectures):
            cached.cache_clear()  # type: ignore[attr-defined]

    forget()
    yield folder
    monkeypatch.undo()
    forget()


def run_of(folder: Path, *rows: Row, fake: bool = False, **parts: list[Row]) -> Path:
    """A run's folder with these rows of `tune`."""
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps({"digest": "d", "fake": fake}))
    for part, given in {"tune": list(rows), **parts}.items():
        lines = ({"digest": "d", **row} for row in given)
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def freeze(run: Path, tables: Path) -> int:
    code = freeze_tuned.main([str(run), "--tables", str(tables)])
    for cached in (tuning.table, tuning._rows):
        cached.cache_clear()  # type: ignore[attr-defined]
    return code


@pytest.mark.parametrize("arch", ["sm_90", "sm_120"])
def test_frozen_rows_are_what_the_tables_then_choose(arch: str, tables: Path, tmp_path: Path) -> None:
    """sm_120's table is that of sm_80 but for the panels, and gets rows of its own."""
    before = {m: tuning.choose("forward", arch, tuning.Shape(m, 4096, 4096, 16, 16)) for m in (1, 16, 17, 4096)}
    facts = {"arch": arch, "capability": int(arch[3:])}
    rows = [tuned(16, (before[16], 1.0), (WIDER, 0.5), **facts), tuned(1, (before[1], 1.0), (WIDER, 3.0), **facts)]
    assert freeze(run_of(tmp_path / "run", *rows, panels=[*pairs(5.0), *pairs(9.0, "dense")]), tables) == 0

    def choose(m: int, **values: Any) -> tuning.Config:
        return tuning.choose("forward", arch, replace(tuning.Shape(m, 4096, 4096, 16, 16), **values))

    assert choose(16) == choose(2) == replace(WIDER, source="measured")
    assert choose(1) == replace(before[1], source="measured"), "confirmed"
    assert choose(17) == before[17], "beyond what was measured"
    assert choose(4096) == before[4096]
    assert choose(16, r=64).source == choose(16, blocksize=32).source == choose(16, plain=False).source == "model"
    limits = tuning.panels(arch)
    assert (limits.from_M, limits.from_M_dense, limits.source) == (1024, 512, "measured")
    assert limits.elements == json.loads((tables / f"{arch}.json").read_text())["panels"]["elements"] > 1
    # another run takes the place of what the first measured, and of nothing else
    count = len(tuning.table(arch)["kernels"]["forward"])
    assert freeze(run_of(tmp_path / "run", tuned(16, (before[16], 1.0), (TALLER, 0.5), **facts)), tables) == 0
    assert choose(16) == replace(TALLER, source="measured")
    assert len(tuning.table(arch)["kernels"]["forward"]) == count - 1
    assert tuning.panels(arch) == limits


def test_a_table_without_news_is_written_as_it_was(tables: Path) -> None:
    for path in tables.glob("*.json"):
        assert freeze_tuned.text(json.loads(path.read_text())) == path.read_text(), path.name


def test_the_rows_of_a_frozen_table_are_valid(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the tests of the tables that are frozen today."""
    spec = importlib.util.spec_from_file_location("law", Path(__file__).with_name("test_triton_tuning.py"))
    assert spec is not None
    assert spec.loader is not None
    law = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(law)
    rows = [tuned(m, (BASE, 1.0), (WIDER, 0.5 if m == 16 else 2.0)) for m in (1, 16, 128)]
    assert freeze(run_of(tmp_path / "run", *rows), tables) == 0
    widths = [row.get("BN") for row in tuning.table("sm_90")["kernels"]["forward"] if row["source"] == "measured"]
    assert widths == [64, 128, 64], "one configuration twice, for rows apart"
    for kernel in law.KERNELS:
        law.test_every_shape_has_a_valid_row(kernel, "sm_90", law.NEW, monkeypatch)
    law.test_no_row_is_dead()


@pytest.mark.parametrize(
    ("rows", "settings", "says"),
    [
        ([tuned(16, (BASE, 1.0))], {"fake": True}, "made up"), ([tuned(16, (BASE, 1.0), fake=True)], {}, "made up"),
        ([tuned(16, (BASE, 1.0), stands_in="native")], {}, "made up"), ([], {}, "timed nothing"),
        ([tuned(16, (BASE, 1.0), capability=103)], {}, "measured on sm_103, which the table of sm_90 serves"),
    ],
)  # fmt: skip
def test_what_is_not_written(
    rows: list[Row], settings: dict[str, bool], says: str, tables: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = {p.name: p.read_bytes() for p in tables.iterdir()}
    assert freeze(run_of(tmp_path / "run", *rows, **settings), tables) == 1
    assert says in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in tables.iterdir()} == before


def test_rows_of_another_tree_and_no_run_are_refused(
    tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert freeze(run_of(tmp_path / "run", tuned(16, (BASE, 1.0), digest="other")), tables) == 1
    assert freeze(tmp_path / "nothing", tables) == 1
    assert "expected the folder of a run" in capsys.readouterr().err


def test_a_kernel_that_its_tests_found_wrong_is_not_written(
    tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (tables / "sm_90.json").read_text()
    judged = [{"title": "tests/test_x.py::test_y", "outcome": "failed", "why": "12 of 64 elements are worse",
               "keys": ["lora_linear triton forward bf16 9-64"]}]  # fmt: skip
    run = run_of(tmp_path / "run", tuned(16, (BASE, 1.0), (WIDER, 0.5)), tests=judged)
    assert freeze(run, tables) == 1
    out = capsys.readouterr()
    assert "left as it is: forward, up to 16 rows: wrong by its tests" in out.out
    assert "12 of 64 elements" in out.out
    assert (tables / "sm_90.json").read_text() == before
