"""The fuzzer's short form, from fixed seeds; longer with --full and with `python -m tests.fuzz`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forms import by_form
from lora_tools import needs_native

from peft_kernels import dispatch
from peft_kernels.prepared import _ONE_BY_ONE
from tests.fuzz import operands, prepared_calls

ROOT = Path(__file__).resolve().parents[2]


def fuzz(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)


def test_every_operator_and_every_prepared_function_has_a_maker_of_its_arguments() -> None:
    assert operands.missing() == []
    assert set(prepared_calls.MAKERS) == set(_ONE_BY_ONE)


def test_an_operator_without_a_maker_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._ops, "another", next(iter(dispatch.ops().values())))
    assert operands.missing() == ["another"]


@needs_native
@pytest.mark.parametrize(("what", "cases"), [("ops", by_form(short=500, full_form=60_000)),
                                             ("prepared", by_form(short=200, full_form=30_000))])  # fmt: skip
def test_nothing_breaks(what: str, cases: int) -> None:
    done = fuzz("--what", what, "--cases", str(cases), "--minutes", "20")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert done.stdout == f"{what}: {cases} cases from seed 0, 0 failures\n"


def test_prepared_calls_are_held_to_the_terms_of_their_sums() -> None:
    """A sum of 40 terms cancels: the order of the terms decides of its last digits, a lost term of all."""
    terms = torch.randn(40, generator=torch.Generator().manual_seed(0))
    terms[-1] -= terms.sum() - 1e-3
    call, exact = prepared_calls._compare, terms.double().sum().float()[None]
    for order, found in ((terms.flip(0).cumsum(0)[-1:], False), (terms[:-1].sum()[None], True)):
        said = call([order], [exact], None, lambda: [terms.abs().sum()[None]])
        assert bool(said) == found, said
    assert call([exact + 1e-5], [exact], None, lambda: [exact])
    assert prepared_calls.case(7195) is None


def test_a_crash_is_a_failure_of_its_case() -> None:
    """Of a child whose first case is wrong and whose second reads a page behind a tensor."""
    script = (
        "import ctypes, sys, torch\n"
        "from tests.fuzz import __main__ as fuzz, child\n"
        "from tests.fuzz.memory import Guarded\n"
        "def case(seed):\n"
        "    if seed == 1: return 'wrong'\n"
        "    for behind in (False, True):\n"
        "        t = Guarded().empty(5, torch.uint8, behind).fill_(seed)\n"
        "        assert ctypes.string_at(t.data_ptr(), 5) == bytes([seed] * 5)\n"
        "    ctypes.string_at(t.data_ptr(), 6)\n"
        "child._case = lambda given: case\n"
        "sys.exit(fuzz.main())\n"
    )
    command = [sys.executable, "-c", script, "--child", "--what", "ops", "--cases", "9", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -11
    assert done.stdout.splitlines() == ["case 1", "failure wrong", "case 2"]
