"""The rows of `python -m bench --op swiglu` through pytest-benchmark."""

from __future__ import annotations

import pytest

from .ops import swiglu
from .pytest_rows import Candidate, benchmarked, candidates


@pytest.mark.parametrize("candidate", candidates(swiglu))
def test_swiglu(candidate: Candidate, benchmark) -> None:  # type: ignore[no-untyped-def]
    benchmarked(candidate, benchmark)
