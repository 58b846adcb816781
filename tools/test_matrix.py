"""Run tests with several versions of transformers: `python tools/test_matrix.py 5.23 5.24 -- [pytest arguments]`.

Each version gets a small environment of its own under build/matrix that sees .venv's packages behind its own, so only
transformers, and what that version needs in another version, is installed again. Without arguments the tests of
`fastpeft` run; the kernel library does not know transformers.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment(version: str) -> Path:
    """The Python of an environment with transformers `version`."""
    folder = ROOT / "build" / "matrix" / version
    python = folder / "bin" / "python"
    done = folder / ".done"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", str(folder)], check=True)
        paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
        # addsitedir, not a plain path: the .pth files there make this project importable.
        line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        Path(paths["purelib"], "behind.pth").write_text(line)
        print(
            f"test-matrix: transformers {version} into {folder.relative_to(ROOT)} (about 13 MB to download)", flush=True
        )
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ]
        subprocess.run([*pip, f"transformers=={version}.*"], check=True)
        done.touch()
    return python


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    versions, args = sys.argv[1:split], sys.argv[split + 1 :] or ["-q", "--full", "tests/fastpeft"]
    failed = []
    for version in versions:
        python = environment(version)
        have = [str(python), "-c", "import transformers; print(transformers.__version__)"]
        found = subprocess.run(have, check=True, capture_output=True, text=True).stdout.strip()
        if not found.startswith(version + "."):
            sys.exit(f"test-matrix: asked for transformers {version}, {found} is imported")
        print(f"test-matrix: transformers {found}", flush=True)
        if subprocess.run([str(python), "-m", "pytest", *args], cwd=ROOT).returncode != 0:
            failed.append(version)
    if failed:
        sys.exit(f"test-matrix: failed with transformers {', '.join(failed)}")


if __name__ == "__main__":
    main()
