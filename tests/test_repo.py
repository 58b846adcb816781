"""The architecture, held by tests: who imports whom, file sizes, one home for each fact, documents that are true."""

from __future__ import annotations

import ast
import json
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("peft_kernels", "python", "csrc", "tests", "bench", "tools", "docs", "examples")
CODE = {".py", ".c", ".h", ".cpp", ".cu", ".cuh", ".inc", ".def", ".txt", ".toml", ".md", ".yaml", ".yml", ""}


def tree(*suffixes: str, under: tuple[str, ...] = ("",)) -> list[Path]:
    """Files that belong to the repository (in git, or new and not ignored), by suffix."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True
        ).stdout.decode()
    except OSError:
        listed = ""
    # An unpacked source archive has no git; what is built or installed there lies in these folders.
    names = [n for n in listed.split("\0") if n] or [
        str(p.relative_to(ROOT))
        for p in ROOT.rglob("*")
        if p.is_file() and not {".venv", "build", "dist", "runs", "lib", ".git"} & set(p.relative_to(ROOT).parts)
    ]
    paths = [ROOT / n for n in names if n.startswith(under) and (not suffixes or Path(n).suffix in suffixes)]
    return sorted(p for p in paths if p.is_file())


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, at import time) for every import in a file; those inside functions are made later."""
    parsed = ast.parse(path.read_text(encoding="utf-8"))
    later = {
        id(inner)
        for node in ast.walk(parsed)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in later) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module, id(node) not in later


def packages(path: Path, at_import: bool = False) -> set[str]:
    return {module.split(".")[0] for module, now in imports(path) if now or not at_import}


def rel(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_import_direction() -> None:
    """peft_kernels knows nothing of what is built on it; of other packages it needs torch alone to be imported."""
    allowed = set(sys.stdlib_module_names) | {"torch", "peft_kernels", "numpy"}
    for path in tree(".py", under=("peft_kernels/",)):
        upward = packages(path) & {"fastpeft", "transformers", "peft", "bench", "tests", "accelerate", "safetensors"}
        assert not upward, f"{rel(path)} imports {upward}: the import direction is fastpeft -> peft_kernels"
        if "triton" not in rel(path):
            eager = packages(path, at_import=True) - allowed
            assert not eager, f"{rel(path)} imports {eager} at import time; inside a function, if at all"
    # peft is what the project replaces: only tests and benches may have it, to compare.
    for path in tree(".py", under=("python/",)):
        assert "peft" not in packages(path, at_import=True), f"{rel(path)} imports peft"
        assert not packages(path) & {"bench", "tests"}, f"{rel(path)} imports from bench or tests"


def test_only_native_and_cuda_touch_pointers() -> None:
    for path in tree(".py", under=("peft_kernels/", "python/")):
        if path.name in ("native.py", "cuda.py", "huge_pages.py") or "cuda" in path.stem:
            continue  # huge pages are places in memory
        used = [
            n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute) and n.attr == "data_ptr"
        ]
        called = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name) and n.id == "CDLL"]
        assert not called, f"{rel(path)} loads a library: peft_kernels/native.py is the only ctypes binding"
        assert not used or rel(path).startswith("python/"), f"{rel(path)} uses data_ptr()"


def test_no_file_over_400_lines() -> None:
    long = {}
    for path in tree(*CODE):
        if path.name == "LICENSE" or "golden" in path.parts:
            continue
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > 400:
            long[rel(path)] = lines
    assert not long


def op_folders() -> list[str]:
    return sorted(
        p.parent.name
        for p in tree(".py", under=("peft_kernels/ops/",))
        if p.name == "__init__.py" and p.parent.name != "ops"
    )


def test_ops_are_found() -> None:
    assert {"quantize_4bit", "dequantize_4bit", "lora_linear"} <= set(op_folders())


@pytest.mark.parametrize("op", op_folders())
def test_each_op_has_its_backends_tests_and_bench(op: str) -> None:
    folder = ROOT / "peft_kernels" / "ops" / op
    for backend in ("native", "triton"):
        assert (folder / f"{backend}.py").exists(), f"{op} has no {backend} backend"
    naming = [p for p in tree(".py", under=("tests/",)) if p.name != "test_repo.py" and op in p.read_text()]
    assert any(p.name.startswith("test_") for p in naming), f"no test file names {op}"
    assert any(op in p.read_text() for p in tree(".py", under=("bench/",))), f"no bench names {op}"


def numbers(path: Path) -> list[float]:
    """The numbers that stand in a source file, whatever language it is in."""
    return [float(n) for n in re.findall(r"(?<![\w.])\d+\.\d{3,}(?:[eE][-+]?\d+)?", path.read_text(encoding="utf-8"))]


def test_the_nf4_table_has_one_home_per_language() -> None:
    """Copies of a table drift; more than a few of its values in one file are a copy."""
    from peft_kernels.formats import NF4_TABLE

    values = {round(abs(v), 5) for v in NF4_TABLE} - {0.0, 1.0}
    homes: dict[str, list[str]] = {"python": [], "native": []}
    for path in tree(".py", ".cpp", ".cu", ".cuh", ".h", ".inc", ".def"):
        if len({round(n, 5) for n in numbers(path)} & values) >= 3:
            homes["python" if path.suffix == ".py" else "native"].append(rel(path))
    assert homes["python"] == ["peft_kernels/formats/tables.py"]
    assert [h.split("/")[0] for h in homes["native"]] == ["csrc"], homes["native"]
    # one home per language, and both homes say the same
    literals = re.findall(r"[-+]?\d+\.\d+(?=f)", (ROOT / homes["native"][0]).read_text())
    have = {struct.pack("f", float(n)) for n in literals}
    assert {struct.pack("f", v) for v in NF4_TABLE} <= have


FORBIDDEN = ["transformers", "bitsandbytes", "peft", "fastpeft", "safetensors", "accelerate", "triton.compiler"]

IMPORT_SCRIPT = """
import json, sys, torch
before = set(sys.modules)
import peft_kernels
print(json.dumps({"added": sorted(set(sys.modules) - before), "all": sorted(sys.modules)}))
"""


def test_import_budget() -> None:
    """`import peft_kernels` after `import torch`: no heavy package, and few modules of its own, a tenth of a second.

    Modules are counted: seconds would tell what else the machine does."""
    done = subprocess.run([sys.executable, "-c", IMPORT_SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = json.loads(done.stdout)
    heavy = {name for name in found["all"] if any(name == f or name.startswith(f + ".") for f in FORBIDDEN)}
    assert not heavy
    own = {name for name in found["added"] if name.partition(".")[0] == "peft_kernels"}
    assert 10 < len(own) < 60
    assert len(set(found["added"]) - own) < 40


def test_no_machine_paths_or_hosts() -> None:
    """Nothing in the tree may hold only on one machine."""
    patterns = {
        "a path of one machine": re.compile(r"(?<![\w.])/(?:work|home|root|farm|opt/wheels|tmp)/[\w.]"),
        "a package host": re.compile(r"pypi\.org|pythonhosted|download\.pytorch|--(?:extra-)?index-url|debian\.org"),
    }
    for path in tree(*CODE, ".json", ".jsonl", ".svg"):
        if path == Path(__file__).resolve() or path.name == "LICENSE":
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for what, pattern in patterns.items():
            hit = pattern.search(text)
            assert hit is None, f"{rel(path)} names {what}: {text[max(0, hit.start() - 40) : hit.end() + 40]!r}"


def test_no_literal_tolerances() -> None:
    """Errors are judged against eager in the same dtype (peft_kernels.testing), never against a chosen number."""
    for path in tree(".py", under=("tests/",)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                for keyword in node.keywords:
                    if keyword.arg in ("atol", "rtol", "abs_tol", "rel_tol"):
                        value = keyword.value
                        exact = isinstance(value, ast.Constant) and value.value == 0
                        assert exact or not isinstance(value, ast.Constant), f"{rel(path)}:{node.lineno} {keyword.arg}"
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in ("allclose", "assert_close", "isclose"):
                    given = {k.arg for k in node.keywords}
                    assert {"atol", "rtol"} <= given, f"{rel(path)}:{node.lineno} {name} with its built-in tolerance"


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))


def test_documented_make_commands_exist() -> None:
    targets, named = make_targets(), set()
    for path in tree(".md"):
        for target in re.findall(r"(?:`|^\s*|\$ )make ([a-z][a-z-]*)", path.read_text(), flags=re.M):
            assert target in targets, f"{rel(path)} tells the reader to run `make {target}`"
            named.add(target)
    assert {"quickstart", "test"} <= named


def test_documented_files_exist() -> None:
    """A path in backquotes in the documents is a path of the tree (patterns in <> and outputs under runs/ are not)."""
    known = ("peft_kernels/", "python/", "csrc/", "tests/", "bench/", "docs/", "tools/", "examples/")
    for path in tree(".md"):
        for quoted in re.findall(r"`([\w./-]+)`", path.read_text()):
            if quoted.startswith(known) and not quoted.startswith(("bench/results", "peft_kernels/lib")):
                assert (ROOT / quoted).exists(), f"{rel(path)} names `{quoted}`, which does not exist"
        for link in re.findall(r"\]\(([^)#\s]+)[)#]", path.read_text()):
            if "://" not in link:
                assert (path.parent / link).exists(), f"{rel(path)} links to {link}"


def test_every_documented_command_is_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`fastpeft x` in the documents is a command of the command line, with the options named after it."""
    from fastpeft.apps.cli import main

    monkeypatch.setenv("COLUMNS", "200")  # else rich cuts option names short
    monkeypatch.setenv("NO_COLOR", "1")
    named = set()
    for path in tree(".md"):
        pattern = r"(?:`|^\s*|\$ )fastpeft ([a-z]+(?:-[a-z]+)*)([^`\n]*)"
        for command, rest in re.findall(pattern, path.read_text(), flags=re.M):
            monkeypatch.setattr(sys, "argv", ["fastpeft", command, "--help"])
            with pytest.raises(SystemExit) as stopped:
                main()
            assert stopped.value.code == 0, f"{rel(path)}: fastpeft {command}"
            text = capsys.readouterr().out
            if command == "run":  # a program's own options come after its name
                rest = re.match(r"(?:\s+-\S+)*", rest)[0]
            for option in re.findall(r"--[a-z][a-z-]+", rest.split("#")[0]):
                assert option in text, f"{rel(path)}: fastpeft {command} {option}"
            named.add(command)
    assert {"quickstart", "train", "generate", "merge", "inspect", "doctor"} <= named


def test_license_and_changelog() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    from peft_kernels import __version__

    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert __version__ in (ROOT / "CHANGELOG.md").read_text()


def test_the_table_of_methods_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "methods_table.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
