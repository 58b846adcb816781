"""Clusters of points, as scikit-learn finds them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def cluster(points: Tensor, count: int, iterations: int = 10, seed: int = 123456789) -> list[Tensor]:
    """The indices of each cluster's points, by Lloyd's algorithm.

    Clusters are not in files, so they must be those that PEFT finds: scikit-learn's KMeans(init="random", n_init=1)
    is followed step by step, down to its random numbers.
    """
    x = points.detach().cpu().float().numpy()
    x = x - x.mean(axis=0)
    n, count = len(x), min(count, len(x))
    tolerance = np.mean(np.var(x, axis=0)) * 1e-4
    chances = np.ones(n, dtype=x.dtype) / np.float32(n)
    centers = x[np.random.RandomState(seed).choice(n, size=count, replace=False, p=chances)]

    def nearest() -> Any:
        return np.argmin((centers * centers).sum(axis=1) - 2.0 * (x @ centers.T), axis=1)

    settled, new = False, np.full(n, -1)
    for _ in range(iterations):
        labels, new = new, nearest()
        sizes, sums = np.bincount(new, minlength=count).astype(x.dtype), np.zeros_like(centers)
        np.add.at(sums, new, x)
        empty = np.flatnonzero(sizes == 0)
        if len(empty):  # the points farthest from their centers become centers
            distances = ((x - centers[new]) ** 2).sum(axis=1)
            for at, far in zip(empty, np.argpartition(distances, -len(empty))[: -len(empty) - 1 : -1], strict=True):
                sums[new[far]] -= x[far]
                sizes[new[far]] -= 1
                sums[at], sizes[at] = x[far], 1
        moved = sums / np.maximum(sizes, 1)[:, None]
        shift, centers = ((moved - centers) ** 2).sum(), moved
        settled = np.array_equal(new, labels)
        if settled or shift <= tolerance:
            break
    found = torch.from_numpy(new if settled else nearest()).to(points.device)
    return [torch.where(found == i)[0] for i in range(count) if bool((found == i).any())]
