"""The rows of `python -m bench --op dora_linear` through pytest-benchmark."""

from __future__ import annotations

import pytest

from .ops import dora_linear
from .pytest_rows import Candidate, benchmarked, candidates


@pytest.mark.parametrize("candidate", candidates(dora_linear))
def test_dora_linear(candidate: Candidate, benchmark) -> None:  # type: ignore[no-untyped-def]
    benchmarked(candidate, benchmark)
