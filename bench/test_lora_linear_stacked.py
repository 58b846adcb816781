"""The rows of `python -m bench --op lora_linear_stacked` through pytest-benchmark."""

from __future__ import annotations

import pytest

from .ops import lora_linear_stacked
from .pytest_rows import Candidate, benchmarked, candidates


@pytest.mark.parametrize("candidate", candidates(lora_linear_stacked))
def test_lora_linear_stacked(candidate: Candidate, benchmark) -> None:  # type: ignore[no-untyped-def]
    benchmarked(candidate, benchmark)
