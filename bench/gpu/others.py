"""The alternatives on a GPU, where they are installed: one adapter for each, by the packages' own names.

unsloth: `unsloth.kernels.apply_lora_o` over a PEFT layer (its fused LoRA projection; it has no dropout).
vLLM: bitsandbytes' 4-bit product, then `lora_shrink` and `lora_expand` of `vllm.lora.ops.triton_ops`, as its LoRA
layers do on a 4-bit base; forward only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..measure import Candidate

Calls = Sequence[Callable[[], object]]


def optional(absent: dict[str, str], name: str, package: str, make: Callable[[], Calls]) -> list[Candidate]:
    """A candidate, called once; or none, with the reason in `absent`: a package that is missing, or that refuses."""
    if find_spec(package) is None:
        absent[name] = f"{package} is not installed"
        return []
    try:
        calls = make()
        calls[0]()
    except Exception as e:
        # whatever another project raises says why its column is empty; it must not end our run
        absent[name] = f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0]}"
        return []
    return [Candidate(name, calls)]


def unsloth(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """PEFT's LoRA layer over bitsandbytes' Linear4bit, computed by unsloth; x [M, K]."""
    from unsloth.kernels import apply_lora_o

    module = SimpleNamespace(o_proj=layer)
    return lambda x: apply_lora_o(module, x.unsqueeze(0)).squeeze(0)


def vllm(layer: nn.Module, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Callable[[], Tensor]:
    """One adapter for all rows of x [M, K]; a [r, K] and b [N, r] are kept in x's dtype, as vLLM keeps them."""
    import bitsandbytes as bnb
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    m, r = x.shape[0], a.shape[0]
    meta = LoRAKernelMeta.make(1, m, device=x.device)
    meta.prepare_tensors(torch.zeros(m, dtype=torch.long, device=x.device))
    # newer versions ask whether the launch is specialised for the number of adapters
    more = (False,) if len(inspect.signature(meta.meta_args).parameters) > 1 else ()
    args = meta.meta_args(m, *more)
    down, up = a.to(x.dtype)[None].contiguous(), b.to(x.dtype)[None].contiguous()
    low = torch.empty(1, m, r, dtype=torch.float32, device=x.device)
    weight = layer.weight

    def call() -> Tensor:
        with torch.no_grad():
            y = bnb.matmul_4bit(x, weight.data.t(), quant_state=weight.quant_state)
            lora_shrink(x, [down], low, *args, scaling)
            lora_expand(low, [up], y, *args, offset_start=0, add_inputs=True)
        return y

    return call
