"""Triton backend of butterfly_rotate: the host side.

The m factors of a group of P = b * 2^(m - 1) features, as far as they reach, are multiplied into one block of P
first: as many operations as turning P rows. Then x is read once and written once, in tiles on tensor cores, whatever m;
at P <= 256 that stays bound by memory. The gradient of those blocks is one product over the rows of x and dy, and goes
back through the factors as it would through P rows. Blocks below 16 are turned several at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ...triton_lib import host
from . import _reference, _reference_backward

MOST = 256  # features of a group: beyond, a dense block costs more than factors one after another
LEAST = 16  # of tl.dot
SPLIT = 1024  # rows of one part of the blocks' gradient


def _reach(blocks: Tensor) -> int:
    return int(blocks.shape[2]) << (int(blocks.shape[0]) - 1)


def _identities(blocks: Tensor, d: int, reach: int) -> Tensor:
    """[P, d]: an identity for each group."""
    return torch.eye(reach, dtype=torch.float32, device=blocks.device).repeat(1, d // reach)


def _composed(blocks: Tensor, d: int, transposed: bool) -> Tensor:
    """[d / P or 1, P, P] float32, contiguous: what each group is multiplied by from the right."""
    if blocks.shape[0] == 1:
        factor = blocks[0].to(torch.float32)
        return (factor.mT if transposed else factor).contiguous()
    reach = _reach(blocks)
    rows = _reference(_identities(blocks, d, reach), blocks.to(torch.float32), transposed)
    return rows.view(reach, d // reach, reach).transpose(0, 1).contiguous()


def _tiles(size: int) -> tuple[int, int]:
    """(groups a tile, width of the tile)."""
    several = max(1, LEAST // size)
    return several, max(LEAST, 1 << (several * size - 1).bit_length())


def _rotate(x: Tensor, matrices: Tensor) -> Tensor:
    from .triton_kernels import rotate_kernel

    (m, d), size = x.shape, matrices.shape[-1]
    y, (several, width) = torch.empty_like(x), _tiles(size)
    c = tuning.choose("rotate", tuning.arch_of(x.device), tuning.Shape(m, d, d, 0, x.element_size() * 8))
    rows, columns, depth = (c.BM if m > 16 else LEAST), min(width, 128), min(width, 64)
    groups = -(-(d // size) // several)
    host.launch(
        rotate_kernel, (-(-m // rows), groups, -(-width // columns)), x, matrices, y, m, d, d // size,
        SIZE=size, SEVERAL=several, SHARED=len(matrices) == 1, BM=rows, BN=columns, BK=depth,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return y


def _gradient(x: Tensor, dy: Tensor, size: int) -> Tensor:
    """[d / P, P, P]: x^T dy of each group, in float32; parts of the rows are added in their order."""
    from .triton_kernels import gradient_kernel

    (m, d), (several, width) = x.shape, _tiles(size)
    c = tuning.choose("rotate_gradient", tuning.arch_of(x.device), tuning.Shape(m, d, d, 0, x.element_size() * 8))
    parts, groups, tile = max(1, -(-m // SPLIT)), d // size, min(width, c.BN)
    out = torch.empty(parts, groups, size, size, dtype=torch.float32, device=x.device)
    host.launch(
        gradient_kernel, (parts, -(-groups // several), (width // tile) ** 2), x, dy, out, m, d, groups,
        SIZE=size, SEVERAL=several, ACROSS=width // tile, SPLIT=SPLIT, BM=c.BM if m > 16 else LEAST, BT=tile,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)


def forward(x: Tensor, blocks: Tensor, transposed: bool) -> Tensor:
    """y."""
    x = x.contiguous()
    return _rotate(x, _composed(blocks, x.shape[1], transposed))


def backward(
    dy: Tensor, x: Tensor, blocks: Tensor, transposed: bool, need_dx: bool, need_dblocks: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dblocks)."""
    dy, x, d = dy.contiguous(), x.contiguous(), x.shape[1]
    dx = _rotate(dy, _composed(blocks, d, not transposed)) if need_dx else x.new_empty((0,))
    if not need_dblocks:
        return dx, blocks.new_empty((0,))
    reach = _reach(blocks)
    each = _gradient(x, dy, reach)
    if blocks.shape[0] == 1:
        each = (each.mT if transposed else each)[None]
        return dx, each.sum_to_size(blocks.shape).to(blocks.dtype)
    rows = each.transpose(0, 1).reshape(reach, d)
    back = _reference_backward(rows, _identities(blocks, d, reach), blocks.to(torch.float32), transposed, False, True)
    return dx, back[1].to(blocks.dtype)


def _refusal(*args: Any) -> str | None:
    x, blocks = (args[0], args[1]) if args[1].dim() == 4 else (args[1], args[2])
    reach = _reach(blocks)
    return f"factors reach {reach} features, above {MOST}" if reach > MOST else host.wrong_mode(x)


BACKENDS = host.backends({"butterfly_rotate": forward, "butterfly_rotate_backward": backward}, _refusal)
