"""Weights in huge pages: which pieces of memory, and that nothing else changes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from fastpeft import use_huge_pages

from peft_kernels import huge_pages
from peft_kernels.huge_pages import PAGE

MIB = 1 << 20


def test_pieces_that_are_half_full_or_fuller() -> None:
    third = 3 * PAGE
    memory = [(third, PAGE), (third, PAGE), (4 * PAGE + MIB // 2, MIB), (6 * PAGE - MIB // 2, MIB), (8 * PAGE, MIB - 1)]
    assert huge_pages._pieces(memory) == [3, 4]  # the same memory counts once
    neighbours = [(10 * PAGE + i * MIB // 4, MIB // 4) for i in range(12)]
    assert huge_pages._pieces(neighbours) == [10, 11]
    assert [*huge_pages._runs([3, 4, 10, 11, 13])] == [(3 * PAGE, 2 * PAGE), (10 * PAGE, 2 * PAGE), (13 * PAGE, PAGE)]


def test_what_is_in_memory_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    t = torch.randn(6 * MIB, generator=torch.Generator().manual_seed(0))
    view, copy, at = t[1::2], t.clone(), t.data_ptr()
    got = use_huge_pages([t, view, torch.empty(3, device="meta"), torch.empty(0)])
    assert torch.equal(t, copy)
    assert t.data_ptr() == at
    t[5] = 7.0
    assert view[2] == 7.0
    assert 0 <= got <= t.nbytes + PAGE
    if got:
        assert huge_bytes(at, t.nbytes) >= got - PAGE
    monkeypatch.setattr(huge_pages, "_madvise", lambda: None)
    assert use_huge_pages([t]) == 0


def huge_bytes(address: int, size: int) -> int:
    """Bytes in huge pages of the mappings that overlap this memory."""
    if not sys.platform.startswith("linux"):
        return 0
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(head[1], 16) < address + size and int(head[2], 16) > address
        elif inside and line.startswith("AnonHugePages:"):
            found += int(line.split()[1]) * 1024
    return found
