"""The formulas of the static report; docs/kernels/without_a_gpu.md explains how to read it. Everything follows from the
machine code of one kernel, the launch that it belongs to, and the public numbers in `gpus.py`.

main loop       of the loops with most 16-bit tensor-core instructions the innermost (`sass.main_loop`); without one
                the whole kernel
per_element     instructions of the main loop other than the tensor cores' (and the NOPs that fill the slots behind
                those on sm_120) x threads of a block / weights that a block decodes in it; by pipe all are listed
                (on mma.sync the tensor cores' grow with BM)
issue_cycles    instructions of the main loop x warps of a block / 4 schedulers: clocks that an SM needs to issue them
tensor_cycles   multiply-adds of the main loop / what the SM's tensor cores do in a clock
bytes_over_least  bytes that the main loop's global loads ask for x threads / bytes of the tiles it works on, each once
roofline        the largest of: bytes of every operand and result once / bandwidth; multiply-adds / peak;
                issue cycles of all blocks' main loops / SMs / clock; and where blocks share sums what comes after the
                loop: parts of them written, read and added, by the kernels' own cost model (`splits.py`)
occupancy       resident warps / the most an SM holds, by registers, shared memory, threads and blocks
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from . import gpus, sass, splits


@dataclass(frozen=True)
class Work:
    """The work of a launch. weights: 4-bit weights that a block decodes in one pass of its main loop (of all its code
    where `straight`); 0 where it decodes none. tile: (BM, BN, BK) of a product with a weight. bytes: every operand and
    result once. fmas: multiply-adds of the launch. loop_bytes: of the operands' tiles in one pass of the main loop.
    passes: times that a block goes through it. wide: the products are of 16-bit numbers, so on the tensor cores. sums:
    of a CUDA kernel whose blocks may share them; apart: whether another kernel adds their parts, None: where that takes
    fewer clocks."""

    weights: float = 0.0
    straight: bool = False
    tile: tuple[int, int, int] | None = None
    bytes: float = 0.0
    fmas: float = 0.0
    loop_bytes: float = 0.0
    passes: float = 0.0
    blocks: int = 0
    wide: bool = True
    sums: splits.Sums | None = None
    apart: bool | None = None


@dataclass(frozen=True)
class Row:
    """One line of the report. None stands for what the kernel does not have or the machine code does not say."""

    kernel: str
    backend: str
    arch: str
    title: str
    source: str  # of the configuration: "model" or "measured"; "" where no table chose it
    first: bool  # whether a launch takes this configuration without a search
    config: dict[str, Any]
    triton: str  # the version that compiled it, and of the ptxas that it took; "" where nvcc did
    ptxas: str
    registers: int
    spills: int
    stack: int
    shared_memory: int
    threads: int
    blocks_per_sm: int
    occupancy: float
    mma: str | None
    tf32: int
    wgmma_from_registers: int  # products of sm_90 that read their left operand from registers while others go on
    atomics: int
    overwritten: int  # products of sm_90 whose left operand is written to while they read it
    loads_16_bytes: int
    async_copies: int
    instructions: int
    loop_instructions: int
    per_element: float | None
    per_element_by_pipe: dict[str, float]
    issue_cycles: float | None
    tensor_cycles: float | None
    issue_over_tensor: float | None
    bytes_over_least: float | None
    wide: bool  # has products of 16-bit numbers
    matrix: bool  # multiplies by a weight on the tensor cores
    tiles: float  # of a matrix kernel: products in its main loop / those of the tile; 1 unless unrolled or redundant
    decodes: bool
    shared_accumulators: int | None = None  # products that add to another's sum in a loop; None: no Triton kernel
    roofline_us: dict[str, float] = field(default_factory=dict)
    bound: dict[str, str] = field(default_factory=dict)  # by GPU: memory, tensor, float or issue


def row(
    code: sass.Kernel, work: Work, arch: int, *, kernel: str, backend: str, title: str, config: dict[str, Any],
    threads: int, shared: int, source: str = "", first: bool = True, triton: str = "", ptxas: str = "",
    shared_accumulators: int | None = None,
) -> Row:  # fmt: skip
    """Every metric of one compiled kernel."""
    limits, warps = gpus.ARCHS[arch], -(-threads // 32)
    body = code.instructions if work.straight or not code.loop else code.loop
    resident = gpus.blocks_per_sm(arch, code.registers, shared, threads)
    issue = len(body) * warps / gpus.SCHEDULERS
    weights, matrix, times = work.weights, work.tile is not None and work.wide, 1.0
    fmas = sass.block_fmas(body, warps)
    if work.tile is not None and matrix:
        tile = work.tile[0] * work.tile[1] * work.tile[2]
        fmas = fmas or tile  # UTCHMMA has its shape in a descriptor, not in its text
        times = fmas / tile
    tensor = fmas / limits.tensor_fmas if matrix else None
    each = threads / weights if weights else None
    asked = sass.load_bytes(body) * threads
    roofs, bound = roofline(work, arch, issue)
    return Row(
        kernel=kernel, backend=backend, arch=f"sm_{arch}", title=title, source=source, first=first, config=config,
        triton=triton, ptxas=ptxas,
        registers=code.registers, spills=code.spills, stack=code.stack + code.local, shared_memory=shared,
        threads=threads, blocks_per_sm=resident, occupancy=resident * warps / limits.warps,
        mma=sass.mma_kind(body) or sass.mma_kind(code.instructions), tf32=sass.narrow_mma(code.instructions),
        wgmma_from_registers=sass.wgmma_from_registers(code.instructions), atomics=code.atomics,
        overwritten=code.overwritten,
        loads_16_bytes=sass.wide_loads(body), async_copies=sass.async_copies(body),
        instructions=len(code.instructions), loop_instructions=len(code.loop),
        per_element=(len(body) - sass.pipes(body).get("tensor", 0) - sass.fillers(body)) * each if each else None,
        per_element_by_pipe={k: n * each for k, n in sass.pipes(body).items()} if each else {},
        issue_cycles=issue if code.loop else None, tensor_cycles=tensor,
        issue_over_tensor=issue / tensor if tensor else None,
        bytes_over_least=asked / work.loop_bytes if asked and work.loop_bytes else None,
        wide=work.wide, matrix=matrix, tiles=times, decodes=weights > 0,
        shared_accumulators=shared_accumulators, roofline_us=roofs, bound=bound,
    )  # fmt: skip


def roofline(work: Work, arch: int, issue: float) -> tuple[dict[str, float], dict[str, str]]:
    """(GPU -> least microseconds of the launch, GPU -> what sets it). issue: cycles of one pass of a block's loop."""
    times, bound = dict[str, float](), dict[str, str]()
    if not work.bytes:  # nobody said what the launch does
        return times, bound
    for name, gpu in gpus.of(arch).items():
        peak = gpu.tflops if work.wide else gpu.float_tflops
        parts = {
            "memory": work.bytes / gpu.gbs / 1e3,
            "tensor" if work.wide else "float": 2 * work.fmas / peak / 1e6,
            "issue": issue * work.passes * work.blocks / gpu.sms / gpu.ghz / 1e3,
        }
        bound[name] = max(parts, key=lambda k: parts[k])
        times[name] = parts[bound[name]]
        if work.sums is not None:
            split = work.sums.split(gpu.sms, work.apart)
            times[name] += work.sums.adding(split, gpu.sms) / gpu.ghz / 1e3
    return times, bound
