"""The rows of `python -m bench --op lora_linear` through pytest-benchmark."""

from __future__ import annotations

import pytest

from .ops import lora_linear
from .pytest_rows import Candidate, benchmarked, candidates


@pytest.mark.parametrize("candidate", candidates(lora_linear))
def test_lora_linear(candidate: Candidate, benchmark) -> None:  # type: ignore[no-untyped-def]
    benchmarked(candidate, benchmark)
