"""The rows of `python -m bench --op rms_norm` through pytest-benchmark."""

from __future__ import annotations

import pytest

from .ops import rms_norm
from .pytest_rows import Candidate, benchmarked, candidates


@pytest.mark.parametrize("candidate", candidates(rms_norm))
def test_rms_norm(candidate: Candidate, benchmark) -> None:  # type: ignore[no-untyped-def]
    benchmarked(candidate, benchmark)
