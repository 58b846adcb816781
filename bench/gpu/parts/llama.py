"""Two layers of a random Llama-3-8B: milliseconds of a layer, and tokens a second of 32 such layers.

M rows are one sequence without a cache; M = 1 is a token that is alone, so its attention reads nothing: what is
measured is the layers' own work. The final norm and the rotary table, once a model, are in the time of the two.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from peft_kernels import use_backend

from ..clock import attempt
from ..device import Device
from ..llama import LAYERS_8B, WAYS, adapted, refused, sizes, weights
from ..operands import no_grad
from ..rows import CHECKED, Row, normal

LIMIT_S = 240
ROWS = (1, 2048, 512, 8192)
LAYERS = 2
_models: dict[str, Any] = {}  # of this process


def titles(device: Device) -> list[str]:
    return [f"forward M={m}" for m in ((1, 16) if device.small else ROWS)]


def model(device: Device, way: str) -> Any:
    if way not in _models:
        _models[way] = adapted(device, way, LAYERS).eval()
    return _models[way]


def row(title: str, device: Device) -> dict[str, Any]:
    m = int(title.rpartition("=")[2])
    count = LAYERS * weights(device)
    row = Row(device, "llama_layers", "forward", m, f"{LAYERS} layers", 2.0 * m * count, count * (0.5 + 1 / 64),
              {"layers": LAYERS, "weight": "nf4"})  # fmt: skip
    h = normal(device, 1, m, sizes(device)["hidden_size"])
    exact = None
    for way in WAYS:
        why = refused(device, way, "forward", m)
        made, failed = (None, why) if why is not None else attempt(way, partial(model, device, way), device)
        if failed is not None:
            row.refused[way] = failed
            continue
        inner = made.get_base_model().model
        run = no_grad(lambda x, inner=inner: inner(inputs_embeds=x, use_cache=False).last_hidden_state[0], [h])
        row.base(way, run) if way.endswith("dense") else row.add(way, run)  # dense weights are other numbers
        if exact is None and way == "ours" and m <= CHECKED:
            with use_backend("reference"):
                exact = run[0]().float()
    found = row.measure(exact, most=0.1)  # two layers in bfloat16, each sum rounded
    each = {name: {clock: s / LAYERS for clock, s in t.items()} for name, t in found["times"].items()}
    found["ms_per_layer"] = {name: {clock: 1e3 * s for clock, s in t.items()} for name, t in each.items()}
    found["tokens_per_s"] = {name: {clock: m / (LAYERS_8B * s) for clock, s in t.items()} for name, t in each.items()}
    if not device.fake:
        torch.cuda.empty_cache()
    return found
