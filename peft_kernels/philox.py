"""Dropout masks from a counter: no mask is ever stored, and every backend drops the same elements.

Element `e` (row-major index into the flattened [M, K] input) takes word `e & 3` of Philox4x32-10 with
key = (seed low, seed high) and counter = (low, high of `e >> 2`, 0, 0). It is dropped iff that 32-bit word is below
`threshold(p)`; what stays is scaled by 1 / (1 - p). Source: Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011. The reference here works in int64, where products of 32-bit words wrap without losing bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import moved

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def threshold(p: float) -> int:
    """The 32-bit bound below which a word means "dropped"."""
    return min(round(p * 2**32), _MASK)


def _mulhilo(m: int, v: Tensor) -> tuple[Tensor, Tensor]:
    # m * v needs 64 unsigned bits; int64 wraps to the same bits, and the mask undoes the sign of the shift
    prod = v * m
    return (prod >> 32) & _MASK, prod & _MASK


def words(index: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words (in int64) for each 64-bit counter in `index` (int64)."""
    seed = moved("dropout", "seed", seed.reshape(()), index.device)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1 = index & _MASK, (index >> 32) & _MASK
    c2 = torch.zeros_like(c0)
    c3 = torch.zeros_like(c0)
    for _ in range(10):
        hi0, lo0 = _mulhilo(_M0, c0)
        hi1, lo1 = _mulhilo(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def keep_mask(m: int, k: int, p: float, seed: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """bool [m, k]: True where the element is kept."""
    n = m * k
    groups = torch.arange((n + 3) // 4, dtype=torch.int64, device=device)
    w = torch.stack(words(groups, seed), dim=1).reshape(-1)[:n]
    return (w >= threshold(p)).reshape(m, k)


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """`x` [M, K] with dropped elements at zero and the others scaled by 1 / (1 - p), in x.dtype."""
    keep = keep_mask(x.shape[0], x.shape[1], p, seed, x.device)
    return torch.where(keep, x * (1.0 / (1.0 - p)), torch.zeros((), dtype=x.dtype, device=x.device))


def draw_seed(device: torch.device | str = "cpu") -> Tensor:
    """A fresh int64 seed [1] from torch's generator of `device`; drawn outside the op so that recomputation agrees."""
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)
