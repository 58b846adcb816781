"""Chunked cross-entropy against torch's over full logits."""

from __future__ import annotations

import pytest
import torch
from fastpeft.recipes.chunked_loss import chunked_cross_entropy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_kernels.testing import assert_no_worse

N, H, V = 37, 24, 101


def plain(h: Tensor, w: Tensor, b: Tensor | None, t: Tensor, scale: float, softcap: float | None) -> Tensor:
    z = scale * torch.nn.functional.linear(h, w, b)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return torch.nn.functional.cross_entropy(z, t, reduction="sum")


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("chunk_vocab", "chunk_tokens"), [(16, 10), (101, 37), (4096, 1024), (1, 1)])
def test_loss_and_gradients(dtype: torch.dtype, softcap: float | None, chunk_vocab: int, chunk_tokens: int) -> None:
    h, w, b = torch.randn(N, H), torch.randn(V, H), torch.randn(V)
    t = torch.randint(0, V, (N,))
    leaves = [x.to(dtype).requires_grad_() for x in (h, w, b)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    ours = gradients(
        chunked_cross_entropy(*leaves[:2], t, leaves[2], scale=0.5, softcap=softcap, chunk_vocab=chunk_vocab,
                              chunk_tokens=chunk_tokens), leaves)  # fmt: skip
    # What torch computes in this precision: float32 sums for the half types, rounded at the end, as ours.
    eager_leaves = [x.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_() for x in leaves]
    eager = gradients(plain(*eager_leaves, t, 0.5, softcap), eager_leaves)
    right = gradients(plain(*exact, t, 0.5, softcap), exact)
    # The terms behind a gradient: up to the largest weight (hidden) and the sum over tokens (weight, bias).
    magnitudes = [
        torch.tensor(float(N) * 10), exact[1].detach().abs().max().expand(N, H) * 2,
        exact[0].detach().abs().sum(0).expand(V, H), torch.full((V,), float(N)),
    ]  # fmt: skip
    for mine, theirs, best, magnitude in zip(ours, eager, right, magnitudes, strict=True):
        assert_no_worse(mine, theirs.to(mine.dtype), best, magnitude)


def test_each_token_with_a_weight_of_its_own() -> None:
    h, w, b, t = torch.randn(N, H), torch.randn(V, H), torch.randn(V), torch.randint(0, V, (N,))
    weights = torch.rand(N)

    def losses_and_gradient(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        x = h.to(dtype).requires_grad_()
        if ours:
            losses = chunked_cross_entropy(x, w.to(dtype), t, b.to(dtype), chunk_vocab=16, chunk_tokens=10,
                                           reduction="none")  # fmt: skip
        else:
            logits = torch.nn.functional.linear(x, w.to(dtype), b.to(dtype))
            losses = torch.nn.functional.cross_entropy(logits, t, reduction="none")
        return [losses.detach(), *torch.autograd.grad((losses * weights).sum(), [x])]

    eager, exact = losses_and_gradient(torch.float32, False), losses_and_gradient(torch.float64, False)
    ours = losses_and_gradient(torch.float32, True)
    logits = (h.abs() @ w.abs().t() + b.abs()).amax(1)
    assert_no_worse(ours[0], eager[0], exact[0], logits)
    assert_no_worse(ours[1], eager[1], exact[1], w.abs().max() * 2 * weights.unsqueeze(1).expand(N, H))
    with pytest.raises(ValueError, match='reduction="none" needs a frozen weight and bias'):
        chunked_cross_entropy(h, w.requires_grad_(), t, reduction="none")


@pytest.mark.parametrize("confident", [False, True])
def test_native_products_are_as_exact_as_the_models_own_head(confident: bool) -> None:
    h, w, t = torch.randn(N, H), torch.randn(V, H), torch.randint(0, V, (N,))
    if confident:  # softmax of the target near 1, where softmax - 1 cancels
        h = w[t] * 2
    leaves = [h.bfloat16().requires_grad_(), w.bfloat16()]
    ours = gradients(chunked_cross_entropy(*leaves, t, chunk_vocab=16, native_products=True), leaves[:1])
    # A model in bfloat16: logits rounded to it, the softmax in float32, the logits' gradient rounded to it again.
    eager = gradients(
        torch.nn.functional.cross_entropy(torch.nn.functional.linear(*leaves).float(), t, reduction="sum"), leaves[:1]
    )
    exact = [x.detach().double().requires_grad_() for x in leaves]
    right = gradients(plain(exact[0], exact[1], None, t, 1.0, None), exact[:1])
    # The loss and a gradient are sums of terms that were rounded to bfloat16: its epsilon times their magnitudes.
    scores = (exact[0].detach() @ exact[1].detach().t()).abs().amax(1)
    softmax = torch.softmax(exact[0].detach() @ exact[1].detach().t(), 1)
    softmax[torch.arange(N), t] = 1 - softmax[torch.arange(N), t]
    table = exact[1].detach().abs()
    magnitudes = [scores.sum() * 2**16, softmax @ table + scores.unsqueeze(1) * softmax @ table]
    for mine, theirs, best, magnitude in zip(ours, eager, right, magnitudes, strict=True):
        assert_no_worse(mine, theirs.to(mine.dtype), best, magnitude)


def test_gradcheck() -> None:
    h, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 4), (9, 4), (9,)))
    t = torch.randint(0, 9, (5,))
    for softcap in (None, 3.0):
        assert torch.autograd.gradcheck(
            lambda h, w, b, cap=softcap: chunked_cross_entropy(h, w, t, b, softcap=cap, chunk_vocab=2, chunk_tokens=3),
            (h, w, b),
        )


class Largest(TorchDispatchMode):
    """Remembers the largest number of elements that any operation produced."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.shape != (V, H):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_logits_of_all_tokens_never_stand_at_once() -> None:
    h, w = torch.randn(N, H, requires_grad=True), torch.randn(V, H)
    with Largest() as seen:
        chunked_cross_entropy(h, w, torch.randint(0, V, (N,)), chunk_vocab=7, chunk_tokens=11).backward()
    assert seen.numel == max(N * H, 11 * 7)
    with Largest() as seen:
        plain(h, w, None, torch.randint(0, V, (N,)), 1.0, None).backward()
    assert seen.numel == N * V


def test_extreme_logits_stay_finite() -> None:
    h = torch.full((3, H), 300.0, requires_grad=True)
    w = torch.randn(V, H) * torch.linspace(-3, 3, V)[:, None]
    loss = chunked_cross_entropy(h, w, torch.tensor([0, 50, 100]), chunk_vocab=8)
    loss.backward()
    assert h.grad is not None
    assert loss.isfinite()
    assert h.grad.isfinite().all()


def test_no_tokens() -> None:
    h = torch.randn(0, H, requires_grad=True)
    loss = chunked_cross_entropy(h, torch.randn(V, H), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert h.grad is not None
    assert h.grad.shape == (0, H)


def test_bad_input_is_named() -> None:
    h, w = torch.randn(3, H), torch.randn(V, H)
    with pytest.raises(ValueError, match=r"targets must lie in 0\.\.100, got 0\.\.101"):
        chunked_cross_entropy(h, w, torch.tensor([0, 1, 101]))
    with pytest.raises(ValueError, match=r"targets \[3\] expected"):
        chunked_cross_entropy(h, w, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"hidden \[N, H\] and weight"):
        chunked_cross_entropy(h, w[:, 1:], torch.tensor([0, 1, 2]))
