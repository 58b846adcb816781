"""The rows of `python -m bench --op rotations` through pytest-benchmark."""

from __future__ import annotations

import pytest

from .ops import rotations
from .pytest_rows import Candidate, benchmarked, candidates


@pytest.mark.parametrize("candidate", candidates(rotations))
def test_rotations(candidate: Candidate, benchmark) -> None:  # type: ignore[no-untyped-def]
    benchmarked(candidate, benchmark)
