"""DoRA: the rows of W + sBA, normed and given a magnitude m that is learned (arXiv 2402.09353).

With g = m / |W + sBA|, where the norm is a constant to the gradient as in the paper (`dora_full_gradient` lets the
gradient through), the layer is

    y = g (W x + s B A x) + b

On a plain or 4-bit linear layer it is one call of `peft_kernels.dora_linear`, in training together with the norm;
evaluation keeps the norms (`cache.Cache`). On top of other adapters W is the weight that they made, so that forward
and merged agree (PEFT norms the base weight there).

Dropout acts on both x and A x, as in PEFT: y = W (x - d(x)) + b + g (W d(x) + s B A d(x)).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_kernels import PreparedCall, QuantWeight, dora_gain, dora_linear, dora_linear_normed, dora_norm
from peft_kernels.dispatch import forward_mode

from ....weights.base import BaseWeight, LayerInfo, wide
from ...base_edit import EDIT
from ...fused import Fused, FusedProjection
from ...math.cache import Cache
from ...math.row_norms import norms
from ...method import AdaptedLayer, Inner, State
from ..lora import Lora
from . import variant


class Magnitude(nn.Module):
    """Holds m under PEFT's key, `lora_magnitude_vector.<adapter>.weight`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.norm = Cache()  # in evaluation, where the layer is not one call of a kernel


@variant("use_dora")
class Dora(Lora):
    kinds = Lora.kinds - {"experts"}
    needs_base_weight = True
    kernel = "dora_linear"
    examples: ClassVar[Any] = (
        {"r": 4, "lora_alpha": 3, "use_dora": True},
        {"r": 30, "use_dora": True, "use_rslora": True},
    )

    def make_state(self, config: Any, info: LayerInfo, shared: Any) -> State:
        state = super().make_state(config, info, shared)
        a, b = (state[k] if isinstance(state[k], Tensor) else state[k].weight for k in _names(state))
        if a.is_meta or info.device.type == "meta":
            m = torch.empty(info.out_features, device=a.device)
        elif EDIT in state:  # on the base that the edit will leave
            w = state[EDIT](info.weight())
            m = (w + state["scaling"] * (b.to(w) @ a.to(w))).norm(dim=1)
        else:
            a, b = a.to(info.device), b.to(info.device)
            with torch.no_grad():
                m = _norms(info.base, a, b, state["scaling"])
        shape = (1, -1, *[1] * (len(info.shape) - 2)) if info.kind.startswith("conv") else (-1,)
        if config.dora_full_gradient:
            state["dora_full_gradient"] = True
        return {**state, "lora_magnitude_vector": Magnitude(m.detach().view(shape))}

    def file_key(self, key: str) -> str:
        return key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")

    # Math

    def matrices(self, s: Any) -> tuple[Tensor, Tensor]:
        if s.get("lora_embedding_A") is not None:
            return s.lora_embedding_A, s.lora_embedding_B
        return super().matrices(s)

    def delta_weight(self, s: Any, shared: Any, w: Tensor | None) -> Tensor:
        grouped = _grouped_product(*self.matrices(s))
        return super().delta_weight(s, shared, w) if grouped is None else grouped * s.scaling

    def merged(self, s: Any, shared: Any, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        w = w + self.delta_weight(s, shared, None).to(w.dtype).reshape(w.shape)
        g = _gain(s, _constant(s, w.flatten(1)).norm(dim=1)).to(w.dtype)
        return w * g.view(-1, *[1] * (w.dim() - 1)), b

    def gain(self, s: Any, base: BaseWeight) -> Tensor:
        """g, over the base layer itself."""
        a, b = self.matrices(s)
        if s.training or s.get("dora_full_gradient"):
            return _gain(s, _norms(base, _constant(s, a), _constant(s, b), s.scaling))
        scaling = s.scaling
        tensors = [*base.tensors(), a, b, *([scaling] if isinstance(scaling, Tensor) else [])]
        kept: Cache = s.lora_magnitude_vector.norm
        norm = kept.get(tensors, (scaling, s.version), lambda: _norms(base, a, b, scaling))
        return _gain(s, norm)

    def forward(self, s: Any, shared: Any, x: Tensor, inner: Inner) -> Tensor:
        if self.splits(s, inner.info):
            return super().forward(s, shared, x, inner)
        dropped, whole = s.lora_dropout(x), inner(x)
        g, bias = self._scales(s, x, inner)
        y = inner(dropped)
        h = self._direction(s, dropped, y, bias)
        return whole - (y if bias is None else y - bias) + h * g  # type: ignore[no-any-return]

    def splits(self, s: Any, info: LayerInfo) -> bool:
        drops = isinstance(s.lora_dropout, nn.Dropout) and s.lora_dropout.training
        return not drops or info.kind == "embedding"

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        g, bias = self._scales(s, x, inner)
        if inner.info.kind == "embedding":
            return super().output(s, shared, x, y, inner) * g
        h = self._direction(s, x, y, bias)
        return h * g if bias is None else torch.addcmul(bias, h, g)

    def _direction(self, s: Any, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """(W + s B A) x; y: the wrapped layer's output with its bias."""
        a, b = s.lora_A, s.lora_B
        added: Tensor = b(a(s.cast(x, a.weight.dtype))) * s.scaling
        return (y if bias is None else y - bias) + added

    def _scales(self, s: Any, x: Tensor, inner: Inner) -> tuple[Tensor, Tensor | None]:
        """g and the bias of the layer that is wrapped, as they go with its output."""
        if inner.bare:
            base = inner.info.base
            g, bias = self.gain(s, base), base.bias
        else:
            w, bias = inner.weight()
            w = w.detach() + _constant(s, self.delta_weight(s, shared=None, w=None)).to(w.dtype).reshape(w.shape)
            g = _gain(s, w.flatten(1).norm(dim=1))
        columns = (-1, *[1] * (x.dim() - 2)) if inner.info.kind.startswith("conv") else (-1,)
        g = g.view(columns)
        return g, None if bias is None else bias.to(g.dtype).view(columns)

    def fused(self, layer: AdaptedLayer, s: Any, shared: Any) -> Fused | None:
        lora = super().fused(layer, s, shared)
        if not isinstance(lora, FusedProjection):
            return None
        own, compute = lora.parameters, lora.compute
        magnitudes: Any = layer._modules["lora_magnitude_vector"]
        name, magnitude, full = s._name, s.lora_magnitude_vector, bool(s.get("dora_full_gradient"))
        modules, parameters = magnitudes._modules, magnitude._parameters
        norms_kept, gains_kept = Cache(), Cache()  # the layer's next plan has its own
        infer, train = PreparedCall(dora_linear), PreparedCall(dora_linear_normed)

        last: tuple[Tensor | QuantWeight, list[Tensor]] | None = None  # a weight and its tensors

        def run(x: Tensor) -> Tensor | None:
            nonlocal last
            found, w, m = lora.adapter(), lora.weight(), parameters.get("weight")
            if found is None or w is None or m is None or modules.get(name) is not magnitude:
                return None
            a, b, scale, p = found
            bias = own.get("bias")
            inside = x if compute is None else x.to(compute)
            if full:
                y = dora_linear(inside, w, a, b, m, dora_norm(w, a, b, scale), scale, bias, p)
            elif layer.training:
                y = train(inside, w, a, b, m, scale, bias, p)
            else:
                seen = last  # other threads may put theirs there
                if seen is None or w is not seen[0]:
                    tensors = w.flatten()[:5] if isinstance(w, QuantWeight) else (w,)
                    last = seen = w, [t for t in tensors if t is not None]
                stored = seen[1]
                if p or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or forward_mode():
                    norm = norms_kept.get((*stored, a, b), (scale,), lambda: dora_norm(w, a, b, scale))
                    y = dora_linear(inside, w, a, b, m, norm, scale, bias, p)
                else:
                    dtype = wide(inside.dtype)
                    gain = gains_kept.get(
                        (*stored, a, b, m), (scale, dtype), lambda: dora_gain(m, dora_norm(w, a, b, scale), dtype)
                    )
                    y = infer(inside, w, a, b, gain, None, scale, bias)
            return y.to(x.dtype) if inside is not x else y

        return run


def _names(state: State) -> tuple[str, str]:
    return ("lora_A", "lora_B") if "lora_A" in state else ("lora_embedding_A", "lora_embedding_B")


def _grouped_product(a: Tensor, b: Tensor) -> Tensor | None:
    """The numbers that PEFT takes for B A in the norm where a convolution has groups, and with which its files were
    trained: [out / groups, r] of B's times A, in the order of the weight's. None where there are no groups."""
    return None if b.shape[1] == (r := a.shape[0]) else b.reshape(-1, r) @ a.reshape(r, -1)


def _norms(base: BaseWeight, a: Tensor, b: Tensor, scaling: float | Tensor) -> Tensor:
    """|W + s B A| of each row."""
    grouped = _grouped_product(a, b)
    if grouped is None:
        return norms(base, a, b, scaling)
    w = base.read()[0].detach().to(wide(base.dtype)).flatten(1)
    norm: Tensor = (w + grouped.reshape(w.shape) * scaling).norm(dim=1)
    return norm


def _constant(s: Any, t: Tensor) -> Tensor:
    """A tensor as the norm sees it: a constant, as in the paper, unless the gradient is to be the full one."""
    return t if s.get("dora_full_gradient") else t.detach()


def _gain(s: Any, norm: Tensor) -> Tensor:
    m: Tensor = s.lora_magnitude_vector.weight
    return dora_gain(m, norm, m.dtype)
