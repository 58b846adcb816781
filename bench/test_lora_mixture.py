"""The rows of `python -m bench --op lora_mixture` through pytest-benchmark."""

from __future__ import annotations

import pytest

from .ops import lora_mixture
from .pytest_rows import Candidate, benchmarked, candidates


@pytest.mark.parametrize("candidate", candidates(lora_mixture))
def test_lora_mixture(candidate: Candidate, benchmark) -> None:  # type: ignore[no-untyped-def]
    benchmarked(candidate, benchmark)
