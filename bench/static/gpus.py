"""Limits of GPUs, from their makers' public documents. The only home of these numbers; nothing here was measured.

Sources: NVIDIA's datasheets and architecture whitepapers of A100 (SXM4 80 GB), GeForce RTX 4090 (Ada), H100 (SXM5),
H200 (SXM), B200 (as in HGX B200) and GeForce RTX 5090 (RTX Blackwell); limits per compute capability from the table
"Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """Per SM: registers (32-bit), resident warps and blocks, shared memory in bytes, of it the most of one block; and
    multiply-adds a clock, on the tensor cores (bfloat16 with float32 sums, dense) and in float32 outside of them."""

    registers: int
    warps: int
    blocks: int
    shared: int
    shared_per_block: int
    tensor_fmas: int
    float_fmas: int
    tensor_instruction: str


KIB = 1024
SCHEDULERS = 4  # per SM; each issues at most one warp instruction a clock
RESERVED_SHARED = KIB  # of each block, by the system

ARCHS = {
    80: Arch(65536, 64, 32, 164 * KIB, 163 * KIB, 1024, 64, "HMMA"),
    86: Arch(65536, 48, 16, 100 * KIB, 99 * KIB, 256, 128, "HMMA"),
    89: Arch(65536, 48, 24, 100 * KIB, 99 * KIB, 256, 128, "HMMA"),
    90: Arch(65536, 64, 32, 228 * KIB, 227 * KIB, 2048, 128, "HGMMA"),
    100: Arch(65536, 64, 32, 228 * KIB, 227 * KIB, 4096, 128, "UTCHMMA"),
    120: Arch(65536, 48, 24, 100 * KIB, 99 * KIB, 256, 128, "HMMA"),
}


@dataclass(frozen=True)
class Gpu:
    """arch: compute capability times ten. gbs: memory bandwidth, GB/s. tflops: bfloat16 on the tensor cores, float32
    sums, dense. sms: multiprocessors. ghz: the boost clock that `tflops` is stated at."""

    arch: int
    gbs: float
    tflops: float
    sms: int

    @property
    def ghz(self) -> float:
        return self.tflops * 1e3 / (2 * self.sms * ARCHS[self.arch].tensor_fmas)

    @property
    def float_tflops(self) -> float:
        """float32 outside of the tensor cores, at that clock."""
        return 2e-3 * self.sms * ARCHS[self.arch].float_fmas * self.ghz


GPUS = {
    "A100": Gpu(80, 2039, 312, 108),
    "RTX 4090": Gpu(89, 1008, 165.2, 128),
    "H100": Gpu(90, 3350, 989.4, 132),
    "H200": Gpu(90, 4800, 989.4, 132),
    "B200": Gpu(100, 8000, 2250, 148),
    "RTX 5090": Gpu(120, 1792, 209.5, 170),
}


def of(arch: int) -> dict[str, Gpu]:
    """The GPUs that run machine code of sm_<arch>."""
    return {name: gpu for name, gpu in GPUS.items() if gpu.arch == arch}


def blocks_per_sm(arch: int, registers: int, shared: int, threads: int) -> int:
    """Blocks of a launch that fit an SM together (0: none). registers: per thread, given out by 8, a warp at a time."""
    limits, warps = ARCHS[arch], -(-threads // 32)
    by_registers = limits.registers // (max(1, -(-registers // 8) * 8) * 32) // warps
    by_shared = limits.shared // (shared + RESERVED_SHARED) if shared <= limits.shared_per_block else 0
    return min(by_registers, by_shared, limits.warps // warps, limits.blocks)
