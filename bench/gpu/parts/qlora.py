"""A whole QLoRA step of a random Llama of real widths, four layers and the real head: forward, loss, backward, AdamW.

A row is a way to compute it: models are large, and who patches what stays in no other row's way. Adapters are float32,
the loss is over every token, the optimizer torch's fused AdamW.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from ..device import Device
from ..llama import WAYS, adapted, refused, sizes, weights
from ..rows import Row

LIMIT_S = 240
LAYERS, VOCABULARY, TOKENS = 4, 128256, 2048


def titles(device: Device) -> list[str]:
    return [f"step {way}" for way in WAYS]


def row(title: str, device: Device) -> dict[str, Any]:
    way = title.removeprefix("step ")
    layers, vocabulary, tokens = (2, 256, 16) if device.small else (LAYERS, VOCABULARY, TOKENS)
    # forward and dX: neither the layers' weights nor the head have gradients
    flops = 4.0 * tokens * (layers * weights(device) + vocabulary * sizes(device)["hidden_size"])
    row = Row(device, "qlora_step", "step", tokens, f"{layers} layers", flops, 0.0, {"weight": "nf4"})
    why = refused(device, way, "step", tokens)
    if why is not None:
        return {"absent": why}
    try:
        return measured(row, adapted(device, way, layers, vocabulary, loss=True).train(), way, tokens, vocabulary)
    finally:
        gc.collect()
        if not device.fake:
            torch.cuda.empty_cache()


def measured(row: Row, model: Any, way: str, tokens: int, vocabulary: int) -> dict[str, Any]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(0, vocabulary, (1, tokens), generator=g).to(row.device.kind)
    losses: list[Any] = []

    def step() -> None:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    row.add(way, [step])
    found = row.measure(graphs=False)
    found["loss"] = {"first": float(losses[0]), "last": float(losses[-1]), "steps": len(losses)} if losses else {}
    times = found["times"].items()
    found["tokens_per_s"] = {name: {clock: tokens / s for clock, s in t.items()} for name, t in times}
    return found
