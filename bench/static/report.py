"""Compiles, in two processes, remembers what machine code said, and prints: `python -m bench --static`."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from peft_kernels import tuning
from peft_kernels.triton_lib import toolchain

from . import cases, cuda, gpus, hazards, loops, sass, ttgir
from .calls import Case
from .metrics import Row, row

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "static"
ARCHS = (80, 86, 89, 90, 100, 120)


def read(cubin: bytes, marker: str | None = None) -> list[sass.Kernel]:
    """`sass.read`, remembered under the contents of the cubin and of the reader. (Triton keeps its own cubins.)"""
    reader = b"".join(Path(module.__file__).read_bytes() for module in (sass, loops, hazards))
    h = hashlib.sha256(cubin + repr(marker).encode() + reader)
    path = CACHE / f"{h.hexdigest()}.json"
    try:
        known = json.loads(path.read_text())
        return [sass.Kernel(**{k: tuple(v) if isinstance(v, list) else v for k, v in one.items()}) for one in known]
    except (OSError, ValueError, TypeError):
        found = sass.read(cubin, marker)
    CACHE.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps([asdict(k) for k in found]))
    fresh.replace(path)
    return found


def version(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))


def triton_rows(case: Case, capability: int) -> list[Row]:
    """The rows of a case: one for each specialisation of its kernel that the call launches."""
    from .launches import options, work

    rows: dict[str, Row] = {}
    arch = tuning.nearest(capability)
    compilers = toolchain.of(f"sm_{capability}")
    for launch in cases.run(case, capability):
        cubin = launch.kernel.asm["cubin"]
        code = read(cubin)[0]
        o = options(launch)
        name = case.kernel + ("+ds" if o.get("WITH_DS") else "")
        source = "" if case.row is None else cases.config_of(case.kernel, arch, case.row).source
        rows.setdefault(hashlib.sha256(cubin).hexdigest(), row(
            code, work(launch), capability, kernel=name, backend="triton", title=case.title, config=o,
            threads=32 * launch.kernel.metadata.num_warps, shared=launch.kernel.metadata.shared, source=source,
            first=case.first, triton=version(compilers.triton), ptxas=version(compilers.ptxas),
            shared_accumulators=ttgir.shared_accumulators(launch.kernel.asm["ttgir"]),
        ))  # fmt: skip
    return list(rows.values())


def _worker(capability: int, some: list[Case]) -> list[tuple[Case, list[Row]]]:
    import torch

    torch.set_num_threads(1)
    return [(case, triton_rows(case, capability)) for case in some]


def chosen(capability: int, kernels: Sequence[str], most: int | None) -> list[Case]:
    """The cases of an architecture whose kernel has one of `kernels` in its name; at most `most` specialisations."""
    found = [c for c in cases.cases(capability) if not kernels or any(k in (c.kernel, c.op) for k in kernels)]
    return found[:most]


def distinct(rows: Sequence[Row]) -> list[Row]:
    """Without the repetitions: cases may come to the same launch."""
    named = {json.dumps([r.kernel, r.arch, r.config, r.title], sort_keys=True, default=str): r for r in reversed(rows)}
    return list(named.values())[::-1]


def measure(
    archs: Sequence[int] = ARCHS, kernels: Sequence[str] = (), backends: Sequence[str] = ("triton", "cuda"),
    most: int | None = None, jobs: int = 2, told: Any = None,
) -> tuple[list[Row], list[str]]:  # fmt: skip
    """(rows, what was left out and why). told(done, total) is called as compilations end."""
    found: dict[int, list[tuple[int, list[Row]]]] = {a: [] for a in archs}
    skipped: list[str] = []
    work = []
    if "triton" in backends:
        why = cases.unavailable()
        if why is not None:
            skipped.append(f"triton: {why}")
        else:
            for arch in archs:
                some = chosen(arch, kernels, most)
                work += [(arch, i, some[i : i + 4]) for i in range(0, len(some), 4)]
    total, done = sum(len(some) for *_, some in work), 0
    if jobs > 1 and work:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            waiting = {pool.submit(_worker, arch, some): (arch, i) for arch, i, some in work}
            for future in as_completed(waiting):
                arch, i = waiting[future]
                pairs = future.result()
                found[arch].append((i, [r for _, rows in pairs for r in rows]))
                done += len(pairs)
                if told:
                    told(done, total)
    else:
        for arch, i, some in work:
            pairs = _worker(arch, some)
            found[arch].append((i, [r for _, rows in pairs for r in rows]))
            done += len(pairs)
            if told:
                told(done, total)
    rows = distinct([r for arch in archs for _, part in sorted(found[arch], key=lambda x: x[0]) for r in part])
    if "cuda" in backends:
        more, why_not = cuda.rows(archs, kernels, read, CACHE)
        rows += more
        skipped += why_not
    return rows, skipped


def lines(rows: Sequence[Row]) -> Iterator[str]:
    for r in rows:
        yield json.dumps({f.name: _rounded(getattr(r, f.name)) for f in fields(r)}, sort_keys=False, default=str)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return value


def _text(value: float | None, pattern: str = ".2f") -> str:
    return "" if value is None else format(value, pattern)


def _tile(config: dict[str, Any]) -> str:
    names = "x".join(str(config[k]) for k in ("BM", "BN", "BC", "BK", "BR") if k in config)
    return " ".join([names, *(f"{k[4]}{config[k]}" for k in ("num_warps", "num_stages") if k in config)])


COLUMNS = ("regs", "spill", "stack", "smem", "occ", "mma", "ld16", "async", "i/w", "by pipe", "iss/tc", "bytes")
LEGEND = """\
launch: rows of x, in x out features, rank, dtype; where it says nothing else NF4 in nested blocks of 64, dropout 0.05.
tile: BM x BN (or BC) x BK x BR, w warps, s stages. In brackets: a configuration that only a search takes. occ: warps
on an SM / most. ld16, async: loads of 16 bytes, asynchronous copies in the main loop. i/w: its instructions per weight
that it decodes, by pipe (tensor, lsu, fma, xu, control, uniform, alu). iss/tc: issue cycles / tensor-core cycles.
bytes: loads ask for / least. us: roofline of the launch, and what bounds it. bench/static/metrics.py: the formulas."""


def _compilers(rows: Iterable[Row]) -> str:
    return ", ".join(dict.fromkeys(f"Triton {r.triton}, ptxas {r.ptxas}" for r in rows if r.triton))


def show(rows: Sequence[Row], skipped: Sequence[str]) -> None:
    """A table per architecture."""
    from rich.console import Console
    from rich.table import Table

    console = Console() if Console().is_terminal else Console(width=260)
    for arch in dict.fromkeys(r.arch for r in rows):
        names = list(gpus.of(int(arch.removeprefix("sm_"))))
        table = Table(title=f"{arch}: static report (no GPU was used; rooflines from public specifications)",
                      caption=_compilers(r for r in rows if r.arch == arch))
        for name in ("kernel", "launch", "tile", "from"):
            table.add_column(name, no_wrap=True)
        for name in (*COLUMNS, *(f"{n} us" for n in names)):
            table.add_column(name, justify="right", no_wrap=True)
        for r in rows:
            if r.arch != arch:
                continue
            pipes = " ".join(f"{k[0]}{v:.1f}" for k, v in r.per_element_by_pipe.items())
            table.add_row(
                r.kernel if r.first else f"({r.kernel})", r.title, _tile(r.config), r.source or r.backend,
                str(r.registers), str(r.spills), str(r.stack), str(r.shared_memory), f"{r.occupancy:.0%}", r.mma or "",
                str(r.loads_16_bytes), str(r.async_copies), _text(r.per_element), pipes, _text(r.issue_over_tensor),
                _text(r.bytes_over_least), *(f"{r.roofline_us[n]:.3g} {r.bound[n]}" if r.bound else "" for n in names),
            )  # fmt: skip
        console.print(table)
    console.print(LEGEND, highlight=False)
    for why in skipped:
        console.print(f"left out: {why}")


def main(args: Any) -> int:
    """The command. Returns 1 where a budget is exceeded."""
    from rich.progress import Progress

    from . import budgets

    archs = [int(a) for a in args.arch] if args.arch else list(ARCHS)
    with Progress(console=_stderr(), transient=True) as progress:
        task = progress.add_task("compiling", total=None)
        rows, skipped = measure(archs, args.kernels or (), args.backends or ("triton", "cuda"), args.most, args.jobs,
                                lambda done, total: progress.update(task, completed=done, total=total))  # fmt: skip
    if args.json is not None:
        text = "".join(line + "\n" for line in lines(rows))
        if str(args.json) == "-":
            sys.stdout.write(text)
        else:
            args.json.write_text(text)
    else:
        show(rows, skipped)
    exceeded = budgets.check(rows)
    for text in [*(skipped if args.json is not None else []), *exceeded]:
        print(text, file=sys.stderr)
    return 1 if exceeded else 0


def _stderr() -> Any:
    from rich.console import Console

    return Console(stderr=True)
