"""`fastpeft tune`, a layer and a number of rows at a time: every configuration that it timed, not the fastest alone.

The user table that it writes lies in the run's folder. Products that the tables leave to the vendor are searched too:
their fused kernels may win with another tile.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch

from peft_kernels import tuning

from ..device import Device
from ..rows import PANELS, RANK, place, titled

LIMIT_S = 120
ROWS = (1, 128, 512, 2048, 16, 64, 4, 8192)


def titles(device: Device) -> list[str]:
    return titled(device, ("tune",), ROWS)


@contextmanager
def nothing_launched() -> Iterator[None]:
    """Of a fake device: what is timed does nothing."""
    from peft_kernels.triton_lib import host

    with mock.patch.object(host, "launch", return_value=None):
        yield


@contextmanager
def tables_in(device: Device) -> Iterator[None]:
    """The user table in the run's folder, not this user's own."""
    with mock.patch.dict(os.environ, {"PEFT_KERNELS_CACHE": str(device.out / "cache")}):
        yield


def row(title: str, device: Device) -> dict[str, Any]:
    from fastpeft.apps.cli import tune

    _, m, k, n = place(title)
    layers = tune.layers_of([(n, k)], RANK, torch.bfloat16, 64, 0.0)
    known = set(tuning.found())
    with tables_in(device), tuning.override("panels", **PANELS["fused"]):
        if device.fake:
            gpu = tune.Gpu(device.name, "sm_90", torch.device("meta"))
            with nothing_launched():
                tune.run(layers, [m], gpu, lambda *_: None, device.eager_clock)
        else:
            gpu = tune.find_gpu()
            tune.run(layers, [m], gpu, lambda *_: None)
    timed = [
        {"kernel": kernel, "shape": asdict(shape), "times": [{"seconds": s, "config": asdict(c)} for s, c in times]}
        for (kernel, arch, shape), times in tuning.found().items()
        if (kernel, arch, shape) not in known and arch == gpu.arch
    ]
    return {"gpu": gpu.name, "arch": gpu.arch, "capability": device.arch, "m": m, "shape": f"{k}x{n}", "timed": timed}
