"""The Triton kernels as machine code, compiled with no GPU, against the budgets of bench/static/budgets.json.

What is compiled is what the host side would launch: the core of the cases, and as many of the others as the limit on
compilations leaves room for. In the short form each kernel on two architectures. `make test-triton-matrix` runs this
file under every Triton that a CUDA build of torch brings, and the newest.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from forms import full, matrix

from bench.static import budgets, calls, cases, gpus, metrics, report
from peft_kernels.formats import FORMATS

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets in this process"),
]


@pytest.mark.parametrize("arch", report.ARCHS)
def test_machine_code(arch: int) -> None:
    """One test an architecture: what compiles slowly is compiled by one process."""
    if full():
        rows, skipped = report.measure([arch], backends=["triton"], most=cases.MOST, jobs=1)
        assert skipped == []
        here = {name: getattr(rows[0], name) for name in ("arch", "triton", "ptxas")}
        rules = [r for r in budgets.of(**here) if r["where"].get("backend") != "cuda"]
        assert budgets.unused(rows, rules) == []
    else:
        some = [c for c in cases.cases(arch) if c.core and c.kernel in in_short_form(arch)]
        rows = report.distinct([row for case in some for row in report.triton_rows(case, arch)])
    every_kernel_is_there(rows, arch)
    rooflines_follow_the_gpus(rows, arch)
    assert budgets.check(rows) == []


@pytest.mark.parametrize(("arch", "features"), matrix(
    [(arch, features) for arch in report.ARCHS for features in (64, 128, 256)], [(90, 128)]
))  # fmt: skip
def test_attention_in_float32(arch: int, features: int) -> None:
    """A thread reads whole rows of features, so heads of many are the first to spill; the limit above has no room."""
    kernels = ("attention", "attention_queries", "attention_keys")
    some = [calls.Case(kernel, N=features, dtype=torch.float32, p=0.0) for kernel in kernels]
    assert budgets.check([row for case in some for row in report.triton_rows(case, arch)]) == []


@pytest.mark.parametrize(("arch", "name"), matrix(
    [(arch, name) for arch in (80, 90) for name in sorted(FORMATS) if FORMATS[name].number > 2], [(90, "int4")]
))  # fmt: skip
def test_formats(arch: int, name: str) -> None:
    some = [calls.Case(kernel, M=16, N=1024, K=1024, quant_type=name) for kernel in ("forward", "backward")]
    assert budgets.check([row for case in some for row in report.triton_rows(case, arch)]) == []


def in_short_form(arch: int) -> set[str]:
    """Kernels that the short form compiles for an architecture: a third, others on each."""
    at, step = report.ARCHS.index(arch), len(report.ARCHS)
    return {kernel for i, kernel in enumerate(sorted(calls.CALLS)) if (at - i) % step in (0, 2)}


def test_the_short_form_compiles_each_kernel_on_two_architectures() -> None:
    found = Counter(kernel for arch in report.ARCHS for kernel in in_short_form(arch))
    assert found == dict.fromkeys(calls.CALLS, 2)


def every_kernel_is_there(rows: list[metrics.Row], arch: int) -> None:
    """Within the limit on specialisations, and with all of the core, which has each kernel."""
    assert len(rows) <= cases.MOST
    assert {r.source for r in rows if r.source} <= {"model", "measured"}
    core = [c for c in cases.cases(arch) if c.core]
    assert len(core) <= cases.MOST
    assert {calls.CALLS[c.kernel][:2] for c in core} == {call[:2] for call in calls.CALLS.values()}
    wanted = {c.kernel for c in core}
    assert {r.kernel.removesuffix("+ds") for r in rows} >= (wanted if full() else wanted & in_short_form(arch))


def rooflines_follow_the_gpus(rows: list[metrics.Row], arch: int) -> None:
    """A time on each GPU of the architecture, never longer where bandwidth is larger and the rest equal."""
    for r in rows:
        assert set(r.roofline_us) == set(gpus.of(arch))
        assert all(t > 0 for t in r.roofline_us.values()), r
        assert set(r.bound.values()) <= {"memory", "tensor", "float", "issue"}
        if arch == 90:
            assert r.roofline_us["H200"] <= r.roofline_us["H100"]
