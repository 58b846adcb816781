"""The CUDA kernels as machine code: out of the built library, or compiled by nvcc where that is missing or older."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from peft_kernels import native

from . import gpus, sass
from .cuda_kernels import NOT_THERE, Fact, fact
from .metrics import Row, row
from .names import demangle

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"


def sources() -> list[Path]:
    return sorted(SOURCES.glob("*.cu"))


def digest() -> str:
    """Of everything that a CUDA source includes."""
    h = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*"), ROOT / "csrc" / "pk_abi.h"]):
        h.update(path.name.encode() + path.read_bytes())
    return h.hexdigest()[:24]


def library() -> Path | None:
    """The built library, where it is not older than its sources."""
    path = native._LIB_DIR / "libpeft_kernels_cuda.so"
    if not path.exists():
        return None
    newest = max(p.stat().st_mtime for p in SOURCES.glob("*.cu*"))
    return path if path.stat().st_mtime >= newest else None


def nvcc() -> Path | None:
    found = sass.carried_tool("nvcc")
    return found if found is not None else next((p for p in [Path("/usr/local/cuda/bin/nvcc")] if p.exists()), None)


def gencode(arch: int) -> str:
    """nvcc's option for one architecture, with the PTX that the build takes for it."""
    text = (ROOT / "CMakeLists.txt").read_text()
    for ptx, archs in re.findall(r"-gencode=arch=(compute_\d+),code=\[([^]]+)\]", text):
        if f"sm_{arch}" in archs.split(","):
            return f"-gencode=arch={ptx},code=sm_{arch}"
    raise ValueError(f"CMakeLists.txt does not build for sm_{arch}")


def from_library(path: Path, arch: int) -> Iterator[bytes]:
    """The cubins of one architecture in a library."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as scratch:
        # its files are named after its process, and may meet those of another that was killed
        done = subprocess.run([sass.tool("cuobjdump"), "-xelf", f".sm_{arch}.cubin", str(path)], cwd=folder, text=True,
                              env={**os.environ, "TMPDIR": scratch}, capture_output=True, check=False)  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"cuobjdump could not read sm_{arch} of {path}: {done.stdout}{done.stderr}")
        for cubin in sorted(Path(folder).glob("*.cubin")):
            yield cubin.read_bytes()


def compiled(compiler: Path, arch: int, cache: Path) -> Iterator[bytes]:
    """The cubins of one architecture, by nvcc; kept under the digest of the sources."""
    folder = cache / f"nvcc-{digest()}"
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources():
        out = folder / f"{source.stem}.sm_{arch}.cubin"
        if not out.exists():
            fresh = out.with_suffix(".part")
            done = subprocess.run([str(compiler), "-std=c++17", "-O3", "-cubin", gencode(arch), str(source), "-o",
                                   str(fresh)], capture_output=True, text=True, check=False)  # fmt: skip
            if done.returncode != 0:
                raise RuntimeError(f"nvcc does not compile {source.name} for sm_{arch}:\n{done.stderr.strip()}")
            fresh.replace(out)
        yield out.read_bytes()


def rows(
    archs: Sequence[int], kernels: Sequence[str], read: Callable[..., list[sass.Kernel]], cache: Path
) -> tuple[list[Row], list[str]]:
    """(rows of every CUDA kernel whose name or file holds one of `kernels`, why some are missing)."""
    path, compiler = library(), nvcc()
    if path is None and compiler is None:
        return [], ["cuda: the library is not built, or older than its sources, and there is no nvcc: run `make native`"
                    " where a CUDA toolkit is installed"]  # fmt: skip
    found, unknown = [], dict[str, None]()
    for arch in archs:
        for cubin in from_library(path, arch) if path is not None else compiled(compiler, arch, cache):  # type: ignore[arg-type]
            for code in read(cubin, None):
                name, arguments = demangle(code.name)
                known = fact(name, arguments, arch)
                if known is None:
                    unknown[name] = None
                    known = Fact(name)
                if known is NOT_THERE:
                    continue
                if kernels and not any(k == known.op or k in name for k in kernels):
                    continue
                if known.marker is not None:
                    code = next(k for k in read(cubin, known.marker) if k.name == code.name)
                # from sm_90 on, the file counts what the system reserves
                shared = max(0, code.shared - (gpus.RESERVED_SHARED if arch >= 90 else 0))
                found.append(row(
                    code, known.work(code), arch, kernel=name.removesuffix("_kernel"), backend="cuda",
                    title=f"<{', '.join(arguments)}>" if arguments else "", config=dict(known.config),
                    threads=code.threads or known.threads, shared=shared + known.dynamic_shared,
                ))  # fmt: skip
    if unknown:
        return found, [f"cuda: {', '.join(unknown)} not described: what a loop decodes is not known (add to "
                       f"bench/static/cuda_kernels.py)"]  # fmt: skip
    return found, []
