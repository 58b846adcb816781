"""W -> W + A^T S B with a sparse S of trained values, and A, B fast linear transforms (FourierFT, WaveFT).

x takes B, the n values of S, and A^T: d log d (Fourier) or d L (wavelets of L taps) and n per token, where the update
as a dense matrix costs d^2 and d^2 log d to make. The backward keeps x alone and transforms it again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config.targets import DEFAULT_TARGETS, by_type
from ..computed import Computed
from ..method import Inner, LayerInfo, Method


class Transform:
    """Signals of n numbers to `size` coefficients, in the last dimension, by a linear map; here the identity.

    adjoint: the transposed map, from coefficients to signals.
    """

    def __init__(self, n: int, size: int | None = None) -> None:
        self.n, self.size = n, n if size is None else size

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def adjoint(self, z: Tensor) -> Tensor:
        return z


class Fourier(Transform):
    """Coefficients 2 f and 2 f + 1: the sums of x_i cos(2 pi f i / n) and of -x_i sin(2 pi f i / n), f <= n / 2."""

    def __init__(self, n: int) -> None:
        super().__init__(n, 2 * (n // 2 + 1))

    def __call__(self, x: Tensor) -> Tensor:
        return torch.view_as_real(torch.fft.rfft(x)).flatten(-2)

    def adjoint(self, z: Tensor) -> Tensor:
        half = torch.view_as_complex(z.contiguous().view(*z.shape[:-1], -1, 2)) / 2
        edges = [0, -1] if self.n % 2 == 0 else [0]  # irfft counts all other frequencies twice
        half[..., edges] *= 2
        signal: Tensor = torch.fft.irfft(half, n=self.n, norm="forward")
        return signal


class Wavelet(Transform):
    """One level of the wavelet transform with orthogonal filters: first the low coefficients, then the high ones.

    The adjoint is the synthesis: coefficient k of a filter adds it at 2 k, `skip` samples earlier, cropped to n.
    """

    def __init__(self, n: int, low: Sequence[float], high: Sequence[float]) -> None:
        self.skip, self.taps = len(low) - 2, (low, high)
        super().__init__(n, n + self.skip + (n + self.skip) % 2)

    def _filters(self, like: Tensor) -> Tensor:
        return torch.tensor(self.taps, dtype=like.dtype, device=like.device)

    def __call__(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (self.skip, self.size - self.n)) if self.skip or self.size > self.n else x
        if not self.skip:  # Haar: sums and differences, exact before they are scaled
            even, odd = padded.reshape(*x.shape[:-1], -1, 2).unbind(-1)
            return torch.cat([even + odd, even - odd], -1) * self.taps[0][0]
        # Windows that start at even places, times the filters: conv1d has no fast path for one channel.
        windows = padded.unfold(-1, self.skip + 2, 2)[..., : self.size // 2, :]
        return (windows @ self._filters(x).T).transpose(-1, -2).flatten(-2)

    def adjoint(self, z: Tensor) -> Tensor:
        rows = z.reshape(-1, 2, self.size // 2)
        if not self.skip:
            low, high = rows.unbind(1)
            pairs = torch.stack([low + high, low - high], -1) * self.taps[0][0]
            return pairs.view(*z.shape[:-1], self.size)[..., : self.n]
        signal = F.conv_transpose1d(rows, self._filters(z).unsqueeze(1), stride=2)
        return signal[:, 0, self.skip : self.skip + self.n].reshape(*z.shape[:-1], self.n)


class Update:
    """A^T S B: entry e of S is at rows[e], columns[e] and is weights[e] times value e modulo their number."""

    def __init__(self, out: Transform, into: Transform, rows: Tensor, columns: Tensor, weights: Tensor | None = None):
        self.out, self.into, self.rows, self.columns, self.weights = out, into, rows, columns, weights

    def entries(self, values: Tensor) -> Tensor:
        times = len(self.rows) // len(values)
        entries = values.repeat(times) if times > 1 else values
        return entries if self.weights is None else entries * self.weights.to(values.dtype)

    def dense(self, values: Tensor) -> Tensor:
        s = values.new_zeros(self.out.size, self.into.size)
        s = s.index_put((self.rows, self.columns), self.entries(values), accumulate=True)
        return self.out.adjoint(self.into.adjoint(s).T).T


class _SparseUpdate(torch.autograd.Function):
    """x times the transposed update, in the values' dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, update: Update) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.update = update
        coefficients = update.into(_rows(x, values)).index_select(1, update.columns)
        z = coefficients.new_zeros(len(coefficients), update.out.size)
        y = update.out.adjoint(z.index_add_(1, update.rows, coefficients.mul_(update.entries(values))))
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, values), update = ctx.saved_tensors, ctx.update
        dx = dvalues = None
        dz = update.out(_rows(grads[0], values)).index_select(1, update.rows)
        if ctx.needs_input_grad[1]:
            coefficients = update.into(_rows(x, values)).index_select(1, update.columns)
            sums = coefficients.mul_(dz).sum(0)
            if update.weights is not None:
                sums = sums * update.weights.to(sums.dtype)
            dvalues = sums.view(-1, len(values)).sum(0)
        if ctx.needs_input_grad[0]:
            z = dz.new_zeros(len(dz), update.into.size)
            z.index_add_(1, update.columns, dz.mul_(update.entries(values)))
            dx = update.into.adjoint(z).view(x.shape).to(x.dtype)
        return dx, dvalues, None


def _rows(x: Tensor, values: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(values.dtype)


def fourier_update(shape: tuple[int, int], frequencies: Tensor) -> Update:
    """The real part of the inverse 2-D DFT of values at [2, n] frequencies, but for its factor of 1 / (rows * columns).

    cos(a + b) = cos a cos b - sin a sin b, where a frequency above the middle is the negative of one below.
    """
    folded, signs = [], []
    for size, f in zip(shape, frequencies, strict=True):
        low = torch.minimum(f, size - f)
        folded.append(torch.cat([2 * low, 2 * low + 1]))
        signs.append(torch.where(f == low, 1.0, -1.0))
    sines = -signs[0] * signs[1]
    weights = torch.cat([torch.ones_like(sines), sines])
    return Update(Fourier(shape[0]), Fourier(shape[1]), folded[0], folded[1], weights)


@functools.lru_cache(maxsize=256)
def random_positions(shape: tuple[int, int], count: int, seed: int) -> Tensor:
    """PEFT's [2, count] positions of a matrix, without repeats. Kept: the layers of a model have few shapes."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randperm(math.prod(shape), generator=generator, device="cpu")[:count]
    return torch.stack([flat // shape[1], flat % shape[1]])


class SpectrumMethod(Method):
    """Methods with n trained values at random places of a spectrum of the layer's size."""

    default_targets: ClassVar[dict[str, Any]] = DEFAULT_TARGETS | by_type({"mlp.c_proj": "gpt2 gpt_bigcode"})
    patterns: ClassVar[dict[str, str]] = {"n_frequency": "n_frequency_pattern"}

    def check_layer(self, config: Any, info: LayerInfo) -> None:
        super().check_layer(config, info)
        if not getattr(config, "proportional_parameters", False):  # else the layers together decide
            self.check_count(config.n_frequency, info)

    @staticmethod
    def check_count(count: Any, info: LayerInfo) -> None:
        most = info.in_features * info.out_features
        if not isinstance(count, int) or not 1 <= count <= most:
            limits = "a positive integer value"
            if isinstance(count, int) and count > most:
                limits = "less than or equal to the product of the input and output dimensions"
            raise ValueError(
                f"`n_frequency` should be {limits} but the value passed is {count!r} and the product is {most} "
                f"(in {info.name!r})"
            )

    @staticmethod
    def positions(count: int, config: Any, info: LayerInfo) -> Computed:
        make = functools.partial(random_positions, (info.out_features, info.in_features), count, config.random_loc_seed)
        return Computed((2, count), lambda: make().clone(), persistent=False, dtype=torch.int64)

    @staticmethod
    def spectrum(count: int, std: float) -> nn.Parameter:
        values = torch.zeros(count)
        return nn.Parameter(values if values.is_meta or std == 0 else values.normal_() * std)

    def update(self, s: Any) -> tuple[Update, Tensor]:
        """The update, and its values with their factor, in at least float32."""
        raise NotImplementedError

    def delta_weight(self, s: Any, shared: Any, w: Tensor | None) -> Tensor:
        update, values = self.update(s)
        return update.dense(values)

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        update, values = self.update(s)
        added: Tensor = _SparseUpdate.apply(x, values, update)  # type: ignore[no-untyped-call]
        return y + added
