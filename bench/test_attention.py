"""The rows of `python -m bench --op attention` through pytest-benchmark."""

from __future__ import annotations

import pytest

from .ops import attention
from .pytest_rows import Candidate, benchmarked, candidates


@pytest.mark.parametrize("candidate", candidates(attention))
def test_attention(candidate: Candidate, benchmark) -> None:  # type: ignore[no-untyped-def]
    benchmarked(candidate, benchmark)
