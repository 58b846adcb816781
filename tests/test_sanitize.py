"""The CPU library under sanitizers: recorded calls of its whole C ABI made again (tests/sanitize), and planted faults.

`make test-sanitize` runs the full form: AddressSanitizer with UndefinedBehaviorSanitizer, and ThreadSanitizer, at every
instruction set level. The short form has the planted faults and the released library between pages that cannot be read.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from abi_cases import record
from abi_corpus import Recorder, entry_points
from forms import full
from lora_tools import needs_native
from sanitize_build import ROOT, build, run

from peft_kernels import gated, native, rotary, use_backend

RELEASED = ROOT / "peft_kernels" / "lib" / "libpeft_kernels_cpu.so"
LIBRARY = "libpeft_kernels_cpu.so"
# fault -> the build that finds it, and what is said of it
PLANTED = {
    "heap_read_beyond": ("address", r"heap-buffer-overflow[\s\S]*READ of size 4[\s\S]*in sum_of_task"),
    "heap_write_beyond": ("address", r"heap-buffer-overflow[\s\S]*of size 4[\s\S]*in sum_of_task"),
    "scratch_beyond": ("address", r"use-after-poison[\s\S]*WRITE of size 4[\s\S]*scratch_beyond"),
    "scratch_of_before": ("address", r"use-after-poison[\s\S]*WRITE of size 4[\s\S]*scratch_of_before"),
    "signed_overflow": ("address", r"runtime error: signed integer overflow"),
    "misaligned": ("address", r"runtime error: load of misaligned address"),
    "shift": ("address", r"runtime error: shift exponent 32 is too large"),
    "race_of_tasks": ("thread", r"data race[\s\S]*#0 count "),
    "race_of_callers": ("thread", r"data race[\s\S]*race_of_callers"),
}
pytestmark = needs_native


class Corpus:
    """The recorded calls."""

    def __init__(self, path: Path, full_form: bool) -> None:
        self.path = path
        self.recorder = record(path, full_form)

    def first(self, function: str) -> int:
        """The number of the first call of a function that it served, of those with the most operands."""
        served = [(i, one) for i, one in enumerate(self.recorder.calls) if one.name == function and one.served]
        return max(served, key=lambda pair: sum(size > 0 for size in pair[1].sizes))[0]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("corpus") / "calls", full())


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("few") / "calls", False)


def test_every_entry_point_is_in_the_corpus(few: Corpus) -> None:
    assert {one.name for one in few.recorder.calls if one.served} == set(entry_points())
    exported = re.findall(r"^PK_EXPORT[^;]*?(pk_\w+)\(", (ROOT / "csrc" / "pk_abi.h").read_text(), flags=re.M)
    assert [name for name in exported if not name.startswith("pk_cuda_")] == [*entry_points()]
    for name, types in {**native._CPU_SIGNATURES, **native._CPU_HOLDING}.items():
        given = len(entry_points()[name].parameters)
        assert len(types) == given + (name in native._CPU_HOLDING), name  # whose first type is that of the result


@pytest.mark.parametrize("name", PLANTED)
def test_the_sanitizers_are_on(name: str) -> None:
    kind, said = PLANTED[name]
    program = build(kind, "pk_planted") / "pk_planted"
    assert re.findall(r"CASE\((\w+)\)", (ROOT / "tests" / "sanitize" / "planted.cpp").read_text())[1:] == [*PLANTED]
    sound = run(program, name, 0)
    assert sound.returncode == 0, sound.stdout
    found = run(program, name, 1)
    assert found.returncode not in (0, 2), "nothing was found"
    assert re.search(said, found.stdout), found.stdout


def test_the_released_library_between_pages_that_cannot_be_read(corpus: Corpus) -> None:
    """Masked loads and gathers, too, which sanitizers do not see; and what it gives depends on no other memory."""
    done = run(build("plain", "pk_replay") / "pk_replay", RELEASED, corpus.path, "heap,end,start")
    assert done.returncode == 0, done.stdout
    assert re.search(r"^(\d+) records at \d+ levels: 0 differences$", done.stdout, flags=re.M), done.stdout


def test_the_driver_finds_an_operand_that_is_too_short(few: Corpus) -> None:
    program = build("plain", "pk_replay") / "pk_replay"
    number = few.first("pk_cpu_norm_backward")
    for block in range(4):  # three that are read, one that is written
        done = run(program, RELEASED, few.path, "cut,end", number, block)
        assert done.returncode == 99, done.stdout
        assert f"in record {number}, pk_cpu_norm_backward" in done.stdout


def test_the_driver_finds_other_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit of a number, a code, and what is written to memory that is only read."""
    program = build("plain", "pk_replay") / "pk_replay"

    def one_call() -> Recorder:
        recorder = Recorder(tmp_path / "one")
        with recorder.recording("one"), use_backend("native"):
            gated(torch.randn(5), torch.randn(5))
        recorder.close()
        return recorder

    def says(data: bytes | bytearray, expected: str) -> None:
        (tmp_path / "other").write_bytes(data)
        done = run(program, RELEASED, tmp_path / "other", "heap")
        assert done.returncode == ("0 differences" not in expected), done.stdout
        assert re.search(expected, done.stdout), done.stdout

    at, sound = one_call().calls[0].results, (tmp_path / "one").read_bytes()
    says(sound, "1 records at .* levels: 0 differences")
    code = bytearray(sound)
    code[at] = 3
    says(code, r"pk_cpu_gated \(one\), level \w+, heap: returns 0, recorded 3")
    number = bytearray(sound)
    number[at + 8 + 1 + 4] ^= 1  # after the code, and that the result follows: the second element
    says(number, "block 2 of 20 bytes, element 1: 0x[0-9a-f]{8}, recorded 0x[0-9a-f]{8}")
    declared = entry_points()["pk_cpu_gated"]
    reads = declared._replace(parameters=tuple((name, "const void *" if name == "h" else of_type)
                                               for name, of_type in declared.parameters))  # fmt: skip
    monkeypatch.setitem(entry_points(), "pk_cpu_gated", reads)
    one_call()
    says((tmp_path / "one").read_bytes(), "writes to what it reads, block 2")


def test_a_part_beside_its_whole_is_no_shorter_operand(tmp_path: Path) -> None:
    """Both begin at one address; another call may be given the part alone."""
    recorder = Recorder(tmp_path / "calls")
    whole, angles = torch.randn(1, 3, 4, 6), torch.randn(1, 3, 6)
    with recorder.recording("both"), torch.no_grad(), use_backend("native"):
        rotary(whole, whole[:, :, :1], angles.cos(), angles.sin())
        rotary(whole[:, :2], whole[:, :2, :1], angles[:, :2].cos(), angles[:, :2].sin())
    recorder.close()
    q_sizes = [one.sizes[1] for one in recorder.calls if one.name == "pk_cpu_rotary"]  # behind the arguments
    assert q_sizes == [4 * 3 * 4 * 6, 4 * 2 * 4 * 6]
    done = run(build("plain", "pk_replay") / "pk_replay", RELEASED, tmp_path / "calls", "heap,end,start")
    assert "0 differences" in done.stdout, done.stdout


@pytest.mark.full_form
def test_address_and_undefined_behaviour(corpus: Corpus) -> None:
    folder = build("address", "pk_replay", "peft_kernels_cpu")
    done = run(folder / "pk_replay", folder / LIBRARY, corpus.path, "heap,end,start")
    assert done.returncode == 0, done.stdout[-6000:]
    assert "0 differences" in done.stdout


@pytest.mark.full_form
@pytest.mark.parametrize("name", [name for name, of in entry_points().items() if len(of.parameters) > 1])
def test_a_byte_too_much_is_seen(few: Corpus, name: str) -> None:
    """A call of each function with one operand a byte too short: one of them at least is an error in the library, since
    a call need not read all of each. Pages see what is read by masked loads alone, which GCC's sanitizer does not."""
    folder = build("address", "pk_replay", "peft_kernels_cpu")
    number = few.first(name)
    for where, seen in (("heap", r"heap-buffer-overflow[\s\S]*?#[0-3] .*csrc/cpu/"), ("end", f"in record {number}, ")):
        for block in range(len(few.recorder.calls[number].sizes)):
            done = run(folder / "pk_replay", folder / LIBRARY, few.path, f"cut,{where}", number, block)
            assert done.returncode != 2, done.stdout
            if re.search(seen, done.stdout):
                return
    pytest.fail(f"no operand of record {number} was found too short")


@pytest.mark.full_form
def test_threads_that_call_at_once(corpus: Corpus) -> None:
    """Callers that share what is only read, each with a team of its own; the first calls of all of them, too."""
    folder = build("thread", "pk_replay", "peft_kernels_cpu")
    done = run(folder / "pk_replay", folder / LIBRARY, corpus.path, "threads", os.cpu_count() or 2)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "0 differences" in done.stdout
