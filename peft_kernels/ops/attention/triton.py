"""Triton backend of attention: the host side. Queries and keys are turned by torch, before and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ...triton_lib import host
from ..lora_linear import triton as lora
from . import _turned, _turned_back

MOST = 256  # features of a head: tiles of whole rows lie in the registers of a program
OTHERS = 16  # of what it goes through at a time: `mma.sync` holds both factors in registers, and more would spill


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _turn(x: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Tensor:
    """x, or x turned, [B, T, heads, D] by any strides."""
    return _dense(x) if cos is None else _dense(_turned(x, cos, sin, interleaved).transpose(1, 2))


def _tile(features: int) -> int:
    return max(16, 1 << (features - 1).bit_length())


class _Call:
    """The arguments that all kernels of a call share."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor | None, ...], scale: float, causal: bool,
        window: int, softcap: float, dropout_p: float, seed: Tensor | None,
    ) -> None:  # fmt: skip
        spans, keep, bias, slopes = tables
        keep, bias = (t if t is None else _dense(t) for t in (keep, bias))
        drop = lora._Dropout(dropout_p, seed, k.shape[1], q)
        _, tokens, heads, d = q.shape
        dv, wide = v.shape[3], max(q.shape[3], v.shape[3])
        self.config = tuning.choose(
            "attention", tuning.arch_of(q.device), tuning.Shape(tokens, wide, wide, 0, q.element_size() * 8)
        )
        self.tables = (
            q if spans is None else spans.contiguous(), q if keep is None else keep.view(torch.uint8),
            q if bias is None else bias, q if slopes is None else slopes.float().contiguous(),
            drop.seed,
        )  # fmt: skip
        self.strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        self.sizes = (
            *((0, 0) if keep is None else keep.stride()[:2]), *((0, 0, 0) if bias is None else bias.stride()[:3]),
            tokens, k.shape[1], heads, k.shape[2], d, dv, window, scale, softcap, *drop.arguments,
        )  # fmt: skip
        self.options = {"CAUSAL": causal, "WINDOW": window > 0, "SPANS": spans is not None, "KEEP": keep is not None,
                        "BIAS": bias is not None, "SLOPES": slopes is not None, "SOFTCAP": softcap > 0.0,
                        **drop.constants, "PRECISION": "ieee", "BD": _tile(d), "BV": _tile(dv),
                        "num_warps": self.config.num_warps, "num_stages": self.config.num_stages}  # fmt: skip

    def tiles(self, keys: bool = False) -> dict[str, int]:
        """BM: queries, BN: keys. keys: a program has keys, not queries."""
        return {"BM": OTHERS, "BN": self.config.BM} if keys else {"BM": self.config.BM, "BN": OTHERS}


def forward(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, spans: Tensor | None, keep: Tensor | None,
    bias: Tensor | None, slopes: Tensor | None, sinks: Tensor | None, scale: float, interleaved: bool, causal: bool,
    window: int, softcap: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, lse)."""
    from .triton_kernels import forward_kernel

    batch, tokens, heads, _ = q.shape
    q, k, v = _turn(q, cos, sin, interleaved), _turn(k, cos, sin, interleaved), _dense(v)
    y, lse = q.new_empty((batch, tokens, heads, v.shape[3])), q.new_empty((batch, heads, tokens), dtype=torch.float32)
    call = _Call(q, k, v, (spans, keep, bias, slopes), scale, causal, window, softcap, dropout_p, seed)
    tiles = call.tiles()
    host.launch(
        forward_kernel, (-(-tokens // tiles["BM"]), heads, batch), q, k, v, *call.tables,
        q if sinks is None else sinks.float().contiguous(), y, lse, *call.strides, *call.sizes,
        SINKS=sinks is not None, **tiles, **call.options,
    )  # fmt: skip
    return y, lse


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cos: Tensor | None, sin: Tensor | None,
    spans: Tensor | None, keep: Tensor | None, bias: Tensor | None, slopes: Tensor | None, scale: float,
    interleaved: bool, causal: bool, window: int, softcap: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv)."""
    from .triton_kernels import keys_kernel, queries_kernel

    batch, tokens, heads, d = q.shape
    keys, groups, dv_width = v.shape[1:]
    along = (dy.float() * y.float()).sum(-1).transpose(1, 2).contiguous()
    dy, q, k, v = _dense(dy), _turn(q, cos, sin, interleaved), _turn(k, cos, sin, interleaved), _dense(v)
    dq, dk = q.new_empty((batch, tokens, heads, d)), q.new_empty((batch, keys, groups, d))
    dv = q.new_empty((batch, keys, groups, dv_width))
    call = _Call(q, k, v, (spans, keep, bias, slopes), scale, causal, window, softcap, dropout_p, seed)
    given = (dy, q, k, v, *call.tables, lse.contiguous(), along)
    numbers = (*dy.stride()[:3], *call.strides, *call.sizes)
    tiles = call.tiles()
    host.launch(queries_kernel, (-(-tokens // tiles["BM"]), heads, batch), *given, dq, *numbers, **tiles,
                **call.options)  # fmt: skip
    tiles = call.tiles(keys=True)
    host.launch(keys_kernel, (-(-keys // tiles["BN"]), groups, batch), *given, dk, dv, *numbers, **tiles,
                **call.options)  # fmt: skip
    if cos is not None:
        dq, dk = (_turned_back(t.transpose(1, 2), cos, sin, interleaved) for t in (dq, dk))
    return dq, dk, dv


def _within_a_row(t: Tensor) -> int:
    return sum((n - 1) * stride for n, stride in zip(t.shape[1:], t.stride()[1:], strict=True)) if t.numel() else 0


def _refusal(*args: Any) -> str | None:
    backward_of = len(args) == 19  # begins with dy
    q, k, v = args[1:4] if backward_of else args[:3]
    tensors, y = [q, k, v, args[0]], q.shape[1] * q.shape[2] * v.shape[3]
    if max(map(_within_a_row, tensors)) >= 2**31 or max(y, *(t[:1].numel() for t in tensors)) >= 2**31:
        return "2^31 elements in a row of the batch: offsets within one are 32 bits wide"
    if max(q.shape[0], q.shape[2]) > host.MOST_BLOCKS:
        return f"more than {host.MOST_BLOCKS} heads, or rows of the batch: each has blocks of a launch to itself"
    wide = max(q.shape[3], v.shape[3])
    return f"heads of more than {MOST} features" if wide > MOST else host.wrong_mode(q)


BACKENDS = host.backends({"attention": forward, "attention_backward": backward}, _refusal)
