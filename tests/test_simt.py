"""The host stand-in for a GPU (csrc/simt): that it does what PTX says, and that it finds bugs.

tests/simt/planted.cu has kernels with one bug each and their correct twins, tests/simt/warp_ops.cu small uses of what
a warp does together. The builds are those of simt_tools.py; an out-of-bounds access ends its process, which is another.
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable
from ctypes import CDLL, c_char_p, c_int, c_int64, c_uint, c_uint64, c_void_p
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peft_kernels.testing import assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("simt_tools.py")))
SEEDS = tools["SEEDS"]
FOLDER = Path(__file__).with_name("simt")
N = 64

# bug -> what the race-instrumented build says of it
RACE = r"race: thread \d+ (reads|writes|changes) .* that thread \d+.* has (read|written|changed) .* with no barrier"
EARLY = r"thread \d+ reads \w+ \+ \d+ .* that no thread of this block has written yet"
PENDING = r"thread \d+ reads .*, where a cp\.async of thread \d+ is under way: nobody has waited for it"
INSTRUMENTED = {
    "missing_barrier": f"{RACE}|{EARLY}",
    "missing_second_barrier": RACE,
    "two_writers": r"race: thread \d+ writes sum( \+ \d+)? \(two_writers.*\) that thread \d+ has written",
    "bytes_of_a_word": RACE,
    "missing_warp_barrier": f"{RACE}|{EARLY}",
    "warp_barrier_for_a_block": f"{RACE}|{EARLY}",
    "shuffle_for_a_barrier": RACE,
    "half_a_warp": f"{RACE}|{EARLY}",
    "atomic_and_plain": RACE,
    "overlapping_blocks": r"thread \d+ writes global memory at .* that thread \d+ of another block has written",
    "in_place": RACE,
    **dict.fromkeys(
        ("handed_over_without_fence", "handed_over_before_the_barrier", "handed_over_by_fences_of_others",
         "handed_over_and_taken_without_fence", "handed_over_and_taken_by_fences_of_others"),
        r"reads global memory at .* that thread \d+ of another block has written",
    ),
    "unwritten_shared": r"thread 58 reads tile \+ 20 .* that no thread of this block has written yet",
    "async_not_waited": PENDING,
    "async_waits_for_too_few": r"reads dynamic shared memory \+ \d+, where a cp\.async of thread \d+ is under way",
    "async_not_committed": PENDING,
    "async_without_barrier": f"{RACE}|{EARLY}|{PENDING}",
    "async_reuses_too_early": f"{RACE}|{PENDING}",
    "reads_before_the_wait": r"race: thread \d+ reads global .* that thread \d+ of the launch before has written",
    "writes_before_the_wait": r"race: thread \d+ writes global .* that thread \d+ of the launch before has read",
    "read_only_after_the_wait": r"reads global .* by ld\.global\.nc, .*; thread \d+ has written it \(launched_before",
    "misaligned_vector": r"thread \d+ \(planted\.cu:\d+\) uses the address .* not a multiple of 16.*Misaligned",
}
# bug -> what every build says of it
BARRIERS = {
    "divergent_barrier": r"divergent barriers: threads 0-31 wait at __syncthreads \(planted\.cu:\d+\); "
    r"32-63 wait at __syncthreads \(planted\.cu:\d+\)",
    "missed_barrier": r"a barrier that not all threads reach: threads 0-31 have returned; 32-39 wait at __syncwarp .*; "
    r"40-63 wait at __syncthreads",
    "missing_lane": r"threads 0-6, 8-31 wait at __shfl_xor_sync \(.*mask 0xffffffff\); 7, 32-63 wait at __syncthreads",
    "returned_lane": r"a shuffle in which lane 2[89] reads from lane 3[01], which takes no part",
    "not_in_the_mask": r"thread (31|63) calls __ballot_sync with mask 0x7fffffff, which leaves it out",
    "two_masks": r"a barrier that not all threads reach",
    "returns_without_waiting": r"thread 5 returns and has not waited for the launch before",
    "releases_before_it_waits": r"thread \d+ lets the next launch begin and has not waited for the one before",
    "async_misaligned": r"cp\.async of 16 bytes .*, not 16-byte aligned.*Misaligned",
}
# what is read where it is not there yet is NaN, whatever the order
LATE = (
    "async_not_waited", "async_waits_for_too_few", "async_not_committed", "unwritten_shared", "reads_before_the_wait",
)  # fmt: skip
OUT_OF_BOUNDS = {
    "global_read_overrun": "READ of size 4",
    "global_write_overrun": "WRITE of size 4",
    "async_read_overrun": "READ of size 1",
    "shared_overrun": "global-buffer-overflow",
    "dynamic_shared_overrun": "heap-buffer-overflow",
}
CASES = re.findall(r"(?:CASE|AFTER)\((\w+), \d\)", (FOLDER / "planted.cu").read_text())
AFTER = re.findall(r"AFTER\((\w+), \d\)", (FOLDER / "planted.cu").read_text())


def test_every_planted_kernel_is_used():
    assert set(CASES) == {*INSTRUMENTED, *BARRIERS, *OUT_OF_BOUNDS, "order_dependent"}


def planted_library(kind: str) -> CDLL:
    sources = [*sorted(FOLDER.glob("*.cu")), tools["CSRC"] / "cuda" / "runtime.cu"]
    lib = CDLL(str(tools["build"](kind, sources)))
    lib.pk_last_error.restype = lib.pk_simt_build.restype = c_char_p
    lib.pk_simt_set_seed.argtypes = [c_uint64]
    lib.pk_simt_launches.argtypes, lib.pk_simt_launches.restype = [c_int], c_int64
    lib.pk_planted.argtypes = [c_char_p, c_int, c_void_p, c_void_p]
    lib.pk_test_mma.argtypes = [c_int, c_int, c_void_p, c_void_p, c_void_p]
    lib.pk_test_lanes.argtypes = [c_void_p, c_void_p]
    lib.pk_test_atomics.argtypes = [c_void_p, c_void_p, c_int, c_int]
    lib.pk_test_grid.argtypes = [c_uint, c_uint, c_uint, c_uint, c_int, c_void_p]
    lib.pk_test_round.argtypes = [c_void_p] * 3 + [c_int64]
    lib.pk_test_widen.argtypes = [c_void_p] * 3 + [c_int64]
    return lib


@pytest.fixture(scope="module")
def plain() -> CDLL:
    return planted_library("plain")


@pytest.fixture(scope="module")
def races() -> CDLL:
    return planted_library("races")


def run(lib: CDLL, name: str, bug: bool, seed: int) -> tuple[Tensor, str]:
    """The kernel's output (NaN where it wrote nothing), and its error."""
    x, y = torch.arange(12.0 * N) % 17, torch.full((12 * N,), float("nan"))
    lib.pk_simt_set_seed(seed)
    lib.pk_simt_set_device(90 if name in AFTER else 89, 108)
    code = lib.pk_planted(name.encode(), bug, x.data_ptr(), y.data_ptr())
    return y, lib.pk_last_error().decode() if code else ""


@pytest.mark.parametrize("name", [*INSTRUMENTED, *BARRIERS])
def test_the_instrumented_build_finds_it_in_every_order(races, name):
    for seed in SEEDS:
        _, error = run(races, name, True, seed)
        assert re.search({**INSTRUMENTED, **BARRIERS}[name], error), error or "nothing was found"
        assert f"kernel {name}<true>, block (" in error


@pytest.mark.parametrize("name", BARRIERS)
def test_every_build_finds_barriers_that_are_not_met(plain, name):
    for seed in SEEDS:
        _, error = run(plain, name, True, seed)
        assert re.search(BARRIERS[name], error), error or "nothing was found"


@pytest.mark.parametrize("kind", ["plain", "races", "ucontext"])
def test_the_correct_twins_pass(kind):
    lib = planted_library(kind)
    assert lib.pk_simt_build().decode() == ("races" if kind == "races" else "plain")
    for name in CASES:
        first, error = run(lib, name, False, 0)
        assert not error
        assert not first[:N].isnan().any(), name
        for seed in SEEDS:
            again, error = run(lib, name, False, seed)
            assert not error
            assert_same_bits(again, first)


@pytest.mark.parametrize("name", LATE)
def test_what_is_not_there_yet_is_nan(plain, name):
    right = run(plain, name, False, 0)[0]
    for seed in SEEDS:
        wrong, error = run(plain, name, True, seed)
        assert not error
        assert (wrong.isnan() & ~right.isnan()).any()


def test_early_launches_run_before_the_one_before_has_ended(plain, races):
    """From sm_90 on, with the memory that they meet then; what the race detector finds does not hang on that."""
    seen = []  # by the launch before, of what this one should not have written yet
    for seed in SEEDS:
        before = plain.pk_simt_launches(1)
        seen.append(run(plain, "writes_before_the_wait", True, seed)[0][6 * N : 8 * N].any())
        assert plain.pk_simt_launches(1) == before + 1
    assert any(seen)
    x, y = torch.zeros(12 * N), torch.zeros(12 * N)
    for lib in (plain, races):
        before = lib.pk_simt_launches(0), lib.pk_simt_launches(1)
        lib.pk_simt_set_device(89, 108)
        for name in AFTER:  # there they are launches as any other
            assert lib.pk_planted(name.encode(), 1, x.data_ptr(), y.data_ptr()) == 0, name
        assert (lib.pk_simt_launches(0), lib.pk_simt_launches(1)) == (before[0] + 2 * len(AFTER), before[1])


@pytest.mark.parametrize("name", ["order_dependent", "missing_second_barrier", "async_without_barrier"])
def test_seeds_show_what_depends_on_the_order(plain, name):
    def results(bug: bool) -> set[bytes]:
        return {run(plain, name, bug, seed)[0].numpy().tobytes() for seed in SEEDS}

    assert len(results(True)) > 1
    assert results(True) == results(True)  # a seed is an order
    assert len(results(False)) == 1


def test_a_failed_launch_leaves_the_next_one_alone(races):
    assert run(races, "missing_lane", True, 0)[1]
    assert run(races, "two_writers", True, 0)[1]
    assert not run(races, "two_writers", False, 0)[1]


def test_launches_from_another_thread(plain):
    """A backward pass runs on a thread of its own."""
    found: list[Tensor] = []
    worker = threading.Thread(target=lambda: found.append(run(plain, "missing_barrier", False, 0)[0]))
    worker.start()
    worker.join()
    assert_same_bits(found[0], run(plain, "missing_barrier", False, 0)[0])


OUT_OF_BOUNDS_SCRIPT = f"""
import sys
from ctypes import CDLL, c_float
lib, n = CDLL(sys.argv[1]), 12 * {N}
x, y = (c_float * n)(*range(n)), (c_float * n)()
sys.exit(lib.pk_planted(sys.argv[2].encode(), int(sys.argv[3]), x, y))
"""


@pytest.mark.parametrize("name", OUT_OF_BOUNDS)
def test_out_of_bounds_stops_under_address_sanitizer(name):
    sources = [*sorted(FOLDER.glob("*.cu")), tools["CSRC"] / "cuda" / "runtime.cu"]
    library, environment = tools["build"]("asan", sources), tools["asan_environment"]()

    def process(bug: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", OUT_OF_BOUNDS_SCRIPT, str(library), name, str(bug)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    good, bad = process(0), process(1)
    assert good.returncode == 0, good.stderr
    assert bad.returncode != 0
    assert "ERROR: AddressSanitizer" in bad.stderr
    assert OUT_OF_BOUNDS[name] in bad.stderr
    if "clang" not in tools["compiler"]()[1]:  # its runtime would start a symbolizer, which outlives the process
        assert name in bad.stderr or "cp_async16" in bad.stderr, bad.stderr


# ---- what a warp does together ---------------------------------------------------------------------------------------


def product(lib: CDLL, dtype: torch.dtype, how: int, a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    a, b, out = a.to(dtype), b.to(dtype), d.clone()
    assert lib.pk_test_mma(dtype == torch.bfloat16, how, a.data_ptr(), b.data_ptr(), out.data_ptr()) == 0
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_is_a_matrix_product(plain, dtype):
    """Integers, so that every order of sums is exact; past float16's range, so that only float32 sums hold them. The
    fragments once by PTX's tables, once by ldmatrix, once transposed."""
    for _ in range(5):
        a, b = torch.randint(-128, 128, (16, 16)).float(), torch.randint(-128, 128, (8, 16)).float()
        d = torch.randint(-9, 9, (16, 8)).float()
        exact = (d.double() + a.double() @ b.double().T).float()
        for how in (0, 1, 2):
            assert_same_bits(product(plain, dtype, how, a, b, d), exact)
        wrong = product(plain, dtype, 3, a, b, d)  # two registers of a exchanged
        assert not torch.equal(wrong, exact)


def lanes(f: Callable[[int, list[int]], int], values: list[int]) -> list[int]:
    return [f(t % 32, values[t // 32 * 32 : t // 32 * 32 + 32]) for t in range(len(values))]


def test_shuffles_and_votes(plain):
    v = torch.randint(0, 1000, (96,), dtype=torch.int32)
    out = torch.empty(96, 10, dtype=torch.int32)
    assert plain.pk_test_lanes(v.data_ptr(), out.data_ptr()) == 0
    values = v.tolist()

    def ballot(ones: list[bool]) -> int:
        word = sum(int(one) << i for i, one in enumerate(ones))
        return word - (1 << 32) if word >> 31 else word

    expected: list[list[int]] = [
        lanes(lambda i, w: w[3], values),
        lanes(lambda i, w: w[i // 8 * 8 + (i + 1) % 8], values),
        lanes(lambda i, w: w[i ^ 5], values),
        lanes(lambda i, w: w[i - 3] if i >= 3 else w[i], values),
        lanes(lambda i, w: w[i + 3] if i % 16 < 13 else w[i], values),
        lanes(lambda i, w: ballot([x % 3 == 0 for x in w]), values),
        lanes(lambda i, w: int(77 in w), values),
        lanes(lambda i, w: 1, values),
        lanes(lambda i, w: ballot([x % 2 == 1 for x in w[:20]]) if i < 20 else -1, values),
        [10096] * 96,
    ]
    assert out.T.tolist() == expected


def test_atomics(plain):
    v = torch.randint(0, 1 << 20, (5 * 96,), dtype=torch.int32)
    counts = torch.tensor([0, -1, 0, 0, 1 << 30, -1, 0, -1], dtype=torch.int32)
    assert plain.pk_test_atomics(v.data_ptr(), counts.data_ptr(), 5, 96) == 0
    every, some, odd = -1, 0, 0
    for x in v.tolist():
        every, some, odd = every & x, some | x, odd ^ x
    assert counts.tolist()[:7] == [int(v.sum()), every, some, odd, int(v.min()), int(v.max()), 1]
    assert counts[7] in v


def test_grids_and_their_limits(plain):
    for x, y, z, threads, shared in ((1, 1, 1, 1, 0), (3, 2, 4, 33, 400), (7, 1, 2, 1024, 64 << 10)):
        out = torch.empty(x * y * z * threads, dtype=torch.int32)
        assert plain.pk_test_grid(x, y, z, threads, shared, out.data_ptr()) == 0
        assert_same_bits(out, torch.arange(out.numel(), dtype=torch.int32) if shared else torch.full_like(out, -1))
    for bad in ((1, 1, 1, 1025, 0), (1, 1, 1, 0, 0), (0, 1, 1, 32, 0), (1, 65536, 1, 32, 0), (1, 1, 1, 32, 100 << 10)):
        assert plain.pk_test_grid(*bad, None) != 0
        assert re.search(r"grid: .*a launch of .*cudaErrorInvalidConfiguration", plain.pk_last_error().decode())


def test_sixteen_bit_conversions_are_torchs(plain):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    half, bfloat = torch.empty(1 << 16), torch.empty(1 << 16)
    plain.pk_test_widen(every.data_ptr(), half.data_ptr(), bfloat.data_ptr(), every.numel())
    assert_same_bits(half, every.view(torch.float16).float(), any_nan=True)
    assert_same_bits(bfloat, every.view(torch.bfloat16).float(), any_nan=True)
    # each float16 and bfloat16, halfway to the next, a little less and a little more
    near = torch.cat([half, bfloat])
    step = torch.cat([(half.abs() * 2**-11).clamp(min=2.0**-25), bfloat.abs() * 2**-8])
    x = torch.cat([near, near + step, torch.nextafter(near + step, near), torch.nextafter(near + step, 4 * near)])
    got = [torch.empty(x.numel(), dtype=torch.uint16) for _ in range(2)]
    plain.pk_test_round(x.data_ptr(), got[0].data_ptr(), got[1].data_ptr(), x.numel())
    assert_same_bits(got[0].view(torch.float16), x.half(), any_nan=True)
    assert_same_bits(got[1].view(torch.bfloat16), x.bfloat16(), any_nan=True)
