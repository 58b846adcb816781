"""The Triton kernels as machine code, compiled with no GPU, against the budgets of bench/static/budgets.json.

What is compiled is what the host side would launch: every configuration that a launch takes without a search, and as
many of the others as the limit on compilations leaves room for.
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
    """Within the limit on specialisations, and with each configuration that a launch takes without a search."""
    assert len(rows) <= cases.MOST
    assert {r.kernel.removesuffix("+ds") for r in rows} == set(cases.CALLS)
    assert {r.source for r in rows if r.source} <= {"model", "measured"}
    left_out = set(cases.cases(arch)) - set(report.chosen(arch, (), cases.MOST))
    assert not [c for c in left_out if c.first]


def rooflines_follow_the_gpus(rows: list[metrics.Row], arch: int) -> None:
    """A time on each GPU of the architecture, never longer where bandwidth is larger and the rest equal."""
    for r in rows:
        assert set(r.roofline_us) == set(gpus.of(arch))
        assert all(t > 0 for t in r.roofline_us.values()), r
        assert set(r.bound.values()) <= {"memory", "tensor", "float", "issue"}
        if arch == 90:
            assert r.roofline_us["H200"] <= r.roofline_us["H100"]
