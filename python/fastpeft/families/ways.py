"""Which parts of a decoder layer our kernels compute where x is, and why the others stay the model's own code.

The one place that decides it. Nothing asks for a type of device: each part names the operators that it is made of, each
operator is asked which of its backends would serve x (`peft_kernels.explain`), and a part is taken where that pays.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from peft_kernels import dispatch, explain
from peft_kernels.dispatch import forced_backends

# A part of a model -> the operators that it calls, forward and backward.
PARTS: dict[str, tuple[str, ...]] = {
    "norm": ("rms_norm",),
    "stack": ("lora_linear_stacked",),
    "mlp": ("lora_linear_stacked", "gated", "lora_linear"),
    "attention": ("attention",),
    "head": ("lora_linear",),
    "experts": ("grouped_linear",),
}
# Parts that pay with the native backend alone. Torch's attention and flash attention have kernels for each GPU, which
# attention's Triton tiles of 64 x 16 are not; only on a CPU does torch read a head's matrix at half of the speed
# of memory.
BY_CHOICE = {
    "attention": "torch's own attention is taken on a GPU (ours is tuned for CPUs)",
    "head": "torch's own product is taken on a GPU",
    "layer_norm": "torch's own layer norm is one kernel each way",
}


@dataclass(frozen=True)
class Ways:
    """The parts of a model that are quicker by our kernels, for x on one device in one dtype.

    norm: the norms; stack: q, k and v in one call; mlp: the MLP as one function; attention: the rotation and attention
    as one kernel each way; head: the output head for few rows; experts: their products. launches: a call costs the
    launch of a kernel, so that fewer of them pay; otherwise it costs Python's time. by: operator -> backend. missing:
    operator -> why no kernel serves it. reasons: part -> why it is not taken.
    """

    norm: bool = False
    stack: bool = False
    mlp: bool = False
    attention: bool = False
    head: bool = False
    experts: bool = False
    launches: bool = False
    by: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def token(self) -> bool:
        """A layer's single token, with a cache, is a function of its own."""
        return self.norm and self.stack and self.mlp

    @property
    def any(self) -> bool:
        return self.norm or self.stack or self.mlp or self.attention

    def why_none(self) -> str:
        """The reasons of `missing`, each with its operators."""
        by_reason: dict[str, list[str]] = {}
        for op, why in self.missing.items():
            by_reason.setdefault(why, []).append(op)
        return "; ".join(f"no kernel serves {', '.join(ops)} ({why})" for why, ops in by_reason.items())


# What `find` finds there, without `by`.
_CPU = Ways(norm=True, stack=True, mlp=True, attention=True, head=True, experts=True)
_GRAPH = Ways(reasons=dict.fromkeys(PARTS, "a compiled graph has its own fusions"))
_known: tuple[object, dict[tuple[torch.device, torch.dtype], Ways]] = None, {}


def ways_of(x: Tensor) -> Ways:
    """The ways for x. Asked at every call of a layer, so the usual answers take a tenth of a microsecond."""
    forced = forced_backends()
    if x.is_cpu and not forced:
        return _CPU
    if torch.compiler.is_compiling():
        return _CPU if x.is_cpu else _GRAPH
    return known_ways(x.device, x.dtype)


def known_ways(device: torch.device, dtype: torch.dtype) -> Ways:
    """`find`, remembered while the same backends are forced."""
    global _known
    forced, known = forced_backends(), _known
    if known[0] is not forced:
        _known = known = forced, {}
    found = known[1].get((device, dtype))
    if found is None:
        found = known[1][device, dtype] = find(device, dtype)
    return found


def find(device: torch.device, dtype: torch.dtype) -> Ways:
    """Ask every operator. One that is forced to a backend that cannot serve is called all the same, and says so."""
    names = {op for ops in PARTS.values() for op in ops}
    asked = {op: _ask(op, device, dtype) for name in sorted(names) for op in (name, f"{name}_backward")}
    by = {op: backend for op, (backend, _) in asked.items()}
    # on a GPU torch's formula takes as many launches as the model's own code; on a CPU it has fewer calls
    missing = {op: why for op, (backend, why) in asked.items() if backend == "reference" and device.type != "cpu"}
    reasons: dict[str, str] = {}
    for part, ops in PARTS.items():
        whole = [op for name in ops for op in (name, f"{name}_backward")]
        absent = [op for op in whole if op in missing]
        if absent:
            reasons[part] = f"no kernel serves {absent[0]} ({missing[absent[0]]})"
        elif part in BY_CHOICE and any(by[op] in ("triton", "cuda") for op in whole):
            reasons[part] = BY_CHOICE[part]
    launches = any(by[op] in ("triton", "cuda") for op in ("gated", "rms_norm"))
    taken = {part: part not in reasons for part in PARTS}
    return Ways(**taken, launches=launches, by=by, missing=missing, reasons=reasons)


def _ask(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(the backend that serves a small call, why no kernel does)."""
    with torch.no_grad():
        found = explain(op, *dispatch.ops()[op].sample(dtype, device))
    chosen = next((backend for backend, why in found.items() if why == "chosen"), "")
    away = f"does not serve {device.type} tensors"
    whys = {backend: why for backend, why in found.items() if backend != "reference"
            and f"no {backend} backend" not in why and not why.startswith(away)}  # fmt: skip
    text = "; ".join(f"{backend} {why}" for backend, why in whys.items())
    return chosen, text or f"none is for {device.type} tensors"
