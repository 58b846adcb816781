"""An example of a part, which only a fake device has: made-up times of a kernel that wins up to 64 rows."""

from __future__ import annotations

from typing import Any

from ..device import Device

LIMIT_S = 20
ROWS = [1, 4, 16, 64, 128, 512]


def titles(device: Device) -> list[str]:
    return [f"forward 64x64 M={m} f32" for m in ROWS] if device.fake else []


def row(title: str, device: Device) -> dict[str, Any]:
    m = int(title.split("M=")[1].split()[0])
    names = {"native": 1e-6 * m, "reference": 3e-5 + 4e-7 * m}
    case = {"op": "lora_linear", "direction": "forward", "dtype": "f32", "m": m, "shape": "64x64"}
    times, refused = {}, {}
    for name, seconds in names.items():
        why = device.wrong("lora_linear", name, "forward", "f32", m)
        if why is not None or name in device.lost:
            refused[name] = why or device.lost[name]
            continue
        device.trying(name)
        times[name] = {"graph_s": seconds, "eager_s": seconds + device.eager_clock(lambda: None)}
    return {**case, "times": times, "refused": refused, "bound_s": 5e-7 * m}
