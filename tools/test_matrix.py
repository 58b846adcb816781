"""Run tests with several versions of transformers, of PEFT and of Triton:
`python tools/test_matrix.py transformers==5.24 peft==0.18.1 triton==3.6.0 -- [pytest arguments]`; `triton` alone means
all of `TRITONS`.

Each version gets a small environment of its own under build/matrix that sees .venv's packages behind its own, so only
that package, and what it needs in another version, is installed again. With `--versions FOLDER` a version that lies
there already (FOLDER/triton-3.6.0 or FOLDER/v3.6.0, as `pip install --no-deps --target` makes it) is not installed: it
comes first on the path. Without pytest arguments transformers runs all tests of `fastpeft` and the programs of
test_ecosystem_as_peft.py, PEFT those where its version matters, and Triton those of machine code. Tests of what an
older PEFT does not have are skipped and say so (tests/tools/peft_versions.py).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setup_env import read_pyproject

ROOT = Path(__file__).resolve().parent.parent
TESTS = Path("tests")
ECOSYSTEM = ["-q", "--ecosystem", "-m", "ecosystem"]
# For each package the runs of pytest; files by pattern. The kernel library knows neither transformers nor PEFT.
RUNS = {
    "transformers": [
        ["-q", "--full", str(TESTS / "fastpeft")], [*ECOSYSTEM, "fastpeft/test_ecosystem_as_peft.py"],
    ],
    "peft": [[
        "-q", "--full",
        *(f"fastpeft/test_{name}.py" for name in ("patch*", "seen_as_peft", "as_peft", "attributes", "hub")),
    ]],
    "triton": [["-q", "--full", "-n", "2", "--dist", "worksteal", "test_triton_cubins.py", "test_triton_tuning.py"]],
}  # fmt: skip
# CUDA builds of torch bring these (pyproject.toml), and its CPU builds none: there the newest is installed.
TRITONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")


def environment(pin: str, versions: Path | None) -> tuple[Path, dict[str, str]]:
    """A Python, and its environment variables, that imports one package in another version, `transformers==5.24`."""
    package, _, version = pin.partition("==")
    for name in (f"{package}-{version}", f"v{version}"):
        if versions is not None and (there := (versions / name).resolve()).is_dir():
            path = os.pathsep.join(filter(None, [str(there), os.environ.get("PYTHONPATH")]))
            return Path(sys.executable), {**os.environ, "PYTHONPATH": path}
    folder = ROOT / "build" / "matrix" / pin.replace("==", "-")
    python = folder / "bin" / "python"
    done = folder / ".done"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", str(folder)], check=True)
        paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
        # addsitedir, not a plain path: the .pth files there make this project importable.
        line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        Path(paths["purelib"], "behind.pth").write_text(line)
        _, size = read_pyproject()["tool"]["peft-kernels"]["downloads"].get(package, ["", 1])
        print(f"test-matrix: {pin} into {folder.relative_to(ROOT)} (up to {size} MB to download)", flush=True)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
        wanted = pin if version.count(".") > 1 else f"{pin}.*"
        subprocess.run([*pip, "--disable-pip-version-check", wanted], check=True)
        done.touch()
    return python, dict(os.environ)


def runs(package: str) -> list[list[str]]:
    """The runs of pytest for a package, with the files that are there."""

    def files(argument: str) -> list[str]:
        return sorted(map(str, (ROOT / TESTS).glob(argument))) if argument.endswith(".py") else [argument]

    return [[found for argument in run for found in files(argument)] for run in RUNS[package]]


def main(argv: list[str]) -> None:
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(prog="test-matrix")
    parser.add_argument("pins", nargs="+", metavar="PACKAGE==VERSION")
    parser.add_argument("--versions", type=Path, metavar="FOLDER", help="versions that need not be installed")
    asked, args = parser.parse_args(argv[:split]), argv[split + 1 :]
    pins = [p for pin in asked.pins for p in ([f"triton=={v}" for v in TRITONS] if pin == "triton" else [pin])]
    if wrong := [pin for pin in pins if pin.partition("==")[0] not in RUNS or "==" not in pin]:
        sys.exit(f"test-matrix: expected {' or '.join(f'{name}==VERSION' for name in RUNS)}, got {', '.join(wrong)}")
    failed = []
    for pin in pins:
        package, _, version = pin.partition("==")
        python, env = environment(pin, asked.versions)
        have = [str(python), "-c", f"import {package}; print({package}.__version__)"]
        found = subprocess.run(have, check=True, capture_output=True, text=True, env=env).stdout.strip()
        if not f"{found}.".startswith(f"{version}."):
            sys.exit(f"test-matrix: asked for {pin}, {found} is imported")
        print(f"test-matrix: {package} {found}", flush=True)
        for run in [args] if args else runs(package):
            if subprocess.run([str(python), "-m", "pytest", *run], cwd=ROOT, env=env).returncode != 0:
                failed.append(f"{pin} ({' '.join(run)})")
    if failed:
        sys.exit(f"test-matrix: failed with {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
