"""The rows of `python -m bench --op dora_norm` through pytest-benchmark."""

from __future__ import annotations

import pytest

from .ops import dora_norm
from .pytest_rows import Candidate, benchmarked, candidates


@pytest.mark.parametrize("candidate", candidates(dora_norm))
def test_dora_norm(candidate: Candidate, benchmark) -> None:  # type: ignore[no-untyped-def]
    benchmarked(candidate, benchmark)
