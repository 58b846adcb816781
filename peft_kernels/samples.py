"""A small call of every operator, as training makes it: what `explain` is asked with, where no call is at hand."""

from __future__ import annotations

from typing import Any

import torch

_N, _K, _R, _M = 64, 128, 16, 8  # of W [N, K], of the adapter, and rows of x


def sample_call(op: str, device: torch.device | str, dtype: torch.dtype) -> tuple[Any, ...] | None:
    """The arguments of a call of operator `op` with tensors on `device`, x in `dtype`; None for an unknown operator.

    NF4 in blocks of 64 with nested scales, rank 16, adapters in float32. Values are ones and zeros.
    """

    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    if op == "quantize_4bit":
        return (ones(_N, _K, dtype=dtype), 1, 64, True, 256)
    scales = ones(_N * _K // 64, dtype=torch.uint8)
    weight = (ones(_N * _K // 2, dtype=torch.uint8), scales, ones(1), ones(256), ones(1)[0], 1, 64, 256)
    if op == "dequantize_4bit":
        return (*weight, [_N, _K], dtype)
    x, dy = ones(_M, _K, dtype=dtype), ones(_M, _N, dtype=dtype)
    kept = torch.promote_types(dtype, torch.float32)  # of what a forward keeps for its backward
    a, b, s = ones(_R, _K), ones(_N, _R), ones(_M, _R, dtype=kept)
    gain, norm_weight = ones(_N, dtype=kept), ones(_K, dtype=dtype)
    parts = [[part] for part in weight]
    turns, columns = ones(1, 32, 4, 4), ones(_K)
    head, angles = x.view(1, _M, 4, 32), x[None, :, :32]
    rows = torch.zeros(_M, device=device, dtype=torch.int64)
    several = (rows, rows[:1], rows[:1] + _R, ones(1), _R)
    calls: dict[str, tuple[Any, ...]] = {
        "lora_linear": (x, *weight, _N, a, b, 1.0, None, 0.0, None),
        "lora_linear_backward": (dy, x, *weight, a, b, s, 1.0, 0.0, None, True, True),
        "lora_linear_stacked": (x, *parts, [_N], [a], [b], [1.0], [None], [0.0], [None]),
        "lora_linear_stacked_backward": (x, [dy], *parts, [a], [b], [s], [1.0], [0.0], [None], True, [True]),
        "multi_lora_linear": (x, *weight, _N, a, b.t(), *several, None, 0.0, None),
        "multi_lora_linear_backward": (dy, x, *weight, a, b.t(), s, *several, 0.0, None, True, True),
        "dora_linear": (x, *weight, _N, a, b, gain, 1.0, None, 0.0, None, True),
        "dora_linear_normed": (x, *weight, _N, a, b, gain, 1.0, None, 0.0, None, True),
        "dora_linear_backward": (dy, x, *weight, a, b, gain, dy, s, 1.0, 0.0, None, True, True, True),
        "squared_row_norms": (*weight, _N, _K),
        "dora_norm": (*weight, a, b, 1.0, None),
        "butterfly_linear": (x, turns, *weight, _N, gain, None, True),
        "butterfly_linear_backward": (dy, x, turns, *weight, gain, dy, True, True, True),
        "butterfly_rotate": (x, turns, False),
        "butterfly_rotate_backward": (x, x, turns, False, True, True),
        "cayley": (turns[0] - 1, 0),
        "cayley_backward": (turns[0], turns[0] - 1, turns[0], 0),
        "householder_rotate": (x, a, a),
        "householder_rotate_backward": (x, x, a, a, s, True, True),
        "pair_rotate": (x, columns, columns, 32),
        "pair_rotate_backward": (x, x, columns, columns, 32, True, True),
        "rotary_attention": (*[head] * 3, angles, angles, None, 1.0),
        "rotary_attention_backward": (*[head] * 4, angles, angles, None, ones(1, 4, 8, dtype=kept), 1.0),
        "rms_norm": (x, norm_weight, 1e-5),
        "rms_norm_backward": (x, x, norm_weight, 1e-5),
        "swiglu": (x, x),
        "swiglu_backward": (x, x, x),
    }
    return calls.get(op)
