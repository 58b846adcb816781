"""The stale-value matrix's short form, how much of it there is, and the one write that nothing sees."""

from __future__ import annotations

import copy

import pytest
import torch
from forms import by_form

from tests.fuzz import stale


def test_nothing_that_is_kept_is_older_than_what_it_is_made_of() -> None:
    pytest.importorskip("bitsandbytes")
    failures = [why for seed in range(by_form(short=60, full_form=6000)) if (why := stale.case(seed))]
    assert not failures, "\n".join(failures)


def test_methods_go_on_every_kind_of_base_and_in_mixed_batches() -> None:
    names = {kind.method.peft_type for kind in stale.KINDS}
    assert len(names) > 20
    for base in ("dense", "nf4 nested"):
        for rows in (False, True):
            fits = {kind.method.peft_type for kind in stale.KINDS if stale._fits(kind, base, rows)}
            assert {"LORA", "OFT", "BOFT", "HRA", "VERA", "IA3"} <= {str(getattr(n, "value", n)) for n in fits}


def test_rows_written_without_a_version_are_seen_by_nothing_until_it_is_said() -> None:
    """A documented limit (docs/architecture.md), of what is kept alone: DoRA's norm."""
    (dora,) = [kind for kind in stale.KINDS if type(kind.variant).__name__ == "Dora"]
    model, x = stale.build(dora, "dense", "no_grad", False), torch.randn(4, stale.K)
    for _ in range(3):
        stale.answer(model, x, "no_grad", False)
    model.get_base_model().lin.base_layer.weight.data[8] *= 5  # of no row that a fingerprint takes an element of
    fresh = copy.deepcopy(model)
    assert not torch.equal(stale.answer(model, x, "no_grad", False), stale.answer(fresh, x, "no_grad", False))
    model.get_base_model().lin.changed()
    assert torch.equal(stale.answer(model, x, "no_grad", False), stale.answer(fresh, x, "no_grad", False))
