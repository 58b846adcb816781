"""The rows of `python -m bench --op quantize_4bit` through pytest-benchmark."""

from __future__ import annotations

import pytest

from .ops import quantize_4bit
from .pytest_rows import Candidate, benchmarked, candidates


@pytest.mark.parametrize("candidate", candidates(quantize_4bit))
def test_quantize_4bit(candidate: Candidate, benchmark) -> None:  # type: ignore[no-untyped-def]
    benchmarked(candidate, benchmark)
