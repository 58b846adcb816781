"""The rows of `python -m bench --op grouped_linear` through pytest-benchmark."""

from __future__ import annotations

import pytest

from .ops import grouped_linear
from .pytest_rows import Candidate, benchmarked, candidates


@pytest.mark.parametrize("candidate", candidates(grouped_linear))
def test_grouped_linear(candidate: Candidate, benchmark) -> None:  # type: ignore[no-untyped-def]
    benchmarked(candidate, benchmark)
