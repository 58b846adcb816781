"""Principal components of rows that come in batches (D. Ross et al. 2008, as scikit-learn's IncrementalPCA)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class IncrementalPCA:
    """Principal components with PEFT's arguments, and results in scikit-learn's names.

    n_components: None is the smaller side of the first batch. batch_size: of `fit`, by default five times the features.
    lowrank: by a randomised SVD of lowrank_q (default: twice n_components) directions and lowrank_niter iterations,
    which draws from lowrank_seed if that is given. svd_driver: of `torch.linalg.svd` on CUDA. copy: accepted; the input
    is never written to.

    components_ [n_components, features], singular_values_, explained_variance_ and explained_variance_ratio_
    [n_components], mean_ and var_ [features], noise_variance_ (mean variance of a direction that was left out) and
    n_samples_seen_ are there after the first batch.
    """

    components_: Tensor
    singular_values_: Tensor
    explained_variance_: Tensor
    explained_variance_ratio_: Tensor
    mean_: Tensor
    var_: Tensor
    noise_variance_: Tensor

    def __init__(
        self, n_components: int | None = None, copy: bool | None = True, batch_size: int | None = None,
        svd_driver: str | None = None, lowrank: bool = False, lowrank_q: int | None = None, lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ) -> None:  # fmt: skip
        if lowrank and lowrank_q is None:
            if n_components is None:
                raise ValueError("n_components must be specified when using lowrank mode with lowrank_q=None.")
            lowrank_q = 2 * n_components
        elif lowrank and n_components is not None and lowrank_q is not None and lowrank_q < n_components:
            raise ValueError("lowrank_q must be greater than or equal to n_components.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.n_components, self.copy, self.batch_size, self.svd_driver = n_components, copy, batch_size, svd_driver
        self.lowrank, self.lowrank_q, self.lowrank_niter = lowrank, lowrank_q, lowrank_niter
        self.lowrank_seed = lowrank_seed
        self.n_features_: int | None = None
        self.n_samples_seen_ = 0

    def fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Add the rows of X [rows, features] in batches of `batch_size`; the last takes in what is too few for one."""
        x = self._checked(X) if check_input else X
        if self.batch_size is None:
            self.batch_size = 5 * x.shape[1]
        for part in self.gen_batches(len(x), int(self.batch_size), self.n_components or 0):
            self.partial_fit(x[part], check_input=False)
        return self

    def partial_fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Add a batch [rows, features], of at least n_components rows."""
        x: Tensor = self._checked(X) if check_input else X
        rows, features = x.shape
        first = self.n_features_ is None
        if not first and features != self.n_features_:
            raise ValueError(f"A batch of {features} features cannot follow batches of {self.n_features_}.")
        n = self.n_components = self.n_components or min(rows, features)
        total, seen = self.n_samples_seen_ + rows, self.n_samples_seen_
        sums = x.sum(dim=0, dtype=torch.float64)
        deviations = x - sums / rows
        spread = deviations.square().sum(dim=0, dtype=torch.float64)  # squared deviations from the mean, by feature
        spread -= deviations.sum(dim=0, dtype=torch.float64).square() / rows
        if first:
            centred, mean = deviations.to(x.dtype), sums / rows
        else:
            centre = x.mean(dim=0)
            shift = ((seen / total) * rows) ** 0.5 * (self.mean_ - centre)
            centred = torch.vstack((self.singular_values_[:, None] * self.components_, x - centre, shift))
            old = self.mean_ * seen
            spread = self.var_ * seen + spread + (seen / rows) / total * (old / (seen / rows) - sums).square()
            mean = (old + sums) / total
        s, vh = self._decomposed(centred)
        vh = vh * vh.gather(1, vh.abs().argmax(dim=1, keepdim=True)).sign()  # the largest entry of each is positive
        self.n_features_, self.n_samples_seen_, self.mean_, self.var_ = features, total, mean, spread / total
        self.components_, self.singular_values_ = vh[:n], s[:n]
        variance = s.square() / (total - 1)
        self.explained_variance_ = variance[:n]
        self.explained_variance_ratio_ = (s.square() / spread.sum())[:n]
        whole = n in (rows, features) or len(s) <= n
        self.noise_variance_ = variance.new_zeros(()) if whole else variance[n:].mean()
        return self

    def transform(self, X: Tensor) -> Tensor:
        """X [rows, features] in the components' coordinates, [rows, n_components], in the dtype of X less the mean."""
        x = X - self.mean_
        return (x.double() @ self.components_.double().T).to(x.dtype)

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice]:
        """Slices of batch_size out of n; the last may have fewer, but not fewer than min_batch_size."""
        start = 0
        while start + batch_size + min_batch_size <= n:
            yield slice(start, start + batch_size)
            start += batch_size
        if start < n:
            yield slice(start, n)

    def _checked(self, X: Any) -> Tensor:
        x: Tensor = X if isinstance(X, Tensor) else torch.tensor(X, dtype=torch.float32)
        rows, features = x.shape
        n = self.n_components or 0
        if n > features:
            raise ValueError(
                f"n_components={n} invalid for n_features={features}, need more rows than columns for IncrementalPCA "
                "processing."
            )
        if n > rows:
            raise ValueError(f"n_components={n} must be less or equal to the batch number of samples {rows}")
        return x if x.dtype in (torch.float32, torch.float64) else x.float()

    def _decomposed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Singular values and right singular vectors, a row each."""
        if not self.lowrank:
            _, s, vh = torch.linalg.svd(x, full_matrices=False, driver=self.svd_driver)
            return s, vh
        with torch.random.fork_rng(enabled=self.lowrank_seed is not None):
            if self.lowrank_seed is not None:
                torch.manual_seed(self.lowrank_seed)
            _, s, v = torch.svd_lowrank(x, q=self.lowrank_q, niter=self.lowrank_niter)
        return s, v.mT
