"""The Triton kernels as machine code, compiled with no GPU, against the budgets of bench/static/budgets.json.

What is compiled is what the host side would launch: every configuration that a launch takes without a search, and as
many of the others as the limit on compilations leaves room for.
"""

from __future__ import annotations

import os
from functools import cache

import pytest

from bench.static import budgets, cases, metrics, report
from peft_kernels import tuning

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets in this process"),
]


@cache
def rows(arch: int) -> list[metrics.Row]:
    """Every row of an architecture. One process: the tests already run in several."""
    found, skipped = report.measure([arch], backends=["triton"], most=cases.MOST, jobs=1)
    assert skipped == []
    return found


@pytest.mark.parametrize("arch", report.ARCHS)
def test_budgets(arch: int) -> None:
    found = rows(arch)
    triton_rules = [r for r in budgets.of_arch(f"sm_{arch}") if r["where"].get("backend") != "cuda"]
    assert budgets.unused(found, triton_rules) == []
    assert budgets.check(found) == []


@pytest.mark.parametrize("arch", report.ARCHS)
def test_what_is_compiled(arch: int) -> None:
    """At most 40 specialisations, every kernel among them, and each configuration that needs no search."""
    found = rows(arch)
    assert len(found) <= cases.MOST
    compiled = {r.kernel.removesuffix("+ds") for r in found}
    assert compiled == set(cases.CALLS)
    # whoever may be left out is in the tables for a search only
    left_out = set(cases.cases(arch)) - set(report.chosen(arch, (), cases.MOST))
    assert not [c for c in left_out if c.first]
    table = tuning.table(tuning.nearest(arch))["kernels"]
    assert {r.source for r in found if r.source} <= {"model", "measured"}
    assert {(c.kernel, c.row) for c in cases.cases(arch) if c.row is not None} == {
        (kernel, i) for kernel, some in table.items() for i in range(len(some))
    }


@pytest.mark.parametrize("arch", [80, 90])
def test_rooflines(arch: int) -> None:
    """A row has a time on each GPU of its architecture, never below its bytes over the bandwidth."""
    for r in rows(arch):
        assert set(r.roofline_us) == {"A100"} if arch == 80 else {"H100", "H200"}
        assert all(t > 0 for t in r.roofline_us.values()), r
        assert set(r.bound.values()) <= {"memory", "tensor", "float", "issue"}
    if arch == 90:
        assert all(r.roofline_us["H200"] <= r.roofline_us["H100"] for r in rows(arch))
