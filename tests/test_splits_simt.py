"""The cost model of split sums (csrc/cuda/splits.cuh): its choices, and the same ones in the static report."""

from __future__ import annotations

import itertools
import runpy
from ctypes import CDLL, c_int64
from pathlib import Path

import pytest

from bench.static.splits import Split, Sums, step_clocks

tools = runpy.run_path(str(Path(__file__).with_name("simt_tools.py")))
SMS = (1, 16, 108, 128, 132)


@pytest.fixture(scope="module")
def lib() -> CDLL:
    sources = [Path(__file__).with_name("simt") / "splits.cu", tools["CSRC"] / "cuda" / "runtime.cu"]
    lib = CDLL(str(tools["build"]("plain", sources)))
    lib.pk_test_step_clocks.restype = c_int64
    lib.pk_test_step_clocks.argtypes = [c_int64] * 3
    return lib


def choice(lib: CDLL, sums: Sums, sms: int, apart: bool | None = None, arch: int = 90) -> tuple[Split, int]:
    lib.pk_simt_set_device(arch, sms)
    out = (c_int64 * 3)()
    who = (None, False, True).index(apart)
    lib.pk_test_splits((c_int64 * 4)(sums.tiles, sums.steps, sums.step, sums.part), who, out)
    return Split(out[0], bool(out[1])), out[2]


def of(m: int, n: int, k: int, bm: int, small: bool = False) -> Sums:
    """Of y's m x n, in tiles of bm x 128 and steps of 128."""
    return Sums(-(-m // bm) * -(-n // 128), -(-k // 128), step_clocks(bm, 128, 128, small), bm * 128 * 4)


def test_the_report_has_the_kernels_choices(lib: CDLL) -> None:
    for arch, bm in itertools.product((80, 86, 89, 90, 100, 120), (16, 32, 64, 128)):
        lib.pk_simt_set_device(arch, 108)
        assert lib.pk_test_step_clocks(bm, 128, 64) == step_clocks(bm, 128, 64, arch in (86, 89, 120))
    tiles, steps, parts = (1, 8, 31, 32, 112, 500), (0, 3, 8, 32, 112), (8 << 10, 64 << 10)
    for sms, t, s, step, part, apart in itertools.product(SMS, tiles, steps, (585, 2048), parts, (None, False, True)):
        sums = Sums(t, s, step, part)
        split, clocks = choice(lib, sums, sms, apart)
        assert split == sums.split(sms, apart), sums
        assert clocks == sums.clocks(split, sms)
        assert split.parts == 1 or s >= 4 * split.parts
        assert apart is None or split.apart == apart


def test_bytes_of_parts_are_charged(lib: CDLL) -> None:
    """Where parts cost nothing the SMs are filled; the dearer they are the fewer there are, and the last block alone
    adds few bytes only."""
    def sums(part: int) -> Sums:
        return Sums(16, 64, 1024, part)

    free, _ = choice(lib, sums(0), 132)
    found = [choice(lib, sums(1 << i), 132) for i in range(10, 24)]
    counts = [split.parts for split, _ in found]
    assert free.parts == 8
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 1
    clocks = [c for _, c in found]
    assert clocks == sorted(clocks)
    by_kernel = [split.apart for split, _ in found if split.parts > 1]
    assert by_kernel == sorted(by_kernel)
    assert {True, False} == set(by_kernel)


def test_what_large_shapes_get(lib: CDLL) -> None:
    """H100: 128 rows of a 4096^2 layer fill the SMs, and all of them add; 16 rows have parts that one block adds."""
    assert choice(lib, of(128, 4096, 4096, 128), 132)[0] == Split(4, True)
    assert choice(lib, of(128, 1024, 4096, 128), 132)[0] == Split(8, True)
    assert choice(lib, of(16, 4096, 4096, 16), 132)[0] == Split(4, False)
    assert choice(lib, of(512, 14336, 4096, 128), 132)[0].parts == 1
    # an SM of a small GPU takes four times as long for a step
    small = of(64, 2048, 4096, 64, small=True)
    assert choice(lib, small, 128, arch=89)[0].parts == 8
