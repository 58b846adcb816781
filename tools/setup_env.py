"""Set up .venv with the requirements of pyproject.toml's extras: `python tools/setup_env.py demo test lint`.

Standard library only, since nothing is installed yet. A stamp in .venv, keyed on the requirements, makes a second run
free of network and quick; a run that was killed half-way is noticed and the environment made anew (what was downloaded
stays in pip's cache). Which build of torch comes is decided by pip's own settings; nothing here names an index.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
BUSY = VENV / ".setup-unfinished"
STAMP = VENV / ".setup-done"
OLDEST = (3, 10)


def say(text: str = "") -> None:
    print(f"setup: {text}", flush=True)


def works() -> bool:
    """True if .venv is there, runs and has pip: an interrupted `python -m venv` leaves one that does not."""
    try:
        return subprocess.run([str(PYTHON), "-m", "pip", "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


def make_venv() -> None:
    if BUSY.exists():
        say("the last setup did not finish: starting .venv afresh (finished downloads are in pip's cache)")
        shutil.rmtree(VENV)
    if not works():
        say(f".venv with Python {platform.python_version()} ({sys.executable})")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)


def read_pyproject() -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return found


def requirements(pyproject: dict[str, Any], extras: list[str]) -> list[str]:
    """The build's and the project's requirements and those of the extras; an extra may name others of the project."""
    project, wanted = pyproject["project"], list(pyproject["build-system"]["requires"])
    wanted += project["dependencies"]
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            if line.startswith(project["name"] + "["):
                names = line[len(project["name"]) + 1 : line.index("]")]
                wanted += requirements(pyproject, [name.strip() for name in names.split(",")])
            else:
                wanted.append(line)
    return list(dict.fromkeys(wanted))


def pip(*args: str) -> subprocess.CompletedProcess[str]:
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", *args]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True)


def download(*args: str) -> None:
    """`pip install`, of whose output the lines with downloads (names and sizes), results and errors are shown."""
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "off", *args]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        for line in running.stdout:
            text = line.strip()
            if text.startswith(("Downloading", "Using cached", "Installing", "Building", "ERROR")):
                print("  " + text[:120], flush=True)
    if running.returncode != 0:
        give_up("pip failed")


def must(done: subprocess.CompletedProcess[str], what: str) -> None:
    if done.returncode != 0:
        print(done.stdout + done.stderr)
        give_up(f"{what} failed")


def give_up(what: str) -> NoReturn:
    BUSY.unlink(missing_ok=True)  # pip ended by itself, and so left no package half installed
    sys.exit(f"setup: {what}; run the same command again once its cause is gone")


def resolve(wanted: list[str]) -> list[dict[str, Any]] | None:
    """The packages that pip would install, or None where it cannot say (its install below then tells why)."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        # Since pip 23.2 a dry run reads each package's metadata only and downloads nothing large.
        done = pip("install", "--dry-run", "--quiet", "--report", str(report), *wanted)
        if done.returncode != 0 or not report.exists():
            return None
        found: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["install"]
        return found


def announce(found: list[dict[str, Any]], alone: list[str], downloads: dict[str, list[Any]]) -> None:
    """A table of what comes: package, what it is for, size."""
    names = {item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"] for item in found}
    names.update(dict.fromkeys(alone, "newest"))
    cuda = [name for name in names if name.startswith("nvidia-")]
    rows: list[tuple[str, str, int]] = []
    for name, (what, size) in downloads.items():
        if name in names:
            if name == "torch" and cuda:
                size = downloads["torch-cuda"][1]
            rows.append((f"{name} {names.pop(name)}", what, size))
    if cuda:
        what, size = downloads["cuda-libraries"]
        rows.append((f"{len(cuda)} nvidia packages", what, size))
    rest = [name for name in names if name not in cuda]
    if rest:
        rows.append((f"{len(rest)} small ones", ", ".join(sorted(rest)), round(0.6 * len(rest))))
    say(f"downloads, about {sum(size for _, _, size in rows)} MB in all (less where pip has them in its cache):")
    width = max(len(name) for name, _, _ in rows)
    for name, what, size in rows:
        print(f"  {name:{width}}  {size:>5} MB  {what[:90]}")
    sys.stdout.flush()


def install(extras: list[str]) -> None:
    pyproject = read_pyproject()
    ours = pyproject["tool"]["peft-kernels"]
    # All of the requirements are in the key, so that a stamp also answers for a run that asks for fewer extras.
    needs = [pyproject["build-system"], pyproject["project"], ours["without-their-dependencies"]]
    parts = [needs, sys.version, str(ROOT)]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    done = STAMP.read_text().split() if STAMP.exists() else []
    if done and done[0] == key:
        if set(extras) <= set(done[1:]):
            return
        extras = [*extras, *(e for e in done[1:] if e not in extras)]
    wanted = requirements(pyproject, extras)
    alone = [name for extra in extras for name in ours["without-their-dependencies"].get(extra, [])]
    BUSY.touch()
    # An older pip downloads whole packages to read their metadata, so that nothing could be named before it comes.
    if tuple(int(n) for n in pip("--version").stdout.split()[1].split(".")[:2]) < (24, 0):
        say("pip itself is renewed first, 2 MB")
        must(pip("install", "--quiet", "--upgrade", "pip"), "renewing pip")
    found = resolve(wanted)
    missing = [name for name in alone if pip("show", "--quiet", name).returncode != 0]
    if found is None:
        say("pip could not list the downloads beforehand; it names each with its size below")
    elif found or missing:
        announce(found, missing, ours["downloads"])
    if found is None or found:
        download(*wanted)
    for name in missing:
        download("--no-deps", name)
    # The library is built by `make native`, in view; here only the packages and the command become importable.
    os.environ["PEFT_KERNELS_NATIVE"] = "0"
    must(pip("install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", "."), "installing this project")
    BUSY.unlink()
    STAMP.write_text(" ".join([key, *extras]) + "\n")
    say(f"{VENV.name} is ready: {', '.join(extras)}")


def main() -> None:
    if sys.version_info < OLDEST:
        sys.exit(f"setup: Python {OLDEST[0]}.{OLDEST[1]} or newer is needed, this is {platform.python_version()}")
    if sys.argv[1] == "--inside":  # called by the lines below, under the environment's own Python
        return install(sys.argv[2:])
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / ".setup-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two makes at once: the second waits and then finds everything done
        make_venv()
        sys.exit(subprocess.run([str(PYTHON), __file__, "--inside", *sys.argv[1:]]).returncode)


if __name__ == "__main__":
    main()
