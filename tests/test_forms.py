"""The short and the full form of the tests (tests/tools/forms.py): what each runs, and that nothing is lost."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import forms
import pytest

ROOT = Path(__file__).resolve().parent.parent


def marked(parameters: list[Any]) -> tuple[list[Any], list[Any]]:
    """(the values of the short form, those of the full form alone)"""
    left = [p.values for p in parameters if any(m.name == "full_form" for m in p.marks)]
    return [p.values for p in parameters if p.values not in left], left


def test_a_matrix_keeps_its_cases_their_order_and_marks() -> None:
    gpu = pytest.param(3, marks=pytest.mark.gpu, id="three")
    found = forms.matrix([1, 2, gpu, 4], short={1, 4})
    assert [p.values for p in found] == [(1,), (2,), (3,), (4,)]
    assert marked(found) == ([(1,), (4,)], [(2,), (3,)])
    assert [m.name for m in found[2].marks] == ["gpu", "full_form"]
    assert found[2].id == "three"
    pairs = forms.matrix([(1, "a"), (2, "b")], short=lambda number, name: name == "b")
    assert marked(pairs) == ([(2, "b")], [(1, "a")])
    for short in ([5], [1, 5], lambda number: False):
        with pytest.raises(ValueError, match="should name cases"):
            forms.matrix([1, 2], short=short)


AXES = ["abcd", "abcd xy", "abcd xyz", "abcd xy 12", "a x", "ab xyzuvw", "ab xyz 123 uv"]


@pytest.mark.parametrize("strength", [1, 2])
@pytest.mark.parametrize("axes", AXES)
def test_the_short_form_of_a_grid_has_every_value_and_every_pair(axes: str, strength: int) -> None:
    lists = axes.split()
    short, left = marked(forms.grid(*lists, strength=strength))
    assert [set(values) for values in zip(*short, strict=True)] == [set(axis) for axis in lists]
    everything = list(itertools.product(*lists))
    assert sorted([*short, *left]) == sorted(everything)
    if strength == 1:
        assert len(short) == max(map(len, lists))
    else:
        for i, j in itertools.combinations(range(len(lists)), 2):
            assert {(v[i], v[j]) for v in short} == {(v[i], v[j]) for v in everything}
        assert len(short) < len(everything) or len(lists) < 3


def collected(*options: str) -> set[str]:
    environment = {k: v for k, v in os.environ.items() if k != forms.FULL_ENV}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-n", "0", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"^tests/\S+::.*$", done.stdout, flags=re.M))


@pytest.mark.slow
def test_the_short_form_is_a_part_of_the_full_one() -> None:
    """In one part, so that other files are not read: the same tests, and in each of them a case at least."""
    short, everything = collected("--part", "simt"), collected("--full", "--part", "simt")
    assert short < everything
    assert {name.split("[")[0] for name in short} == {name.split("[")[0] for name in everything}
    assert {forms.part_of(ROOT / name.split("::")[0]) for name in everything} == {"simt"}


def test_every_test_file_belongs_to_a_part_and_every_part_has_files() -> None:
    parts = {forms.part_of(path) for path in (ROOT / "tests").rglob("test_*.py")}
    assert parts == set(forms.PARTS)
    (listed,) = re.findall(r"^test-all:.*PART= (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    assert set(re.findall(r"\w+", listed)) - {"or"} == parts - {"ecosystem"}
