"""Launch configurations: the tables are complete and valid, the nearest architecture serves, a search is bounded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from peft_kernels import tuning, tuning_user
from peft_kernels.triton_lib import toolchain

KERNELS = ("project", "outer", "forward", "backward")
OLD, NEW = ((3, 6, 0), (12, 8)), ((3, 9, 0), (13, 4))  # versions of Triton and its ptxas
SHAPES = [
    tuning.Shape(m, n, k, r, bits, plain, blocksize)
    for m in (1, 2, 16, 17, 33, 128, 129, 4096, 100_000)
    for n, k in ((1, 1), (576, 576), (14336, 4096))
    for r in (0, 1, 16, 64, 512)
    for bits in (16, 32)
    for plain in (True, False)
    for blocksize in (32, 64, 4096)
]


def compilers(monkeypatch: pytest.MonkeyPatch, versions: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    monkeypatch.setattr(toolchain, "of", lambda arch: toolchain.Toolchain(arch, *versions))


@pytest.mark.parametrize("versions", [OLD, NEW, ((), ())])
@pytest.mark.parametrize("arch", sorted(tuning.architectures().values()))
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_shape_has_a_valid_row(
    kernel: str, arch: str, versions: tuple[tuple[int, ...], tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    compilers(monkeypatch, versions)
    for shape in SHAPES:
        rows = tuning.rows(kernel, arch, shape)
        assert rows, f"{kernel} on {arch} has no row for {shape}"
        for c in rows:
            for size in (c.BM, c.BN, c.BK, c.BR):
                assert size >= 16, c
                assert size & (size - 1) == 0, c
            assert c.num_warps in (1, 2, 4, 8), c
            assert c.source in ("model", "measured"), c
            assert c.programs > 1, c


def test_no_row_is_dead() -> None:
    """Each row serves a shape that no row before it serves with the same configuration."""
    for arch in tuning.architectures().values():
        for kernel in KERNELS:
            served: dict[object, set[tuning.Shape]] = {}
            for row in tuning.table(arch)["kernels"][kernel]:
                fitting = {shape for shape in SHAPES if tuning._fits(row, shape, None)}
                limits = tuple(row.get(k) for k in ("min_triton", "from_registers"))
                before = served.setdefault((tuning._row_config(row, 2), limits), set())
                assert fitting - before, (arch, kernel, row)
                before |= fitting


def test_no_product_of_sm_90_reads_registers_under_a_ptxas_that_overwrites_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 64 features and more the weight as the left operand would be a wgmma's (tests/test_triton_cubins.py looks at
    the machine code)."""
    shapes = [s for s in SHAPES if s.bits == 16]

    def left(arch: str, versions: tuple[tuple[int, ...], tuple[int, ...]]) -> set[bool]:
        compilers(monkeypatch, versions)
        found = [c for s in shapes for kernel in ("forward", "backward") for c in tuning.rows(kernel, arch, s)]
        found += tuning.rows("turned", arch, tuning.Shape(16, 4096, 4096, 0, 16))
        return {c.LEFT for c in found if c.BN >= 64}

    assert left("sm_90", ((3, 8, 0), (12, 9))) == left("sm_90", ((), ())) == {False}
    assert left("sm_90", ((3, 8, 0), (13, 3))) == {True, False}
    assert left("sm_80", OLD) == {True}
    few = tuning.Shape(16, 4096, 4096, 16, 16)
    compilers(monkeypatch, NEW)
    assert tuning.choose("forward", "sm_90", few).BM == 16
    compilers(monkeypatch, OLD)
    assert tuning.choose("forward", "sm_90", few).BM == 64, "a wgmma has 64 rows at least"
    for kernel in ("outer", "project", "attention", "rotate", "rotate_gradient", "reflect_gradient"):
        assert {min(c.BM, c.BN if c.BN > 16 else c.BM) for c in tuning.rows(kernel, "sm_90", few)} <= {16, 32}, kernel


def test_a_row_may_ask_for_a_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"bits": 16, "BM": 64, "min_triton": "3.7"}
    for version, holds in (("3.6.0", False), ("3.7.0", True), ("3.10.1+git12", True), ("", False)):
        assert tuning.compiles(row, toolchain.Toolchain("sm_80", toolchain.numbers(version), (12, 8))) == holds, version
    shape = tuning.Shape(1024, 4096, 4096, 16, 16)
    compilers(monkeypatch, NEW)
    wide = tuning.choose("backward", "sm_80", shape)
    compilers(monkeypatch, OLD)
    assert tuning.choose("backward", "sm_80", shape).num_warps > wide.num_warps, "with four it spills under 3.6"


def test_the_ptxas_is_the_one_that_triton_would_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    other = tmp_path / "ptxas"
    other.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 14.1, V14.1.2'\n")
    other.chmod(0o755)
    toolchain.of.cache_clear()
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        monkeypatch.setenv(name, str(other))
    try:
        found = toolchain.of("sm_90")
        assert (found.triton, found.ptxas) == (toolchain.numbers(triton.__version__), (14, 1))
        other.unlink()
        assert toolchain.of("sm_90") is found, "asked once"
        toolchain.of.cache_clear()
        monkeypatch.setitem(sys.modules, "triton", None)
        assert toolchain.of("sm_90") == toolchain.Toolchain("sm_90")
        assert not toolchain.of("sm_90").wgmma_from_registers
    finally:
        toolchain.of.cache_clear()


@pytest.mark.parametrize(
    ("capability", "arch"),
    [(70, "sm_80"), (80, "sm_80"), (87, "sm_86"), (89, "sm_89"), (90, "sm_90"), (103, "sm_100"), (121, "sm_120")],
)
def test_an_unknown_gpu_uses_the_nearest_older_table(capability: int, arch: str) -> None:
    assert tuning.nearest(capability) == arch
    with tuning.assuming(capability):
        assert tuning.arch_of(torch.device("cpu")) == arch


def test_a_search_times_few_and_keeps_the_fastest() -> None:
    shape = tuning.Shape(4096, 4096, 4096, 16, 16)
    candidates = tuning.rows("forward", "sm_90", shape)
    many = [replace(c, GROUP=g) for g in (1, 2, 4) for c in candidates]
    seconds = {c: 1.0 + i for i, c in enumerate(many)}
    seconds[many[2]] = 0.5
    seconds[many[tuning.MAX_CANDIDATES]] = 0.1  # faster, and beyond the limit
    tried: list[tuning.Config] = []

    def clock(run: object) -> float:
        assert callable(run)
        run()
        return seconds[tried[-1]]

    best = tuning.search(many, tried.append, clock)
    assert len(tried) == tuning.MAX_CANDIDATES
    assert best == replace(many[2], source="measured")


def test_a_configuration_that_does_not_fit_is_passed_over() -> None:
    class OutOfResources(Exception):
        """Named like Triton's, which is known by its name: the tables need no Triton."""

    first, second = tuning.Config(BM=64), tuning.Config(BM=32)

    def run(c: tuning.Config) -> None:
        if c.BM == 64:
            raise OutOfResources

    def clock(launch: object) -> float:
        assert callable(launch)
        launch()
        return 1.0

    assert tuning.search([first, second], run, clock).BM == 32
    with pytest.raises(RuntimeError, match="none of 1 configurations fits"):
        tuning.search([first], run, clock)

    def broken(c: tuning.Config) -> None:
        raise ValueError("a bug, not a lack of room")

    with pytest.raises(ValueError, match="a bug"):
        tuning.search([first, second], broken, clock)


def test_it_searches_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = tuning.Shape(777, 4096, 4096, 16, 16)
    ran: list[tuning.Config] = []

    def clock(run: object, repeats: int = 20) -> float:
        assert callable(run)
        run()
        return float(ran[-1].BM)  # the smallest tile wins

    monkeypatch.setattr(tuning, "_device_seconds", clock)
    monkeypatch.setattr(tuning, "_found", {})
    asked = tuning.choose("forward", "sm_90", shape, ran.append)
    assert asked.source == "model"
    assert ran == []
    with tuning.searching():
        found = tuning.choose("forward", "sm_90", shape, ran.append)
        assert found.source == "measured"
        assert all(found.BM <= c.BM for c in ran)
        times = len(ran)
        assert tuning.choose("forward", "sm_90", replace(shape, M=1000), ran.append) == found, "one search a bucket"
        assert len(ran) == times
    assert tuning.choose("forward", "sm_90", shape, ran.append) == asked


def measured_row(gpu: str, **values: object) -> dict[str, object]:
    shape = tuning.bucket(tuning.Shape(777, 4096, 4096, 16, 16))
    config = replace(tuning.rows("forward", "sm_90", shape)[-1], source="measured")
    return {"gpu": gpu, "kernel": "forward", **asdict(shape), **asdict(config), **values}


@pytest.fixture
def user_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for user tables, on a machine that has one "Card A"."""
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning_user, "gpus", lambda: frozenset({"Card A"}))
    tuning_user.rows.cache_clear()
    yield tuning_user.path("sm_90")
    tuning_user.rows.cache_clear()


def test_a_measured_row_of_the_same_gpu_comes_first(user_table: Path) -> None:
    shape = tuning.Shape(777, 4096, 4096, 16, 16)
    frozen = tuning.choose("forward", "sm_90", shape)
    assert tuning_user.write(user_table, [measured_row("Card A", BM=16), measured_row("Card B", BM=32)]) == 2
    found = tuning.choose("forward", "sm_90", shape)
    assert (found.BM, found.source) == (16, "measured")
    assert tuning.choose("forward", "sm_90", replace(shape, M=1000)) == found, "one bucket"
    assert tuning.choose("forward", "sm_90", replace(shape, N=2048)) == frozen
    with tuning.assuming(90):  # compiling for a GPU that is not here
        assert tuning.choose("forward", "sm_90", shape) == frozen
    assert tuning_user.write(user_table, [measured_row("Card A", BM=64)]) == 2, "in place of the row of that shape"
    assert tuning.choose("forward", "sm_90", shape).BM == 64
    assert [p.name for p in user_table.parent.iterdir()] == ["sm_90.json"], "nothing temporary is left"


def test_a_row_measured_under_other_compilers_counts_where_these_have_it(
    user_table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tuning.Shape(16, 4096, 4096, 16, 16)
    compilers(monkeypatch, NEW)
    of_registers, plain = tuning.rows("forward", "sm_90", few)[0], tuning.rows("forward", "sm_90", few)[-1]
    frozen = tuning.choose("forward", "sm_90", few)

    def measured(config: tuning.Config) -> tuning.Config:
        row = {"gpu": "Card A", "kernel": "forward", **asdict(few), **asdict(replace(config, source="measured"))}
        tuning_user.write(user_table, [row])
        return tuning.choose("forward", "sm_90", few)

    assert measured(of_registers) == replace(frozen, source="measured")
    compilers(monkeypatch, OLD)
    assert measured(of_registers) == tuning.rows("forward", "sm_90", few)[0]
    assert measured(plain) == replace(plain, source="measured")


def test_a_user_table_appears_whole_or_not_at_all(user_table: Path) -> None:
    tuning_user.write(user_table, [measured_row("Card A", BM=16)])
    before = user_table.read_bytes()
    with pytest.raises(TypeError):
        tuning_user.write(user_table, [measured_row("Card A", BM=object())])
    assert user_table.read_bytes() == before
    assert [p.name for p in user_table.parent.iterdir()] == ["sm_90.json"]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 99, "rows": []}', '{"format": 1, "rows": [{"gpu": "Card A"}]}']
)
def test_a_broken_user_table_is_an_error(user_table: Path, text: str) -> None:
    user_table.parent.mkdir()
    user_table.write_text(text)
    with pytest.raises(ValueError, match=r"sm_90\.json: expected a table written by .fastpeft tune.*delete the file"):
        tuning.choose("forward", "sm_90", tuning.Shape(777, 4096, 4096, 16, 16))


def test_user_tables_hold_every_field() -> None:
    assert tuple(f.name for f in fields(tuning.Shape)) == tuning_user.SHAPE
    assert tuple(f.name for f in fields(tuning.Config)) == tuning_user.CONFIG


def test_overrides_nest() -> None:
    shape = tuning.Shape(1, 64, 64, 8, 16)
    before = tuning.choose("forward", "sm_90", shape)
    with tuning.override("forward", BM=64):
        with tuning.override("forward", BN=256):
            inner = tuning.choose("forward", "sm_90", shape)
            assert (inner.BM, inner.BN) == (64, 256)
        assert tuning.choose("forward", "sm_90", shape) == replace(before, BM=64)
    assert tuning.choose("forward", "sm_90", shape) == before


def test_importing_peft_kernels_imports_no_triton() -> None:
    code = (
        "import sys, peft_kernels, peft_kernels.ops.lora_linear.triton; "
        "sys.exit(', '.join(m for m in sys.modules if m.startswith('triton.')) or 0)"
    )
    # torch itself may import the top-level package to look at its version; the compiler must stay out
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
