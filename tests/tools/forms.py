"""The suite's two forms and its parts: `make test` runs the short form, `make test-all [PART=...]` everything.

A test names all of its cases, once, and beside them those of the short form: every kind of case, but not every
combination, seed or draw. `matrix` and `grid` mark the others, which are deselected without `--full`; `by_form` is for
what lies inside of a test, a number of draws or a loop. Processes that tests start run the same form.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import pytest

FULL_ENV = "PEFT_KERNELS_FULL_TESTS"  # set by --full, and inherited
T = TypeVar("T")

# Part -> the files of it, below tests/: `make test-all PART=simt`. A file belongs to the first part that names it.
PARTS: dict[str, tuple[str, ...]] = {
    "ecosystem": ("fastpeft/test_ecosystem*",),
    "project": ("test_repo*", "test_install*", "test_cuda_build*", "test_bench*", "test_gpu_report*"),
    "simt": ("test_simt*", "test_*_simt*"),
    "triton": ("test_triton_*", "test_static*", "fastpeft/test_cli_tune*"),
    "kernels": ("test_*",),
    "methods": (
        "fastpeft/test_laws*", "fastpeft/test_golden*", "fastpeft/test_methods_*", "fastpeft/test_lora*",
        "fastpeft/test_dora*", "fastpeft/test_init*", "fastpeft/test_life*", "fastpeft/test_combine*",
        "fastpeft/test_convert*", "fastpeft/test_compile_methods*", "fastpeft/test_optimizers*",
        "fastpeft/test_shared*", "fastpeft/test_sparse*", "fastpeft/test_weight_side*",
    ),
    "files": ("fastpeft/test_checkpoint*", "fastpeft/test_hostile_*", "fastpeft/test_model_files*"),
    "serve": ("fastpeft/test_serve*", "fastpeft/test_pool*", "fastpeft/test_vllm_*", "fastpeft/test_ray_*"),
    "training": ("fastpeft/test_train*", "fastpeft/test_demo*", "fastpeft/test_cli*", "fastpeft/test_distributed*"),
    "models": ("fastpeft/test_*",),
}  # fmt: skip
PARTS_ROOT = Path(__file__).resolve().parents[1]


def full() -> bool:
    """The full form is asked for."""
    return os.environ.get(FULL_ENV) == "1"


def by_form(*, short: T, full_form: T) -> T:
    """One value in `make test`, another in `make test-all`."""
    return full_form if full() else short


def matrix(cases: Iterable[Any], short: Collection[Any] | Callable[..., bool]) -> list[Any]:
    """Parameters of a test, of which those in `short` (or of whose values it is true) are the short form.

    A case is a value, a tuple of values or a pytest.param; none may be in `short` that is not a case."""
    found, kept = [], 0
    for case in cases:
        given = case if hasattr(case, "marks") else pytest.param(*(case if isinstance(case, tuple) else (case,)))
        values = given.values
        is_short = short(*values) if callable(short) else (values[0] if len(values) == 1 else values) in short
        kept += is_short
        marks = given.marks if is_short else (*given.marks, pytest.mark.full_form)
        found.append(pytest.param(*values, marks=marks, id=given.id))
    if not kept or (not callable(short) and kept < len(short)):
        raise ValueError(f"{kept} of the cases are in the short form {short!r}: it should name cases, and at least one")
    return found


def grid(*axes: Iterable[Any]) -> list[Any]:
    """All combinations of the axes' values; in the short form each value of each axis, once or a little more.

    An axis that another's length divides is taken in another order, so that values do not always meet the same ones."""
    lists = [list(axis) for axis in axes]
    longest = max(map(len, lists))
    short = {tuple((i + i // len(one)) % len(one) for one in lists) for i in range(longest)}
    places = itertools.product(*(range(len(one)) for one in lists))
    values = itertools.product(*lists)
    return [
        pytest.param(*value, marks=() if place in short else pytest.mark.full_form)
        for place, value in zip(places, values, strict=True)
    ]


def part_of(path: Path) -> str:
    """The part that a test file belongs to."""
    name = path.resolve().relative_to(PARTS_ROOT).as_posix()
    return next(part for part, patterns in PARTS.items() if any(fnmatch(name, pattern) for pattern in patterns))
