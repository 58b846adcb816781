"""Run tests with several versions of transformers and of PEFT:
`python tools/test_matrix.py transformers==5.24 peft==0.18.1 -- [pytest arguments]`.

Each version gets a small environment of its own under build/matrix that sees .venv's packages behind its own, so only
that package, and what it needs in another version, is installed again. Without arguments transformers runs all tests of
`fastpeft` and the programs of test_ecosystem_as_peft.py, and PEFT those where its version matters. Tests of what an
older PEFT does not have are skipped and say so (tests/tools/peft_versions.py).
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = Path("tests", "fastpeft")
ECOSYSTEM = ["-q", "--ecosystem", "-m", "ecosystem"]
# For each package the runs of pytest; files by pattern. The kernel library knows neither package.
RUNS = {
    "transformers": [["-q", "--full", str(TESTS)], [*ECOSYSTEM, "test_ecosystem_as_peft.py"]],
    "peft": [[
        "-q", "--full",
        "test_patch*.py", "test_seen_as_peft.py", "test_as_peft.py", "test_attributes.py", "test_hub.py",
    ]],
}


def environment(pin: str) -> Path:
    """The Python of an environment with one package in another version, `transformers==5.24`."""
    folder = ROOT / "build" / "matrix" / pin.replace("==", "-")
    python = folder / "bin" / "python"
    done = folder / ".done"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", str(folder)], check=True)
        paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
        # addsitedir, not a plain path: the .pth files there make this project importable.
        line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        Path(paths["purelib"], "behind.pth").write_text(line)
        print(f"test-matrix: {pin} into {folder.relative_to(ROOT)} (up to 13 MB to download)", flush=True)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
        subprocess.run([*pip, "--disable-pip-version-check", f"{pin}.*"], check=True)
        done.touch()
    return python


def runs(package: str) -> list[list[str]]:
    """The runs of pytest for a package, with the files that are there."""

    def files(argument: str) -> list[str]:
        return sorted(map(str, (ROOT / TESTS).glob(argument))) if argument.endswith(".py") else [argument]

    return [[found for argument in run for found in files(argument)] for run in RUNS[package]]


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    pins, args = sys.argv[1:split], sys.argv[split + 1 :]
    if wrong := [pin for pin in pins if pin.partition("==")[0] not in RUNS or "==" not in pin]:
        sys.exit(f"test-matrix: expected {' or '.join(f'{name}==VERSION' for name in RUNS)}, got {', '.join(wrong)}")
    failed = []
    for pin in pins:
        package, _, version = pin.partition("==")
        python = environment(pin)
        have = [str(python), "-c", f"from importlib.metadata import version; print(version({package!r}))"]
        found = subprocess.run(have, check=True, capture_output=True, text=True).stdout.strip()
        if not f"{found}.".startswith(f"{version}."):
            sys.exit(f"test-matrix: asked for {pin}, {found} is imported")
        print(f"test-matrix: {package} {found}", flush=True)
        for run in [args] if args else runs(package):
            if subprocess.run([str(python), "-m", "pytest", *run], cwd=ROOT).returncode != 0:
                failed.append(f"{pin} ({' '.join(run)})")
    if failed:
        sys.exit(f"test-matrix: failed with {', '.join(failed)}")


if __name__ == "__main__":
    main()
