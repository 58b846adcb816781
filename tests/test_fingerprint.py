"""Fingerprint: whether tensors are as they were, however they lie in memory, with and without the native library."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import Fingerprint, native


@pytest.mark.parametrize("library", [True, False])
def test_a_fingerprint(library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not library:
        monkeypatch.setattr(native, "_loaded", {"cpu": "not here"})
    for t in (torch.randn(40, 30), torch.randn(40, 30).t(), torch.randn(40, 60)[:, ::2], torch.randn(3, 1).expand(3, 9),
              torch.arange(9, dtype=torch.uint8), torch.randn(5).bfloat16(), torch.randn(7, dtype=torch.complex128),
              torch.randn(())):  # fmt: skip
        seen = Fingerprint([t])
        assert seen.known
        assert seen.same([t])
        assert not seen.same([t.clone()])
        assert not seen.same([t, t])
        (t[:, 0] if t.stride()[-1:] == (0,) else t).data.mul_(3)
        assert not seen.unchanged()
        assert seen.same_versions()
        seen = Fingerprint([t])
        (t[..., 0] if t.dim() else t).add_(1)
        assert not seen.same_versions()
    empty = Fingerprint([torch.empty(0)])
    assert empty.unchanged()


def test_a_fingerprint_of_what_cannot_be_compared_knows_nothing() -> None:
    with torch.inference_mode():
        inference = torch.ones(3)
    for t in (inference, torch.empty(3, device="meta")):
        seen = Fingerprint([torch.ones(2), t])
        assert not seen.known
        assert not seen.unchanged()
        assert not seen.same_versions()
