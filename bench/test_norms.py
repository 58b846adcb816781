"""The rows of `python -m bench --op norms` through pytest-benchmark."""

from __future__ import annotations

import pytest

from .ops import norms
from .pytest_rows import Candidate, benchmarked, candidates


@pytest.mark.parametrize("candidate", candidates(norms))
def test_norms(candidate: Candidate, benchmark) -> None:  # type: ignore[no-untyped-def]
    benchmarked(candidate, benchmark)
