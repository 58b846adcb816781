"""The Triton kernels as machine code, compiled with no GPU, against the budgets of bench/static/budgets.json.

What is compiled is what the host side would launch: the core of the cases, and as many of the others as the limit on
compilations leaves room for.
"""

from __future__ import annotations

import os

import pytest

from bench.static import budgets, cases, gpus, metrics, report

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets in this process"),
]


@pytest.mark.parametrize("arch", report.ARCHS)
def test_machine_code(arch: int) -> None:
    """One test an architecture: what compiles slowly is compiled by one process."""
    rows, skipped = report.measure([arch], backends=["triton"], most=cases.MOST, jobs=1)
    assert skipped == []
    every_kernel_is_there(rows, arch)
    rooflines_follow_the_gpus(rows, arch)
    rules = [r for r in budgets.of_arch(f"sm_{arch}") if r["where"].get("backend") != "cuda"]
    assert budgets.unused(rows, rules) == []
    assert budgets.check(rows) == []


def every_kernel_is_there(rows: list[metrics.Row], arch: int) -> None:
    """Within the limit on specialisations, and with all of the core, which has each kernel."""
    assert len(rows) <= cases.MOST
    assert {r.source for r in rows if r.source} <= {"model", "measured"}
    core = [c for c in cases.cases(arch) if c.core]
    assert len(core) <= cases.MOST
    assert {cases.CALLS[c.kernel][:2] for c in core} == {call[:2] for call in cases.CALLS.values()}
    assert {r.kernel.removesuffix("+ds") for r in rows} >= {c.kernel for c in core}


def rooflines_follow_the_gpus(rows: list[metrics.Row], arch: int) -> None:
    """A time on each GPU of the architecture, never longer where bandwidth is larger and the rest equal."""
    for r in rows:
        assert set(r.roofline_us) == set(gpus.of(arch))
        assert all(t > 0 for t in r.roofline_us.values()), r
        assert set(r.bound.values()) <= {"memory", "tensor", "float", "issue"}
        if arch == 90:
            assert r.roofline_us["H200"] <= r.roofline_us["H100"]
