"""Logits that are made when they are asked for: any use of them gives what the model's own give."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")

import fastpeft
from fastpeft.recipes.lazy_logits import LazyLogits

_tools = runpy.run_path(str(Path(__file__).with_name("loss_tools.py")))
V, agree, batch, made, small_chunks = (_tools[n] for n in ("V", "agree", "batch", "made", "small_chunks"))


def lazy(**options: Any) -> tuple[Any, Tensor, Tensor]:
    """A model, its output's logits and what they are."""
    model = made(**options)
    want = model(**batch()).logits
    fastpeft.accelerate(model, layers=False, loss=True)
    return model, model(**batch()).logits, want


def test_logits_are_any_tensor() -> None:
    model, got, want = lazy()
    assert (got.shape, got.dtype, got.device, got.requires_grad, len(got)) == (want.shape, want.dtype, want.device,
                                                                               True, 3)  # fmt: skip
    labels = batch()["labels"]
    for use in (
        lambda z: z.argmax(-1), lambda z: z[..., :-1, :].argmax(dim=-1), lambda z: z.detach().softmax(-1),
        lambda z: z[labels != -100], lambda z: z[0, 3], lambda z: z[:, -1], lambda z: z[..., 5], lambda z: z.max(-1)[1],
        lambda z: torch.cat([z, z]), lambda z: z.reshape(-1, V).split(20)[2].exp(), lambda z: z.numpy(force=True),
        lambda z: z.view(17, 3, V).transpose(1, 2), lambda z: 2 / z, lambda z: z.to(torch.bfloat16) * 2, lambda z: -z,
        lambda z: z.mul(3).div(2).tanh(), lambda z: torch.stack(list(z)), lambda z: F.log_softmax(z, -1)[..., :4],
        lambda z: F.cross_entropy(z.view(-1, V), labels.view(-1), label_smoothing=0.1),
        lambda z: F.cross_entropy(z.transpose(1, 2), labels, reduction="none"), lambda z: copy.deepcopy(z.detach()),
    ):  # fmt: skip
        a, b = use(model(**batch()).logits), use(want)
        a, b = (t.detach() if isinstance(t, Tensor) else t for t in (a, b))
        assert agree(a, b)
        assert type(a) is not LazyLogits or a.shape == b.shape
    # each token's loss, with a weight of its own and a head that trains
    (ours, found), (theirs, right) = (
        (one := F.cross_entropy(z.view(-1, V), labels.view(-1), reduction="none"),
         torch.autograd.grad((one * torch.arange(51)).sum(), [model.model.embed_tokens.weight])[0]) for z in (got, want)
    )  # fmt: skip
    assert agree(ours.detach(), theirs.detach())
    assert agree(found, right)


def test_gradients_reach_the_model_through_logits_too() -> None:
    model, _, want = lazy()
    (right,) = torch.autograd.grad(want.logsumexp(-1).sum(), [model.model.norm.weight])
    got = model(**batch()).logits
    with torch.no_grad():
        got.softmax(-1)  # made first where nothing is recorded: its graph is there nevertheless
    (found,) = torch.autograd.grad(got.logsumexp(-1).sum(), [model.model.norm.weight])
    assert agree(found, right)


def test_writing_to_a_part_is_seen_by_the_whole() -> None:
    model, _, want = lazy()
    with torch.no_grad():
        got = model(**batch()).logits
        early = got[..., :-1, :]
        got[:, 3, 9] = 50.0
        assert (early[:, 3].argmax(-1) == 9).all()
        got = model(**batch()).logits
        got[:, -1][:, 4] = 7.0
        got[0].mul_(2)
        want = want.clone()
        want[:, -1][:, 4] = 7.0
        want[0].mul_(2)
    assert torch.equal(got + 0, want)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


def test_nothing_is_lost_silently() -> None:
    model, got, want = lazy()
    with pytest.raises(RuntimeError, match="give it `logits \\+ 0`"):
        _Square.apply(got).sum().backward()
    assert torch.equal(_Square.apply(got + 0), want * want)
    late = model(**batch()).logits
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="after its head had changed"):
        late.sum()
