"""The documents: short lines, a short README, and pages that commands make from results and from the tree."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
PYTHON = ("python", "peft_kernels", "bench", "tools", "tests")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of tools/, by its name; they are scripts, which find each other in their own folder."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module


def documents() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout.split("\n")  # fmt: skip
    found = [ROOT / name for name in listed if name] or [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return sorted(path for path in found if path.is_file() and "golden" not in path.parts)


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_wrap_at_120(path: Path) -> None:
    """Rows of tables are longer where a cell forces it, and no cell is longer than a paragraph."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("|"):
            longest = max(len(cell) for cell in re.split(r"(?<!\\)\|", line))
            assert longest <= 500, f"{path.name}:{number} has a cell of {longest} characters"
        else:
            assert len(line) <= 120, f"{path.name}:{number} has {len(line)} characters"


def test_lines_of_c_wrap_at_120() -> None:
    wide = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 120
    ]  # fmt: skip
    assert not wide, wide


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130


@pytest.mark.parametrize("part", PYTHON)
def test_docstrings_begin_with_a_noun_or_a_verb(part: str) -> None:
    wrong = []
    for file in sorted((ROOT / part).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                words = (ast.get_docstring(node) or "").split(maxsplit=1)
                if words and words[0] in ("What", "Whether", "Who", "That"):
                    wrong.append(f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {words[0]} {words[1][:60]}")
    assert not wrong, "begin these with a noun or a verb of the field:\n" + "\n".join(wrong)


def check(script: str) -> None:
    done = subprocess.run([sys.executable, TOOLS / script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_benchmarks_are_up_to_date() -> None:
    check("benchmarks_table.py")


@pytest.mark.skipif(not (ROOT / "python/fastpeft/files").is_dir(), reason="python/fastpeft has no families yet")
def test_the_table_of_families_is_up_to_date() -> None:
    check("families_table.py")


@pytest.mark.skipif(not (ROOT / "python/fastpeft/files").is_dir(), reason="python/fastpeft has no rooms yet")
def test_the_picture_of_the_rooms_is_up_to_date() -> None:
    check("rooms_picture.py")


MACHINE = {"cpu": "a CPU", "cores": 4, "threads": 2, "level": "avx2", "torch": "2.9", "bitsandbytes": "0.50",
           "gpu": None}  # fmt: skip


def line(candidate: str, median: float, time: str = "2026-01-02T00:00:00Z", **more: Any) -> dict[str, Any]:
    return {
        "bench": "qlora", "suite": "qlora", "row": "step, 4 x 128 tokens", "candidate": candidate, "commit": "abc",
        "machine": MACHINE, "time": time, "samples": 3, "median_s": median, "p20_s": median / 2, "p80_s": median * 2,
        "speedups": [], **more,
    }  # fmt: skip


def write(folder: Path, name: str, *lines: dict[str, Any]) -> None:
    with (folder / name).open("a") as f:
        f.writelines(json.dumps(each) + "\n" for each in lines)


def page(tool: Any, folder: Path) -> str:
    text = tool("benchmarks_table").document("benchmarks.md", folder)
    assert isinstance(text, str)
    return text


def test_a_table_shows_the_newest_run_with_its_spread_and_machine(tool: Any, tmp_path: Path) -> None:
    old = line("ours-bf16", 9.0, "2026-01-01T00:00:00Z")
    write(tmp_path, "qlora-zen9-2threads.jsonl", old, line("ours-bf16", 1.5), line("bnb-bf16", 3.0, commit="abc"))
    text = page(tool, tmp_path)
    assert "| fastpeft, bfloat16, as a drop-in | 1.50 s (0.750 to 3.00) |" in text
    assert "9.00 s" not in text
    assert "a CPU (zen9), 2 of 4 cores, level avx2, no GPU; torch 2.9" in text
    assert "commit abc, 2026-01-02; `python -m bench --suite qlora`, 3 samples" in " ".join(text.split())


def test_parts_of_a_suite_may_come_from_runs_of_their_own(tool: Any, tmp_path: Path) -> None:
    decode = line("ours-f32", 0.05, "2025-12-31T00:00:00Z", row="decode, a token")
    write(tmp_path, "qlora-zen9-2threads.jsonl", line("ours-bf16", 1.5), decode)
    assert "50.0 ms" in page(tool, tmp_path)
    assert "1.50 s" in page(tool, tmp_path)


@pytest.mark.parametrize(
    ("recorded", "said"),
    [(None, "the wheel's kernel"), ("a-kernel 1.2", "a-kernel 1.2"),
     ({"name": "a-kernel", "version": "1.2"}, "a-kernel 1.2")],
)  # fmt: skip
def test_a_table_names_the_kernel_of_bitsandbytes(tool: Any, tmp_path: Path, recorded: Any, said: str) -> None:
    write(tmp_path, "qlora-zen9-2threads.jsonl", line("bnb-bf16", 1.0, machine={**MACHINE, "bnb": recorded}))
    assert f"bitsandbytes 0.50 with {said}" in " ".join(page(tool, tmp_path).split())


def test_a_ratio_needs_tests_that_passed(tool: Any, tmp_path: Path) -> None:
    cells = tool("benchmarks_cells")
    ours, theirs = line("ours", 1.0), line("PEFT", 2.0)
    assert cells.ratio_of(["ours"], ["PEFT"])({"ours": ours, "PEFT": theirs}) == "2.00"
    del ours["speedups"]
    assert cells.ratio_of(["ours"], ["PEFT"])({"ours": ours, "PEFT": theirs}) == ""
    assert cells.ratio_of(["ours"], ["PEFT"])({"PEFT": theirs}) == ""


def test_a_limit_is_shown_with_both_ways_to_meet_it(tool: Any, tmp_path: Path) -> None:
    ways = {"limit": "times the bound", "value": 1.8, "most": 1.5, "met": True,
            "or": {"limit": "times its products alone", "value": 1.2, "most": 1.25, "met": True}}  # fmt: skip
    steps = [line(name, s, row="products, SmolLM2-135M, 4 x 128 tokens") for name, s in (("step", 2.0), ("o: dX", 1.0))]
    write(tmp_path, "qlora-zen9-2threads.jsonl", {**steps[0], "limits": [ways], "calls": 30}, steps[1])
    text = tool("benchmarks_table").document("benchmarks_training.md", tmp_path)
    said = "1.80 times the bound of 1.50 or 1.20 times its products alone of 1.25: met |"
    assert text.index(f"| step | 2.00 s (1.00 to 4.00) | 30 | {said}") < text.index("| o: dX | 1.00 s"), "in order"


def test_a_missing_row_of_the_readme_is_named(tool: Any, tmp_path: Path) -> None:
    write(tmp_path, "qlora-zen9-2threads.jsonl", line("ours-bf16", 1.5))
    with pytest.raises(SystemExit, match=r"'Trainer, dropout 0\.05': run --suite dropin"):
        tool("benchmarks_table").summary(tmp_path)


ROOMS = {
    "fastpeft/__init__.py": "from .model import whole\n",
    "fastpeft/files/__init__.py": '"""Bytes & <names>."""\n',
    "fastpeft/files/read.py": "import os\nimport peft_kernels.formats\n",
    "fastpeft/config/__init__.py": '"""Names."""\n',
    "fastpeft/config/base.py": "def late():\n    from ..files.read import a, b\n",
    "fastpeft/model/__init__.py": '"""The whole.\n\nAnd more."""\n',
    "fastpeft/model/whole.py": (
        "from typing import TYPE_CHECKING\nfrom . import parts\nfrom .. import config\nfrom ..config import base\n"
        "if TYPE_CHECKING:\n    from ..files.read import a\n"
    ),
    "fastpeft/model/parts.py": "import fastpeft.config.base\n",
    "fastpeft/apps/__init__.py": '"""Applications."""\n',
    "fastpeft/apps/cli.py": "from fastpeft import LoraConfig\nimport fastpeft\n",
    "peft_kernels/__init__.py": "",
}


@pytest.fixture
def rooms(tmp_path: Path) -> Path:
    for name, text in ROOMS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_imports_between_rooms_are_found_wherever_they_stand(tool: Any, rooms: Path) -> None:
    """Relative and absolute ones, those inside functions and those for types; those within a room are none."""
    assert tool("floors").arrows(rooms / "fastpeft") == {
        ("fastpeft", "model"): 1, ("files", "peft_kernels"): 1, ("config", "files"): 2, ("model", "config"): 3,
        ("model", "files"): 1, ("apps", "fastpeft"): 2,
    }  # fmt: skip


def drawn(tool: Any, rooms: Path) -> str:
    picture: ModuleType = tool("rooms_picture")
    text = picture.picture(rooms / "fastpeft", rooms / "peft_kernels")
    assert isinstance(text, str)
    return text


def test_the_picture_has_the_rooms_as_floors(tool: Any, rooms: Path) -> None:
    text = drawn(tool, rooms)
    names = re.findall(r'font-weight="600"[^>]*>([^<]+)<', text)
    assert names == ["peft_kernels", "files", "config", "model", "fastpeft", "apps"]
    heights = [int(y) for y in re.findall(r'<rect x="12" y="(\d+)"', text)]
    assert heights == sorted(heights, reverse=True)  # the ground first, at the bottom
    assert "Bytes &amp; &lt;names&gt;." in text
    assert "And more" not in text
    assert text.count("<path") == 2 * 5  # a line and a head; what the top of the package imports is not drawn
    assert tool("rooms_picture").UP not in text
    assert drawn(tool, rooms) == text


def test_an_upward_arrow_is_red_and_a_folder_without_a_floor_an_error(tool: Any, rooms: Path) -> None:
    (rooms / "fastpeft/files/read.py").write_text("from ..model import whole\n")
    assert tool("rooms_picture").UP in drawn(tool, rooms)
    (rooms / "fastpeft/attic").mkdir()
    (rooms / "fastpeft/attic/old.py").write_text("")
    with pytest.raises(SystemExit, match="does not name attic"):
        drawn(tool, rooms)
