"""Directories that are written whole or not at all, and manifests that say whether one is still whole.

A writer fills a temporary folder beside the target; every file is flushed to the disk; then one rename puts the folder
in place. A process killed at any point leaves the old folder as it was, and at worst a temporary folder that the next
writer removes. Where the target already exists, the two folders are exchanged in one step (Linux's renameat2).
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .checks import AdapterFileError, Confined, list_some, open_regular, path_inside, read_json
from .hub import CARD_NAME
from .write_errors import Spare, named_write_errors

# PEFT, transformers and the servers read files by name and pass over this one.
MANIFEST_NAME = "fastpeft_manifest.json"
FILE_MODE = 0o644  # safetensors and tempfile write 0600, which a server under another user cannot read

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EBUSY)

_TEMPORARY = re.compile(r"\.(.+)\.tmp-([A-Za-z0-9]+)-(\d+)-[0-9a-f]{8}")  # target, host and process of a writer
_TEMPORARY_FILE = re.compile(r"(.+)\.tmp-\d+-[0-9a-f]{8}")  # target


@contextmanager
def atomic_directory(
    path: str | os.PathLike[str], keep: bool = True, without: Collection[str] = ()
) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes `path`, with a manifest of what was written.

    keep: files of an existing `path` that were not written anew stay in it (PEFT writes adapters into folders that
    hold other things too), but for those in `without`. A folder that cannot be renamed (see `_is_pinned`) keeps what
    is not in `without` in any case. Inside of another
    such folder there is nothing to do: that one is made whole. Raises whatever the body raises, after removing the
    temporary folder, and WriteError for a full disk, a limit of files or a read-only file system.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file, a directory was expected")
    if any(_TEMPORARY.fullmatch(folder.name) for folder in (target, *target.parents)):
        target.mkdir(parents=True, exist_ok=True)
        yield target
        return
    with named_write_errors(target), Spare() as spare:
        target.parent.mkdir(parents=True, exist_ok=True)
        home = target if _is_pinned(target) else target.parent
        _remove_leftovers(home, target.name)
        temporary = home / f".{target.name}.tmp-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
        temporary.mkdir()
        try:
            if target.exists():
                os.chmod(temporary, target.stat().st_mode & 0o777)
            yield temporary
            write_manifest(temporary)
            _sync_tree(temporary)
            _put_in_place(temporary, target, keep, without)
        finally:
            spare.give_back()
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write; on success that file becomes `path`: a reader sees the old file or the new one, never half
    of it. Raises whatever the body raises, after removing what it wrote, and WriteError where there is no room."""
    temporary = Path(f"{os.fspath(path)}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    with named_write_errors(path):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _put_in_place(temporary: Path, target: Path, keep: bool, without: Collection[str]) -> None:
    written = os.listdir(temporary)
    if temporary.parent != target:
        if not target.exists():
            os.rename(temporary, target)
            _sync(target.parent)
            return
        if keep:
            _link_missing(target, temporary, without)
        if _exchange(temporary, target):
            _sync(target.parent)
            return
    # Each file is whole at any time, though not the set of them: the manifest goes last and tells.
    for name in sorted(written, key=lambda n: n == MANIFEST_NAME):
        source, goal = temporary / name, target / name
        if goal.is_dir() and not goal.is_symlink():
            shutil.rmtree(goal)
        os.replace(source, goal)
    for name in without:
        (target / name).unlink(missing_ok=True)
    _sync(target)


def _is_pinned(target: Path) -> bool:
    """True for a folder that must stay the one it is: its files are then replaced one by one.

    A mount point cannot be renamed, nor a folder whose parent is read-only, and a process (a shell) that stands in a
    folder would be left in the old one.
    """
    here = Path.cwd()
    return target.is_dir() and (
        target in (here, *here.parents) or os.path.ismount(target) or not os.access(target.parent, os.W_OK)
    )


def _link_missing(old: Path, new: Path, without: Collection[str]) -> None:
    """Give `new` the entries of `old` that it lacks, by hard links (copies where the file system has none)."""
    for entry in os.scandir(old):
        goal = new / entry.name
        if entry.name in without:
            continue
        if entry.is_dir(follow_symlinks=False) and not os.path.lexists(goal):
            shutil.copytree(entry.path, goal, symlinks=True, copy_function=_link)
        elif not os.path.lexists(goal):
            _link(entry.path, goal)


def _link(source: str, goal: str | Path) -> None:
    try:
        os.link(source, goal, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, goal, follow_symlinks=False)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step; False where the system or file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in _NOT_HERE:
        return False
    raise OSError(code, os.strerror(code), str(b))


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            file = os.path.join(folder, name)
            if not os.path.islink(file):
                os.chmod(file, FILE_MODE)
                _sync(file)
        _sync(folder)


def _sync(path: str | os.PathLike[str]) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # a directory cannot be opened on Windows
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # a file system without fsync on directories
            raise
    finally:
        os.close(handle)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]+", "", platform.node())[:32] or "host"


def _remove_leftovers(home: Path, target: str) -> None:
    """Remove temporary folders of writers on this machine that are no longer alive."""
    for name in os.listdir(home):
        match = _TEMPORARY.fullmatch(name)
        if match and _target_of(name) == target and match[2] == _host() and not _is_alive(int(match[3])):
            shutil.rmtree(home / name, ignore_errors=True)


def remove_leftovers(root: str | os.PathLike[str], pattern: str) -> None:
    """Remove temporary folders and files of atomic writers in `root`, for a caller who knows that none is at work.

    pattern: a full match of the names of what they were to become.
    """
    for entry in os.scandir(root):
        target = _target_of(entry.name)
        if target == entry.name or not re.fullmatch(pattern, target):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        elif entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)


def _target_of(name: str) -> str:
    """The name that a temporary folder or file was to get; other names as they are."""
    while match := _TEMPORARY.fullmatch(name) or _TEMPORARY_FILE.fullmatch(name):
        name = match[1]  # again: 0.1 once wrote a folder inside of such a folder through a third
    return name


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a small text file, whole or not at all."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def sha256_of(path: str | os.PathLike[str]) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(root: Path) -> None:
    """Record the size and sha256 of every file below a folder, in `fastpeft_manifest.json`. Model cards are left out:
    they are there to be edited."""
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name not in (MANIFEST_NAME, CARD_NAME))
    entries = {p.relative_to(root).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in files}
    text = json.dumps({"version": 1, "files": entries}, indent=1) + "\n"
    (root / MANIFEST_NAME).write_text(text, encoding="utf-8")


def verify_manifest(directory: str | os.PathLike[str], names: list[str] | None = None) -> None:
    """Raise AdapterFileError unless every file (or those named) is what the manifest says it was when written."""
    root = directory if isinstance(directory, Confined) else Path(directory)
    path = root / MANIFEST_NAME
    if not path.exists():
        raise AdapterFileError(f"{root} has no {MANIFEST_NAME}: unfinished, or written by something else")
    files = read_json(path).get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise AdapterFileError(f"{path}: expected an object `files` of objects")
    bad = []
    for name in files if names is None else [n for n in names if n in files]:
        file: Path | Confined = path_inside(root, name)
        if isinstance(root, Confined):
            file = Confined(Path(file), root.root)
        size, digest = files[name].get("bytes"), files[name].get("sha256")
        if not os.path.isfile(file) or os.stat(file).st_size != size or sha256_of(file) != digest:
            bad.append(name)
    if bad:
        raise AdapterFileError(f"{root}: {list_some(bad)} changed since they were written (see {MANIFEST_NAME})")


def newest_valid(root: str | os.PathLike[str], pattern: str = r"checkpoint-(\d+)") -> Path | None:
    """The folder below `root` with the highest number in its name whose manifest holds; None where there is none.

    pattern: a full match of the folder's name, whose first group is the number.
    """
    folders = Path(root).iterdir() if Path(root).is_dir() else ()
    found = [(int(match[1]), path) for path in folders if (match := re.fullmatch(pattern, path.name)) and path.is_dir()]
    for _, path in sorted(found, reverse=True):
        with suppress(AdapterFileError, OSError):
            verify_manifest(path)
            return path
    return None
