"""Machine code, read: resources from cuobjdump, instructions from nvdisasm. No GPU is needed for either."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from . import hazards
from .loops import loops

# A pipe by the beginning of an opcode; the first that fits. What fits none is integer, logic, or a move: the ALU.
PIPES = (
    ("tensor", r"[HIDBQO]G?MMA|UTC[A-Z]*MMA"),
    ("lsu", r"LD(?!GDEPBAR)|ST[GSL.]|ST$|STSM|STTM|ATOM|RED|SHFL|UBLK|UTMA|UTCCP|CCTL|PREFETCH|SUATOM|SULD|SUST"),
    ("fma", r"FFMA|FMUL|FADD|HFMA2|HMUL2|HADD2|HMNMX2|IMAD|IDP|DFMA|DADD|DMUL"),
    ("xu", r"MUFU|F2[FIP]|I2[FIP]|FRND|POPC|FLO|BREV"),
    ("control", r"BRA|BRX|BAR|BS|BREAK|EXIT|RET|CALL|NOP|DEPBAR|LDGDEPBAR|ARRIVES|WARPSYNC|WARPGROUP|SYNCS|MEMBAR|"
                r"FENCE|ERRBAR|YIELD|NANOSLEEP|ELECT|ACQBULK|UTCBAR|UTCATOMSWS|KILL|CS2R|S2R|S2UR|USETMAXREG|CGAERR|"
                r"UCGABAR"),
    ("uniform", r"U[A-Z]|R2UR|VOTEU|PLOP3U"),
    ("alu", r""),
)  # fmt: skip
_F2FP = re.compile(r"F2FP")  # two floats to a pair of halves: the ALU's, not the slow conversions'
# C[m, n] += A[m, k] B[k, n] of one instruction: of a warp, or of the four warps of a group
_WARP_SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}


@dataclass(frozen=True)
class Kernel:
    """One function of a cubin. loop: the instructions of its main loop, see `main_loop`; empty where it has none.
    overwritten: products of `hazards.overwritten`."""

    name: str
    registers: int
    stack: int
    local: int
    shared: int  # what the file declares; a launch may add to it
    threads: int  # of a block, where the file says so, else 0
    instructions: tuple[str, ...]
    loop: tuple[str, ...]
    overwritten: int = 0

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return sum(opcode(i).startswith(("LDL", "STL")) for i in self.instructions)

    @property
    def atomics(self) -> int:
        """Atomic sums of floats, whose result would depend on the order of the threads."""
        return sum(bool(re.match(r"(RED|ATOM)[GS]?\.", op)) and bool(re.search(r"\.(F\d|BF16|CAS)", op))
                   for op in map(opcode, self.instructions))  # fmt: skip


def carried_tool(name: str) -> Path | None:
    """A CUDA binary tool: the copy that Triton carries, else the one on the path, else None."""
    spec = find_spec("triton")
    carried = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name if spec and spec.origin else None
    found = str(carried) if carried is not None and carried.exists() else shutil.which(name)
    return None if found is None else Path(found)


@cache
def tool(name: str) -> str:
    """As `carried_tool`, but an error where there is none."""
    found = carried_tool(name)
    if found is None:
        raise FileNotFoundError(f"{name} is neither in Triton nor on the path: install triton, or the CUDA toolkit")
    return str(found)


def opcode(instruction: str) -> str:
    """`@!P0 LDG.E.128 R4, ...` -> `LDG.E.128`."""
    words = instruction.split()
    return words[1] if words[0].startswith("@") and len(words) > 1 else words[0]


@cache
def pipe(op: str) -> str:
    if _F2FP.match(op):
        return "alu"
    return next(name for name, pattern in PIPES if re.match(pattern, op))


def pipes(code: Iterable[str]) -> dict[str, int]:
    """Instructions by pipe."""
    counted = Counter(pipe(opcode(i)) for i in code)
    return {name: counted[name] for name, _ in PIPES if counted[name]}


def mma_kind(code: Iterable[str]) -> str | None:
    """HMMA, HGMMA, UTCHMMA ...: the most frequent family of tensor-core instructions; None where there is none."""
    counted = Counter(opcode(i).split(".")[0] for i in code if pipe(opcode(i)) == "tensor")
    return counted.most_common(1)[0][0] if counted else None


def narrow_mma(code: Iterable[str]) -> int:
    """Tensor-core instructions on TF32 operands, which hold fewer digits than float32."""
    return sum("TF32" in opcode(i) for i in code if pipe(opcode(i)) == "tensor")


def wgmma_from_registers(code: Iterable[str]) -> int:
    """Products of sm_90's warp groups whose left operand lies in registers."""
    return sum(bool(re.search(r"\bHGMMA\S* R\d+, R\d+", i)) for i in code)


def fillers(code: Iterable[str]) -> int:
    """NOPs right behind tensor-core instructions: on sm_120 the assembler's, where it has nothing else for the slot."""
    ops = [opcode(i) for i in code]
    return sum(b == "NOP" and pipe(a) == "tensor" for a, b in pairwise(ops))


def fmas_of(op: str) -> tuple[int, int] | None:
    """(multiply-adds of one tensor-core instruction, warps that issue it together); None where its text is silent."""
    if m := re.match(r"HGMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)\.", op):
        return int(m[1]) * int(m[2]) * int(m[3]), 4
    if (m := re.match(r"[HIQO]MMA\.(?:SP\.)?(\d+)\.", op)) and (shape := _WARP_SHAPES.get(m[1])):
        return shape[0] * shape[1] * shape[2], 1
    return None


def block_fmas(code: Iterable[str], warps: int) -> int:
    """Multiply-adds of a block's warps in one pass over `code`, on 16-bit operands; 0 where the text is silent."""
    total = 0.0
    for op in map(opcode, code):
        if pipe(op) == "tensor" and "TF32" not in op and (found := fmas_of(op)):
            total += found[0] * warps / found[1]
    return int(total)


def load_bytes(code: Iterable[str]) -> int:
    """Bytes that one thread asks of global memory in one pass over `code`, asynchronous copies included."""
    total = 0
    for op in map(opcode, code):
        if op.startswith(("LDG", "LDGSTS")) and not op.startswith("LDGDEPBAR"):
            total += width(op)
    return total


def width(op: str) -> int:
    """Bytes per thread of a load or store, by the suffixes of its opcode."""
    parts = op.split(".")[1:]
    for suffix, size in (("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if suffix in parts:
            return size
    return 4


def wide_loads(code: Iterable[str]) -> int:
    """Loads of 16 bytes or more a thread from global memory, asynchronous copies included."""
    return sum(op.startswith("LDG") and not op.startswith("LDGDEPBAR") and width(op) >= 16 for op in map(opcode, code))


def async_copies(code: Iterable[str]) -> int:
    """Copies from global to shared memory that no thread waits for: cp.async, bulk copies and tensor-map copies."""
    return sum(opcode(i).startswith(("LDGSTS", "UBLKCP", "UTMALDG")) for i in code)


def functions(text: str) -> dict[str, tuple[list[str], dict[str, int]]]:
    """nvdisasm's listing -> function -> (instructions, where its labels are)."""
    found: dict[str, tuple[list[str], dict[str, int]]] = {}
    labels, code = dict[str, int](), list[str]()
    for line in map(str.strip, text.splitlines()):
        if m := re.match(r"\.section\s+\.text\.([^,\"]+)", line):
            labels, code = {}, []
            found[m[1].strip()] = code, labels
        elif m := re.match(r"(\.L_x_\d+):", line):
            labels[m[1]] = len(code)
        elif m := re.match(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(m[1])
    for code, labels in found.values():  # the end is padding, behind a branch to itself
        while code and opcode(code[-1]) == "NOP":
            code.pop()
        if code and (m := re.match(r"BRA `\((\.L_x_\d+)\)$", code[-1])) and labels.get(m[1]) == len(code) - 1:
            code.pop()
    return {name: (code, labels) for name, (code, labels) in found.items() if code}


def parse(text: str, marker: str | None = None) -> dict[str, tuple[tuple[str, ...], tuple[str, ...], int]]:
    """nvdisasm's listing -> function -> (all instructions, those of the main loop, `hazards.overwritten`)."""
    return {
        name: (tuple(code), main_loop(code, labels, marker), hazards.overwritten(code, labels))
        for name, (code, labels) in functions(text).items()
    }


def main_loop(code: list[str], labels: dict[str, int], marker: str | None = None) -> tuple[str, ...]:
    """The loop that does the work: of the loops with most 16-bit MMAs the innermost; where no loop has an MMA, the one
    with most instructions that match `marker` (a pattern of opcodes), else the innermost of most global loads."""
    bodies = [[code[i] for i in body] for body in loops(code, labels)]

    def score(body: list[str]) -> tuple[int, int, int, int]:
        ops = [opcode(i) for i in body]
        products = sum((fmas_of(op) or (1, 1))[0] for op in ops if pipe(op) == "tensor" and "TF32" not in op)
        marked = sum(bool(re.match(marker, op)) for op in ops) if marker else 0
        narrow = sum("TF32" in op for op in ops)
        return products or narrow, marked, sum(op.startswith("LDG") for op in ops), -len(body)

    return tuple(max(bodies, key=score, default=[]))


def _run(name: str, *arguments: str) -> str:
    done = subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def read(cubin: bytes, marker: str | None = None) -> list[Kernel]:
    """Every kernel of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "--dump-resource-usage", str(path))
        listing = _run("nvdisasm", "-c", str(path))
        info = _run("cuobjdump", "-elf", str(path))
    rows = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    threads = {}
    for section in re.split(r"^\.nv\.info\.", info, flags=re.M)[1:]:
        if m := re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:\s*\S+\s+Value:\s*((?:0x[0-9a-f]+\s+)+)", section):
            x, y, z = (int(v, 16) for v in m[1].split()[:3])
            threads[section.split("\n", 1)[0].strip()] = x * y * z
    code = parse(listing, marker)
    return [
        Kernel(name, int(reg), int(stack), int(local), int(shared), threads.get(name, 0), *code.get(name, ((), (), 0)))
        for name, reg, stack, shared, local in rows
    ]
