"""The rows of `python -m bench --op rotary_attention` through pytest-benchmark."""

from __future__ import annotations

import pytest

from .ops import rotary_attention
from .pytest_rows import Candidate, benchmarked, candidates


@pytest.mark.parametrize("candidate", candidates(rotary_attention))
def test_rotary_attention(candidate: Candidate, benchmark) -> None:  # type: ignore[no-untyped-def]
    benchmarked(candidate, benchmark)
