"""A token of an accelerated model after what is in a cache, with what its layers keep and without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from fastpeft.families.head import CALL
from fastpeft.families.projections import KeptGiven
from fastpeft.families.token import Kept, Tokens
from torch import Tensor

from peft_kernels.testing import assert_same_bits

IDS = torch.arange(3, 12).view(1, -1)


def states(found: Any) -> list[Any]:
    return [m.__dict__["_fastpeft"] for m in found.modules() if "_fastpeft" in m.__dict__]


def token(found: Any, cache: Any, **options: Any) -> Tensor:
    """Logits of a token after what is in a cache, which stays as it was."""
    with torch.no_grad():
        return found(input_ids=IDS[:, :1], past_key_values=copy.deepcopy(cache), **options).logits  # type: ignore[no-any-return]


def fresh(found: Any, cache: Any, **options: Any) -> Tensor:
    """`token` with nothing kept, so that everything is looked at."""
    for state in states(found):
        state.tokens, state.mlp_token, state.given = Tokens(), Kept(), KeptGiven()
    found.get_base_model().lm_head.__dict__.pop(CALL, None)
    return token(found, cache, **options)


def begun(found: Any) -> Any:
    """A cache of `IDS`, after two tokens, from which on layers keep what they looked at."""
    with torch.no_grad():
        cache = found(input_ids=IDS, use_cache=True).past_key_values
    for _ in range(2):
        token(found, cache)
    return cache


def seen(found: Any, change: Callable[[Any], Any]) -> None:
    """Assert that a change, made after tokens that keep, is seen in the next."""
    cache = begun(found)
    before = token(found, cache)
    assert_same_bits(before, fresh(found, cache))
    for _ in range(2):
        token(found, cache)
    change(found)
    after = token(found, cache)
    assert_same_bits(after, fresh(found, cache))
    assert not torch.equal(after, before)
