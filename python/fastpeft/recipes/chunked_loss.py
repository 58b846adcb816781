"""Cross-entropy that never holds the logits of all tokens: only learned tokens, a slice of the vocabulary at a time.

The head's product with one slice of the vocabulary gives a block of logits; as in flash attention, a running maximum
and a running sum turn blocks into the exact softmax. The gradient for the hidden states, ``softmax @ W - W[target]``,
is accumulated in the same sweep and rescaled with the running maximum, so the forward pass reads each slice of W once
for both products and the backward pass multiplies by one number. Peak memory is tokens x slice, not tokens x
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from peft_kernels import QuantWeight, dequantize_4bit, softmax_slice

CHUNK_VOCAB, CHUNK_TOKENS = 4096, 1024
WHOLE_TOKENS = 128  # at a time, where all of a token's scores are made


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor | QuantWeight,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_vocab: int = CHUNK_VOCAB,
    chunk_tokens: int = CHUNK_TOKENS,
    native_products: bool = False,
    reduction: Literal["sum", "none"] = "sum",
) -> Tensor:
    """``-log softmax(logits)[target]``, float32 (float64 for float64 ``hidden``): its sum over tokens, or each [N].

    hidden [N, H]; weight [V, H], dense or quantised (decoded a slice at a time); bias [V]; targets [N] int64 in
    0..V-1. ``logits = cap(scale * (hidden @ weight.T + bias))`` with ``cap(z) = softcap * tanh(z / softcap)`` where
    given.
    native_products: multiply hidden states of bfloat16 in it (float32 sums; float16 on an accelerator as well) instead
    of in float32: twice as fast, and as exact as the model's own head.
    Differentiable in hidden, and with "sum" in weight and bias (a second sweep, made only when needed). With "none" a
    weight or bias that trains is a ValueError: their gradients are made before it is known how tokens are weighted.
    """
    if hidden.dim() != 2 or len(weight.shape) != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [N, H] and weight [V, H] expected, got {list(hidden.shape)} and {list(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets [{hidden.shape[0]}] expected, got {list(targets.shape)}")
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < weight.shape[0]:
        raise ValueError(
            f"targets must lie in 0..{weight.shape[0] - 1}, got {int(targets.min())}..{int(targets.max())}"
        )
    trained = (t for t in (weight, bias) if isinstance(t, Tensor) and t.requires_grad)
    if reduction == "none" and any(True for _ in trained):
        raise ValueError('reduction="none" needs a frozen weight and bias; use "sum" to train the head')
    with torch.autocast(hidden.device.type, enabled=False):  # products and sums are in the dtypes that are named here
        result: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch's apply has no types
            hidden, weight, bias, targets, scale, softcap, chunk_vocab, chunk_tokens, native_products, reduction
        )
    return result


def cross_entropy_by_rows(
    logits: Callable[[Tensor, slice], Tensor], hidden: Tensor, targets: Tensor, rows: int = WHOLE_TOKENS
) -> Tensor:
    """The loss of each token, [N] float32, where logits are made by something that is not one plain matrix.

    logits: ``(hidden[part], part) -> [n, V]``, called for ``rows`` tokens at a time and once more in the backward pass:
    what it reads that trains gets its gradients. hidden [N, H]; targets [N] int64 in 0..V-1.
    """

    def losses(h: Tensor, part: slice) -> Tensor:
        return torch.nn.functional.cross_entropy(logits(h, part).float(), targets[part], reduction="none")

    parts = [slice(i, i + rows) for i in range(0, hidden.shape[0], rows)]
    if not parts:
        return hidden.sum(1).float() * 0
    if not torch.is_grad_enabled():
        return torch.cat([losses(hidden[part], part) for part in parts])
    return torch.cat([checkpoint(losses, hidden[part], part, use_reentrant=False) for part in parts])


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | QuantWeight,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        chunk_vocab: int,
        chunk_tokens: int,
        native_products: bool,
        reduction: str,
    ) -> Tensor:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        product = hidden.dtype if native_products and _multiplies(hidden) else dtype
        head = _Head(weight, bias, scale, softcap, chunk_vocab, dtype, product)
        losses = torch.empty(hidden.shape[:1], dtype=dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=hidden.device) if need_weight else None
        grad_bias = torch.zeros(weight.shape[:1], dtype=dtype, device=hidden.device) if need_bias else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            h, t = hidden[rows].detach().to(product), targets[rows]
            losses[rows], log_sum, gradient = head.sweep(h, t, need_hidden)
            if grad_hidden is not None and gradient is not None:
                grad_hidden[rows] = gradient
            if grad_weight is not None or grad_bias is not None:
                head.weight_gradients(h, t, log_sum, grad_weight, grad_bias)
        ctx.gradients = (
            grad_hidden,
            None if grad_weight is None or not isinstance(weight, Tensor) else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return losses.sum() if reduction == "sum" else losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        factor = grad.unsqueeze(1) if grad.dim() else grad  # one for all tokens, or one for each
        scaled = [None if g is None else g * factor.to(g.dtype) for g in ctx.gradients]
        return (*scaled, None, None, None, None, None, None, None)


def _multiplies(hidden: Tensor) -> bool:
    """True where products of this 16-bit dtype are quick, and summed in float32."""
    if hidden.device.type != "cpu":
        return hidden.dtype in (torch.bfloat16, torch.float16)
    return hidden.dtype is torch.bfloat16 and bool(torch.cpu._is_avx512_bf16_supported())


class _Head:
    """The projection to the vocabulary, slice by slice. dtype: of the softmax and all sums; product: of the factors."""

    def __init__(
        self, weight: Tensor | QuantWeight, bias: Tensor | None, scale: float, softcap: float | None, chunk: int,
        dtype: torch.dtype, product: torch.dtype,
    ) -> None:  # fmt: skip
        self.weight = weight.detach() if isinstance(weight, Tensor) else weight
        self.bias = None if bias is None else bias.detach()
        self.scale, self.softcap, self.chunk, self.dtype, self.product = scale, softcap, chunk, dtype, product

    def _rows(self, index: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the weight in a dtype."""
        if isinstance(self.weight, Tensor):
            return self.weight[index].to(dtype)
        some = self.weight.take(index)
        if some is None:  # blocks of NF4 that straddle rows
            return dequantize_4bit(self.weight, dtype)[index]
        return dequantize_4bit(some, dtype)

    def _logits(self, h: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits of one slice [n, v], the slice of the weight, and tanh(z / softcap) where there is a cap."""
        rows = slice(start, start + self.chunk)
        w = self._rows(rows, self.product)
        z = (h @ w.t()).to(self.dtype)
        if self.bias is not None:
            z += self.bias[rows].to(self.dtype)
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is None:
            return z, w, None
        capped = torch.tanh(z / self.softcap)
        return capped * self.softcap, w, capped

    def sweep(self, h: Tensor, targets: Tensor, need_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Losses [n], logs of the softmax's denominators [n], and the gradients of the losses for ``h`` [n, H]."""
        n = h.shape[0]
        plain = self.bias is None and self.softcap is None and self.dtype is torch.float32
        if plain and softmax_slice.reason(h) is None:
            return self._finished(h, targets, *self._swept(h, targets, need_gradient))
        top = torch.full((n,), -torch.inf, dtype=self.dtype, device=h.device)
        total = torch.zeros(n, dtype=self.dtype, device=h.device)
        at_target = torch.zeros(n, dtype=self.dtype, device=h.device)
        slope = torch.ones(n, dtype=self.dtype, device=h.device)  # of the cap at the target
        mean = torch.zeros(h.shape, dtype=self.dtype, device=h.device) if need_gradient else None
        for start in range(0, self.weight.shape[0], self.chunk):
            logits, w, capped = self._logits(h, start)
            inside = (targets >= start) & (targets < start + self.chunk)
            index = (targets - start).clamp(0, logits.shape[1] - 1).unsqueeze(1)
            at_target = torch.where(inside, logits.gather(1, index).squeeze(1), at_target)
            higher = torch.maximum(top, logits.amax(dim=1))
            rescale = torch.exp(top - higher)
            p = logits.sub_(higher.unsqueeze(1)).exp_()
            total = total * rescale + p.sum(dim=1)
            if mean is not None:
                if capped is not None:
                    slope = torch.where(inside, 1 - capped.gather(1, index).squeeze(1) ** 2, slope)
                    p *= 1 - capped**2
                p.scatter_(1, index, p.gather(1, index).masked_fill_(inside.unsqueeze(1), 0.0))
                if self.product is self.dtype:
                    mean = torch.addmm(mean.mul_(rescale.unsqueeze(1)), p, w)
                else:
                    mean.mul_(rescale.unsqueeze(1)).add_(p.to(self.product) @ w)
            top = higher
        return self._finished(h, targets, top, total, at_target, slope, mean)

    def _swept(
        self, h: Tensor, targets: Tensor, need_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """The sums of a sweep, where scores are products alone and the CPU library makes their exponentials: it reads a
        slice twice, where calls of torch go through it ten times."""
        state, rows = softmax_slice.begin(targets), self.weight.shape[0]
        room = h.new_empty(h.shape[0] * min(self.chunk, rows))  # taken from the system once, not for each slice
        mean = torch.zeros(h.shape, dtype=self.dtype) if need_gradient else None
        for start in range(0, rows, self.chunk):
            w = self._rows(slice(start, start + self.chunk), self.product)
            p = room[: h.shape[0] * w.shape[0]].view(h.shape[0], w.shape[0])
            torch.mm(h, w.t(), out=p)
            rescale = softmax_slice.add(state, p, targets, start, self.scale)
            if mean is not None and self.product is self.dtype:
                mean = torch.addmm(mean.mul_(rescale.unsqueeze(1)), p, w)
            elif mean is not None:
                mean.mul_(rescale.unsqueeze(1)).add_(p @ w)
        top, total, at_target = state
        return top, total, at_target, torch.ones(()), mean

    def _finished(
        self, h: Tensor, targets: Tensor, top: Tensor, total: Tensor, at_target: Tensor, slope: Tensor,
        mean: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """`sweep`'s results of its sums: `mean` is that of exp(score - top) times the rows of the weight."""
        log_sum = top + torch.log(total)
        losses = log_sum - at_target
        if mean is None:
            return losses, log_sum, None
        mean /= total.unsqueeze(1)
        # softmax - 1 at the target as expm1, which keeps the digits of a confident prediction
        mean += self._rows(targets, self.dtype) * (torch.expm1(at_target - log_sum) * slope).unsqueeze(1)
        return losses, log_sum, mean.mul_(self.scale)

    def weight_gradients(
        self, h: Tensor, targets: Tensor, log_sum: Tensor, grad_weight: Tensor | None, grad_bias: Tensor | None
    ) -> None:
        """Add ``(softmax - onehot).T @ h``: the softmax is complete only after a sweep, hence the second one."""
        for start in range(0, self.weight.shape[0], self.chunk):
            logits, _, capped = self._logits(h, start)
            p = logits.sub_(log_sum.unsqueeze(1)).exp_()
            rows = torch.nonzero((targets >= start) & (targets < start + self.chunk)).squeeze(1)
            p[rows, targets[rows] - start] -= 1
            if capped is not None:
                p *= 1 - capped**2
            p *= self.scale
            if grad_weight is not None:
                grad_weight[start : start + self.chunk] += p.t() @ h.to(self.dtype)
            if grad_bias is not None:
                grad_bias[start : start + self.chunk] += p.sum(dim=0)
