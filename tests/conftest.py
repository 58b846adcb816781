"""Settings of every test: no hub, fixed seeds, uninitialised memory that shows; and which tests run: the short form or
the full one, a part, `gpu` tests where there is a GPU, `ecosystem` tests where they are asked for.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read when transformers and huggingface_hub are imported, so set before anything else is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
import torch.utils._device
from forms import FULL_ENV, PARTS, full, part_of

try:
    from hypothesis import settings
except ImportError:  # a machine with a GPU may lack it, and no `gpu` test draws
    settings = None

# `with torch.device(...)` knows the factory functions by identity and looks them up once: it must see torch's own,
# which the wrappers below call.
torch.utils._device._device_constructors()

# The same draws in every run: that a kernel is no worse than eager holds but for one draw in many thousands, by how
# rounding errors happen to add up. `--hypothesis-profile random` looks further.
if settings is not None:
    settings.register_profile("random")
    settings.register_profile("repeatable", derandomize=True)
    settings.load_profile("repeatable")

# Two workers with as many threads each as there are cores would wait for one another. Tests of threads set their own.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peft-kernels")
    group.addoption("--full", action="store_true", help="the full form of the tests (make test-all)")
    group.addoption("--part", action="append", choices=sorted(PARTS), default=[], help="of tests/tools/forms.py")
    group.addoption("--ecosystem", action="store_true", help="tests with TRL, diffusers, ... (make test-ecosystem)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--full"):
        os.environ[FULL_ENV] = "1"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    parts = config.getoption("--part")
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if parts and is_test and part_of(collection_path) not in parts else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left = [] if full() else [item for item in items if "full_form" in item.keywords]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if "full_form" not in item.keywords]
    # The long ones first; of the short ones a worker then takes over what another has left (--dist worksteal).
    items.sort(key=lambda item: "slow" not in item.keywords)
    skips = {}
    if not torch.cuda.is_available():
        skips["gpu"] = "needs a CUDA device: torch.cuda.is_available() is False"
    if not config.getoption("--ecosystem"):
        skips["ecosystem"] = "needs packages that most do not have (the extra `ecosystem`): make test-ecosystem"
    for item in items:
        for name, reason in skips.items():
            if name in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (seeds the global generator that third-party code draws from)
    torch.manual_seed(0)


def _poison(t: torch.Tensor) -> torch.Tensor:
    """Fill what was left uninitialised with a value that cannot pass for a result."""
    # Fake and meta tensors hold nothing; under torch.compile the fill would become part of the graph under test.
    if t.is_meta or type(t) is not torch.Tensor or torch.compiler.is_compiling():
        return t
    with torch.no_grad():
        if t.is_floating_point() or t.is_complex():
            t.fill_(float("nan"))
        elif t.dtype == torch.bool:
            t.fill_(True)
        elif t.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
            t.fill_(torch.iinfo(t.dtype).max)
    return t


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        return _poison(make(*args, **kwargs))

    wrapper.__wrapped__ = make  # type: ignore[attr-defined]
    return wrapper


@pytest.fixture(autouse=True)
def _nan_in_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and its kin return NaN (integers: the largest value), so that a hole in a result is seen."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
