"""The rows of `python -m bench --op gated` through pytest-benchmark."""

from __future__ import annotations

import pytest

from .ops import gated
from .pytest_rows import Candidate, benchmarked, candidates


@pytest.mark.parametrize("candidate", candidates(gated))
def test_gated(candidate: Candidate, benchmark) -> None:  # type: ignore[no-untyped-def]
    benchmarked(candidate, benchmark)
