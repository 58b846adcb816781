"""`make peft-suite`: what it makes of pytest's results, and the list of cases that are not meant to pass."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "peft_suite"
sys.path.insert(0, str(TOOL))
import report  # noqa: E402

sys.path.remove(str(TOOL))

XML = """<testsuites><testsuite>
<testcase classname="tests.test_a.TestX" name="test_one[1]" time="0.1"/>
<testcase classname="tests.test_a" name="test_two">
<failure message="ValueError: r=8 is 'bad', 0x7f&#10;more"/></testcase>
<testcase classname="tests.test_a" name="test_six">
<failure message="ValueError: r=16 is 'bad', 0x8a"/></testcase>
<testcase classname="tests.test_a" name="test_three"><skipped message="needs a GPU"/></testcase>
<testcase classname="tests.test_a" name="test_four"><failure message="AttributeError: no"/></testcase>
<testcase classname="tests.test_a" name="test_four"><error message="teardown"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "test_a.xml").write_text(XML)
    return tmp_path


def test_results_are_read(results: Path) -> None:
    found = report.read(results / "test_a.xml")
    assert found.passed == ["test_a.py::TestX::test_one[1]"]
    assert sorted(found.failed) == ["test_a.py::test_four", "test_a.py::test_six", "test_a.py::test_two"]
    assert found.skipped == {"test_a.py::test_three": "needs a GPU"}
    assert report.read(results / "test_b.xml").failed.keys() == {"test_b.py"}


def test_failures_are_grouped_and_those_not_meant_are_told_apart(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passing = "test_a.py::TestX::test_one[1]"
    listed = {"test_a.py::test_four": ("private", "It patches `_x`."), passing: ("wrong", "No.")}
    monkeypatch.setattr(report, "not_meant", lambda: listed)
    (results / "docs").mkdir()
    assert report.show(results, ["test_a"], ["test_a", "test_b"], results) == 1
    said, written = capsys.readouterr().out, (results / "docs" / "compatibility.md").read_text()
    assert "     2 ValueError: r=N is 'bad', N" in said
    assert "1 passed, 3 failed, 1 skipped; 2 of the failed are not in not_meant.txt" in said
    assert f"passes, but is in not_meant.txt: {passing}" in said
    assert "| `test_a` | 1 | 2 | 1 | 1 |" in written
    assert "| `test_b` | not run |" in written
    assert "- It patches `_x`. (1)" in written
    assert "2: `ValueError: r=N is 'bad', N`, as in `test_a.py::test_two`" in written


def test_the_list_is_sound() -> None:
    """Each case once, below a reason of one of the two kinds."""
    assert {sort for sort, _ in report.not_meant().values()} <= set(report.REASONS)


@pytest.mark.parametrize("text", ["test_a.py::x\n", "# odd: why\n", "# private: why\ntest_a.py::x\ntest_a.py::x\n"])
def test_a_list_that_is_not_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(SystemExit, match=r"list.txt:\d: "):
        report.not_meant(tmp_path / "list.txt")
