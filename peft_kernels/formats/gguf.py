"""The common parts of GGUF's block formats: their sizes, the check, reading the scales of blocks.

A weight's rows are blocks of `elements` columns, `size` bytes each with the scales inside, as they lie in the file:
`packed` may be mapped memory and is never copied. K is a multiple of `elements`. There are no other parts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..checks import arg_error
from .format import Format, Parts, Shape, check_absent, not_finite, pieces, rows_of


def _check(
    of: str, elements: int, size: int, op: str, packed: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, blocksize: int, _: int, shape: Shape, name: str,
) -> None:  # fmt: skip
    check_absent(op, of, absmax=absmax, nested_absmax=nested_absmax, nested_code=nested_code, offset=offset)
    if blocksize != elements:
        raise arg_error(op, "blocksize", f"{elements} for {of}", blocksize)
    rows, columns = rows_of(shape)
    if columns % elements:
        raise arg_error(op, "shape", f"of rows that are a multiple of {elements} for {of}", tuple(shape))
    need = rows * columns // elements * size
    if packed.numel() != need:
        raise arg_error(op, name, f"{need} bytes for {of} of shape {tuple(shape)}", packed.numel())


def _decode(size: int, values: Callable[[Tensor], Tensor], parts: Parts, shape: Shape) -> Tensor:
    return values(parts.packed.reshape(-1, size)).reshape(tuple(shape))


def _wrong(size: int, halves: tuple[int, ...], parts: Parts, _: Shape) -> str | None:
    blocks = parts.packed.reshape(-1, size)
    if blocks.storage_offset() % 2 or size % 2:
        found = {byte: half_at(blocks, byte) for byte in halves}
    else:  # without a copy of them
        found = {byte: blocks.view(torch.float16)[:, byte // 2] for byte in halves}
    return not_finite(**{f"the scale at byte {byte} of a block": scales for byte, scales in found.items()})


def block_format(
    name: str, number: int, elements: int, size: int, values: Callable[[Tensor], Tensor],
    halves: tuple[int, ...], quantize: Callable[[Tensor], Tensor] | None = None,
) -> Format:  # fmt: skip
    """The `Format` of blocks.

    values(blocks [n, size] uint8): float32 [n, elements]. halves: the bytes of a block where a float16 begins.
    quantize(w [n, elements] float32): the blocks, with the bits that the package gguf gives them.
    """

    def parts_of(w: Tensor, blocksize: int | None) -> Parts:
        if (blocksize or elements) != elements or w.dim() < 1 or w.shape[-1] % elements:
            raise arg_error("quantize", "w", f"of rows in blocks of {elements} for {name}", (tuple(w.shape), blocksize))
        assert quantize is not None
        flat, blocks = w.reshape(-1, elements), w.numel() // elements
        out = w.new_empty((blocks, size), dtype=torch.uint8)
        for some in pieces(blocks, elements):
            out[some] = quantize(flat[some].to(torch.float32))
        out = out.reshape(*w.shape[:-1], w.shape[-1] // elements * size)
        return Parts(out, None, None, None, None, elements, 256)

    return Format(
        name, number, partial(_check, name, elements, size), partial(_decode, size, values),
        partial(_wrong, size, halves), None if quantize is None else parts_of, elements, size, halves,
    )  # fmt: skip


def half_at(blocks: Tensor, byte: int) -> Tensor:
    """float32 [n, 1]: the float16 at this byte of every block."""
    # cloned, as `contiguous` leaves a single block where it lies, which may be at an odd byte
    half = blocks[:, byte : byte + 2].clone(memory_format=torch.contiguous_format)
    return half.view(torch.float16).to(torch.float32)


def low_then_high(quants: Tensor, width: int) -> Tensor:
    """uint8 codes [n, 2 * bytes]: of each `width` bytes the low nibbles, then the high ones."""
    blocks, size = quants.shape
    some = quants.reshape(blocks, size // width, width)
    return torch.stack((some & 15, some >> 4), dim=2).reshape(blocks, 2 * size)


def bits(t: Tensor, shifts: range) -> Tensor:
    """[n, len(shifts), bytes]: the bytes shifted right by each."""
    return torch.stack([t >> s for s in shifts], dim=1)


def half_bytes(t: Tensor) -> Tensor:
    """uint8 [n, 2]: float32 [n, 1] as float16."""
    return t.to(torch.float16).view(torch.uint8)


def inverse(t: Tensor) -> Tensor:
    """1 / t; 0 where t is 0, or so small that there is no such float32."""
    found = 1 / t
    return torch.where(found.isinf(), 0.0, found)


def halves_packed(codes: Tensor) -> Tensor:
    """uint8 [n, 16] of codes [n, 32]: element j below, 16 + j above, each in four bits."""
    return (codes[:, :16] & 15) | (codes[:, 16:] << 4)
