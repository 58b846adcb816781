"""Calls of the CPU library with arguments that it refuses."""

from __future__ import annotations

import struct

import torch
from format_cases import refused_formats

from peft_kernels import native
from peft_kernels.ops.lora_linear.native import pack


def refused(_rng: object) -> None:
    """Arguments that the library refuses before it reads or writes through any pointer."""
    library, x, code = native.cpu(), torch.randn(2, 32), []
    y = torch.empty(2, 8)
    good = list(struct.unpack("=29q2d13q", pack(1, x, torch.randn(8, 32), None, None, None, None, 0, 64, 256, 8, None,
                                                None, 1.0, None, 0.0, None, y=y)))  # fmt: skip
    for at, value in ((16, -1), (17, -1), (18, -1), (19, -1), (20, 3), (20, -1), (23, 4), (23, -1), (24, 3), (19, 2)):
        args = struct.pack("=29q2d13q", *good[:at], value, *good[at + 1 :])
        code += [library.pk_cpu_lora_linear(args, 1), library.pk_cpu_lora_linear_backward(args, 1)]
    args = struct.pack("=29q2d13q", *good)
    code += [library.pk_cpu_lora_linear(args, n) for n in (0, -1, 17)]
    code += [library.pk_cpu_lora_mixture(args, 0, 1, 0), library.pk_cpu_lora_mixture(args, x.data_ptr(), 0, 0)]
    code += [library.pk_cpu_lora_mixture_backward(args, 0, 1, 0, 0)]
    code += [library.pk_cpu_dora_linear(args, x.data_ptr(), y.data_ptr(), y.data_ptr())]
    code += [library.pk_cpu_lora_linear_paths(args, 1, 2, 0), library.pk_cpu_lora_linear_paths(args, 1, -1, 0)]
    ends = torch.tensor([0, 3])
    for bad, groups in ((ends, 1), (ends - 1, 1), (ends.flip(0), 1), (ends, -1)):
        code += [library.pk_cpu_grouped_linear(args, bad.data_ptr(), groups, 0)]
        code += [library.pk_cpu_grouped_linear_backward(args, bad.data_ptr(), groups, 1)]
    for dtype, rows, n, step, act in ((3, 1, 4, 1, 0), (-1, 1, 4, 1, 0), (0, 1, -1, 1, 0), (0, -1, 4, 1, 0),
                                      (0, 1, 4, 2, 0), (0, 1, 4, 0, 0), (0, 1, 4, 1, 5), (0, 1, 4, 1, -1)):  # fmt: skip
        code += [library.pk_cpu_gated(0, 0, dtype, rows, n, n, 0, step, act, 1.0, 0.0, 0.0, 0, 1)]
    for dtype, other, rows, n, inner in ((3, 0, 1, 1, 1), (0, 3, 1, 1, 1), (0, 0, -1, 1, 1), (0, 0, 1, 0, 1),
                                         (0, 0, 1, 1, 0)):  # fmt: skip
        code += [library.pk_cpu_norm(0, 0, 0, dtype, other, rows, n, inner, 1, 1, 0, 0.0, 0.0, 0, 1)]
    code += [library.pk_cpu_norm(0, 0, y.data_ptr(), 0, 0, 1, 8, 1, 8, 8, 0, 0.0, 0.0, 0, 1)]
    # after pointers (no seed) and strides: 3 dtypes, B, T, S, H, G, D, Dv, R, 3 options, threads, scale, softcap, p
    good = [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 0, 0, 1, 0, 1, 1.0, 0.0, 0.0]
    for at, value in ((0, 3), (3, -1), (4, -1), (5, -1), (6, 0), (7, 2), (8, 3), (9, 3), (9, 0), (13, -1),
                      (17, 0.5), (17, 1.0), (17, -0.1), (17, float("nan"))):  # fmt: skip
        args = struct.pack("=51q3d", *[0] * 36, *good[:at], value, *good[at + 1 :])
        code += [library.pk_cpu_attention(args), library.pk_cpu_attention_backward(args)]
    for dtype, rows, d, b, m in ((3, 1, 4, 2, 1), (0, -1, 4, 2, 1), (0, 1, 4, 3, 1), (0, 1, 8, 2, 4), (0, 1, 4, 2, 63)):
        code += [library.pk_cpu_butterfly_rotate(0, 0, dtype, rows, d, b, m, 0, 0, 0, 1)]
    code += [library.pk_cpu_cayley(0, n, b, 0, terms, 0, 1) for n, b, terms in ((-1, 1, 0), (1, -1, 0), (1, 1, 129))]
    code += [library.pk_cpu_householder_rotate(0, 0, 0, *sizes, 0, 0, 1) for sizes in ((3, 1, 1, 1), (0, 1, 1, -1))]
    code += [library.pk_cpu_pair_rotate(0, 0, 0, *sizes, 0, 1) for sizes in ((3, 1, 2, 1), (0, 1, 3, 1), (0, 1, 2, 0))]
    for dtype, n, block in ((3, 8, 64), (0, -1, 64), (0, 8, 48), (0, 8, 64)):
        code += [library.pk_cpu_quantize_4bit(0, dtype, n, block, 0, 0, 0, 0, 1)]
    code += [library.pk_cpu_quantize_absmax(0, n, 0, block, 0, 0, 0, 1) for n, block in ((4, 0), (-1, 256), (4, 256))]
    code += refused_formats(library)
    code += [library.pk_cpu_adamw(bytes(48), -1, bytes(48), 1), library.pk_cpu_squared_norm(bytes(48), -1, 0, 1)]
    code += [library.pk_cpu_softmax_slice(0, *sizes, 0, 0, 1.0, 0, 0, 0, 0, 1)
             for sizes in ((3, 1, 1), (-1, 1, 1), (0, -1, 1), (0, 1, 0))]  # fmt: skip
    assert all(code), code
