"""The rows of `python -m bench --op multi_lora_linear` through pytest-benchmark."""

from __future__ import annotations

import pytest

from .ops import multi_lora_linear
from .pytest_rows import Candidate, benchmarked, candidates


@pytest.mark.parametrize("candidate", candidates(multi_lora_linear))
def test_multi_lora_linear(candidate: Candidate, benchmark) -> None:  # type: ignore[no-untyped-def]
    benchmarked(candidate, benchmark)
