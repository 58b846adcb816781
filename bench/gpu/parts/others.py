"""Other projects' fused layers on the same bytes, in a process of their own, and last: importing unsloth changes peft
and bitsandbytes for good."""

from __future__ import annotations

from functools import partial
from typing import Any

from ... import subjects
from .. import others
from ..device import Device
from ..operands import Layer, bnb_product, layer, no_grad, plus_lora
from ..rows import RANK, SCALING, Row, normal, place, titled

LIMIT_S = 180
ROWS = (1, 512, 2048, 16, 128, 8192)


def titles(device: Device) -> list[str]:
    shapes = titled(device, ("decode",), (0,))[:2]
    return [*titled(device, ("forward", "step"), ROWS), *(t for t in shapes if not device.small)]


def peft_layers(of: Layer, trains: bool) -> list[Any]:
    import peft

    some = [subjects.bnb_layer(q, normal(of.device, 1).dtype) for q in of.quants[:8]]
    return [one.to(of.device.kind) for one in subjects.with_adapter(peft, some, RANK, 0.0, trains)]


def row(title: str, device: Device) -> dict[str, Any]:
    what, m, k, n = place(title)
    of = layer(device, n, k)
    passes = 3 if what == "step" else 1
    if what == "decode":
        row = Row(device, "dequantize_4bit", "forward", m, f"{k}x{n}", 0.0, n * k * (2.5 + 1 / 64))
        row.optional("unsloth", "unsloth", lambda: decoding(of))
        return row.measure(of.exact[:256])
    flops = (2 if what == "step" else 1) * 2.0 * m * n * k + passes * 2.0 * m * RANK * (n + k)
    row = Row(device, "lora_linear", what, m, f"{k}x{n}", flops, passes * of.nbytes(m), {"weight": "nf4", "r": RANK})
    x, dy = normal(device, m, k), normal(device, m, n, seed=4)
    if what == "step":
        row.optional("PEFT + bnb", "bitsandbytes", lambda: [subjects.step_call(one, x, dy)
                                                            for one in peft_layers(of, True)])  # fmt: skip
        row.optional("unsloth", "unsloth", lambda: [subjects.step_call(one, x, dy, others.unsloth(one))
                                                    for one in peft_layers(of, True)])  # fmt: skip
        return row.measure()
    row.optional("bnb matmul_4bit + LoRA", "bitsandbytes", lambda: plus_lora(bnb_product, x, of, of.bnb))
    row.optional("vLLM + bnb", "vllm", lambda: [others.vllm(one, x, *of.adapter, SCALING) for one in of.bnb])
    row.optional("unsloth", "unsloth", lambda: [no_grad(others.unsloth(one), [x])[0] for one in peft_layers(of, False)])
    row.bases.add("unsloth")  # its adapter is PEFT's, drawn anew
    return row.measure(of.result(x))


def decoding(of: Layer) -> list[Any]:
    from unsloth.kernels import fast_dequantize

    return [partial(fast_dequantize, one.weight, one.weight.quant_state) for one in of.bnb]
