"""The suite's two forms and its parts: `make test` runs the short form, `make test-all [PART=...]` everything.

A test names all of its cases, once, and beside them those of the short form: every kind of case, but not every
combination, seed or draw. `matrix` and `grid` mark the others, which are deselected without `--full`; `by_form` and
`combinations` are for what lies inside of a test, a number of draws or a loop. Processes that tests start run the same
form.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import pytest

FULL_ENV = "PEFT_KERNELS_FULL_TESTS"  # set by --full, and inherited
T = TypeVar("T")

# Part -> the files of it, below tests/: `make test-all PART=simt`. A file belongs to the first part that names it.
PARTS: dict[str, tuple[str, ...]] = {
    "ecosystem": ("fastpeft/test_ecosystem*", "fastpeft/test_examples*"),
    "project": ("test_repo*", "test_install*", "test_cuda_build*", "test_bench*", "test_gpu_*", "test_peft_suite*"),
    "simt": ("test_simt*", "test_*_simt*"),
    "triton": ("test_triton_*", "test_static*", "fastpeft/test_cli_tune*"),
    "kernels": ("test_*",),
    "fuzz": ("fuzz/test_*",),
    "methods": (
        "fastpeft/test_laws*", "fastpeft/test_golden*", "fastpeft/test_methods_*", "fastpeft/test_lora*",
        "fastpeft/test_dora*", "fastpeft/test_init*", "fastpeft/test_life*", "fastpeft/test_combine*",
        "fastpeft/test_convert*", "fastpeft/test_compile_methods*", "fastpeft/test_optimizers*",
        "fastpeft/test_patch*", "fastpeft/test_prompts*", "fastpeft/test_registry*", "fastpeft/test_shared*",
        "fastpeft/test_sparse*", "fastpeft/test_weight_side*",
    ),
    "files": (
        "fastpeft/test_checkpoint*", "fastpeft/test_hostile_*", "fastpeft/test_hub*", "fastpeft/test_model_files*",
        "fastpeft/test_write_errors*", "fastpeft/test_config_limits*",
    ),
    "serve": ("fastpeft/test_serve*", "fastpeft/test_pool*", "fastpeft/test_vllm_*", "fastpeft/test_ray_*"),
    "training": (
        "fastpeft/test_train*", "fastpeft/test_demo*", "fastpeft/test_cli*", "fastpeft/test_distributed*",
        "fastpeft/test_launched*",
    ),
    "families": ("fastpeft/test_families*", "fastpeft/test_experts*"),
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


def _covering(axes: tuple[Iterable[Any], ...], strength: int) -> list[tuple[tuple[Any, ...], bool]]:
    """All combinations of the axes' values and whether each is of the short form: a greedy choice, in which values
    occur about equally often."""
    lists = [list(axis) for axis in axes]
    places = list(itertools.product(*(range(len(one)) for one in lists)))
    chosen = list(itertools.combinations(range(len(lists)), min(strength, len(lists))))
    has = {place: {(some, *(place[i] for i in some)) for some in chosen} for place in places}
    left, short = set().union(*has.values()), set()
    used: Counter[tuple[int, int]] = Counter()
    while left:
        best = max(places, key=lambda place: (len(left & has[place]), -sum(used[at] for at in enumerate(place))))
        short.add(best)
        used.update(enumerate(best))
        left -= has[best]
    return [(value, place in short) for place, value in zip(places, itertools.product(*lists), strict=True)]


def grid(*axes: Iterable[Any], strength: int = 1) -> list[Any]:
    """All combinations of the axes' values, as parameters. The short form has each value of each axis, with strength 2
    each pair of values of two axes."""
    return [
        pytest.param(*value, marks=() if short else pytest.mark.full_form)
        for value, short in _covering(axes, strength)
    ]


def combinations(*axes: Iterable[Any], strength: int = 1) -> list[tuple[Any, ...]]:
    """As `grid`, for a loop in a test: the combinations of the form that runs."""
    return [value for value, short in _covering(axes, strength) if short or full()]


def share(key: Any, keys: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases that go with one of the keys, a test for each of which loops over them: all, in the short form some."""
    return [case for other, case in combinations(keys, cases) if other == key]


def part_of(path: Path) -> str:
    """The part that a test file belongs to."""
    name = path.resolve().relative_to(PARTS_ROOT).as_posix()
    return next(part for part, patterns in PARTS.items() if any(fnmatch(name, pattern) for pattern in patterns))
