"""Principal components of rows that come in batches (D. Ross et al. 2008, as scikit-learn's IncrementalPCA)."""

from __future__ import annotations

import torch
from torch import Tensor


class IncrementalPCA:
    """components [n, features], singular_values [n] and explained [n], each one's share of the variance seen so far.

    They are None until the first batch. Every batch needs at least `n` rows.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.components: Tensor | None = None
        self.singular_values: Tensor
        self.explained: Tensor
        self._mean: Tensor
        self._spread: Tensor  # sum of squared deviations from the mean, by feature
        self._seen = 0

    def add(self, x: Tensor) -> None:
        rows, features = x.shape
        if not self.n <= min(rows, features):
            raise ValueError(f"{self.n} components need as many rows and features, got {rows} and {features}")
        x = x.to(torch.float32)
        total, seen = self._seen + rows, self._seen
        mean = x.mean(dim=0)
        sums = x.sum(dim=0, dtype=torch.float64)
        deviations = x - sums / rows
        spread = deviations.square().sum(dim=0, dtype=torch.float64)
        spread -= deviations.sum(dim=0, dtype=torch.float64).square() / rows
        if self.components is None:
            centred, self._mean, self._spread = (x - sums / rows).to(x.dtype), sums / rows, spread
        else:
            shift = ((seen / total) * rows) ** 0.5 * (self._mean - mean)
            centred = torch.vstack((self.singular_values[:, None] * self.components, x - mean, shift))
            old = self._mean * seen
            self._spread = self._spread + spread + (seen / rows) / total * (old / (seen / rows) - sums).square()
            self._mean = (old + sums) / total
        with torch.random.fork_rng():
            torch.manual_seed(42)  # of the randomised SVD, so that equal inputs give equal components
            _, s, v = torch.svd_lowrank(centred, q=self.n * 2, niter=4)
        vh = v.t()
        vh = vh * vh.gather(1, vh.abs().argmax(dim=1, keepdim=True)).sign()  # the largest entry of each is positive
        self.components, self.singular_values = vh[: self.n], s[: self.n]
        self.explained = (s.square() / self._spread.sum())[: self.n]
        self._seen = total
