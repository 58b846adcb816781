"""Facts of the CUDA kernels that their machine code does not say: one entry for each kernel of `csrc/cuda`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from . import gpus, sass, splits
from .metrics import Work

N = K = 4096  # the weight that rooflines are stated for
ROWS = 8192  # of x, for the rotations
SIZE = {"f32": 4, "bf16": 2, "f16": 2}
WEIGHT = N * K * (0.5 + 1 / 64 + 4 / 64 / 256)  # bytes of it in NF4, nested


@dataclass(frozen=True)
class Fact:
    """marker: a pattern of opcodes that only the main loop is full of; weights: 4-bit weights that a thread decodes for
    each of them in it, so that unrolling changes nothing. dynamic_shared: bytes that the launch adds."""

    op: str
    marker: str | None = None
    weights: float = 0.0
    threads: int = 256
    dynamic_shared: int = 0
    tile: tuple[int, int, int] | None = None
    bytes: float = 0.0
    fmas: float = 0.0
    wide: bool = True
    sums: splits.Sums | None = None
    apart: bool | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def work(self, code: sass.Kernel) -> Work:
        marked = sum(bool(re.match(self.marker, sass.opcode(i))) for i in code.loop) if self.marker else 0
        threads = code.threads or self.threads
        return Work(weights=self.weights * marked * threads, tile=self.tile, bytes=self.bytes, fmas=self.fmas,
                    wide=self.wide, sums=self.sums, apart=self.apart)  # fmt: skip


NOT_THERE = Fact("")  # on an architecture that uses another kernel


def _dequantize(arguments: tuple[str, ...], arch: int) -> Fact:
    """<type, aligned>: storage that is not aligned goes byte by byte."""
    size = SIZE[arguments[0]]
    if arguments[1:] == ("0",):
        return Fact("dequantize_4bit", bytes=WEIGHT + N * K * size, wide=False)
    return Fact("dequantize_4bit", r"STG\.E\.(\w+\.)*128", 16 / size, bytes=WEIGHT + N * K * size, wide=False)


def _product(rows: int, weights: float) -> Fact:
    """A product of `rows` rows of 16-bit numbers with the weight, on the tensor cores."""
    return Fact("lora_linear", "HMMA", weights, bytes=WEIGHT + 2 * rows * (N + K), fmas=rows * N * K)


def _small(arch: int) -> bool:
    return gpus.ARCHS[arch].shared_per_block < 128 * gpus.KIB


def _sums(tile: tuple[int, int, int], outs: int, over: int, arch: int) -> splits.Sums:
    """Of tile[0] rows of `outs` results, each a sum over `over`, in tiles and steps of `tile`."""
    rows, columns, step = tile
    return splits.Sums(-(-outs // columns), -(-over // step), splits.step_clocks(rows, columns, step, _small(arch)),
                       rows * columns * 4)  # fmt: skip


def _gemv(arguments: tuple[str, ...], arch: int) -> Fact:
    """<type, sets of rows of x, nested>: the weight is the left operand, 8 of it a thread in an instruction, and each
    fragment is used by every set."""
    return _product(8, 8 / int(arguments[1]))


def _dx(arguments: tuple[str, ...], arch: int) -> Fact:
    """<type, rows of dy, what the scale multiplies>: the weight is the left operand, 8 of it a thread, for rows / 8
    products; 2: any alignment. The shared memory is `Layout::BYTES` of csrc/cuda/lora_dx.cu."""
    rows, how = int(arguments[1]), int(arguments[2])
    shared = (64 + 1) * gpus.KIB + 4 * rows * 128 + (1 if rows == 64 or how == 1 else 2) * gpus.KIB
    if how == 2:
        return Fact("lora_linear", dynamic_shared=shared)
    config = {"scaling": ("gradients", "weights")[how]}
    tile = (rows, 256, 64)
    return replace(_product(rows, 64 / rows), dynamic_shared=shared, tile=tile, config=config, apart=True,
                   sums=_sums(tile, K, N, arch))  # fmt: skip


def _mma(arguments: tuple[str, ...], arch: int) -> Fact:
    """<type, Tile<BM, WK, stages, where, scaling>>: a fragment of W, 8 weights a thread, is for BM / 8 products.

    Tiles for much shared memory are not used where there is little, nor the other way round; those for any alignment
    decode element by element. The shared memory is `Tile::BYTES` of csrc/cuda/lora_mma_tile.cuh."""
    bm, wk, stages, where, scaling = (int(n) for n in re.findall(r"\d+", arguments[1].split("<")[1]))
    if where and _small(arch) != (where == 2):
        return NOT_THERE
    tile = (bm, 256 // wk, 64 * wk)
    shared = (64 + 1) * gpus.KIB + stages * 2 * tile[0] * tile[2]
    if scaling == 3:
        return Fact("lora_linear", dynamic_shared=shared, tile=tile)
    config = {"scaling": ("sums", "weights", "halves")[scaling]}
    return replace(_product(bm, 64 / bm), dynamic_shared=shared, tile=tile, config=config,
                   apart=None if bm > 64 else False, sums=_sums(tile, N, K, arch))  # fmt: skip


def _norm(arguments: tuple[str, ...], arch: int) -> Fact:
    """<aligned, with an adapter, integers by group>, of rank 16."""
    return Fact("dora_norm", bytes=WEIGHT, fmas=16 * N * K if arguments[1] == "1" else 0, wide=False)


def _pair(arguments: tuple[str, ...], arch: int) -> Fact:
    """<type, pairs a lane, with sums>: x and y; dy, x and dx."""
    return Fact("pair_rotate", bytes=ROWS * K * SIZE[arguments[0]] * (3 if arguments[2] == "1" else 2), wide=False)


def _turned(arguments: tuple[str, ...], arch: int) -> Fact:
    """<type, vector>: two factors of blocks of 8."""
    return Fact("butterfly_rotate", bytes=2 * ROWS * K * SIZE[arguments[0]], fmas=ROWS * K * 16, wide=False,
                dynamic_shared=2 * 64 * 33 * 4)  # fmt: skip


def _by_blocks(arguments: tuple[str, ...], arch: int) -> Fact:
    """<type, tiles of 8 columns>: a product with blocks of 32, or of 64, on the tensor cores, in two halves."""
    size = 64 if arguments[1] == "8" else 32
    return Fact("butterfly_rotate", bytes=4 * ROWS * K, fmas=2 * ROWS * K * size, dynamic_shared=64 * 4 * size)


def _block_gradient(arguments: tuple[str, ...], arch: int) -> Fact:
    """<type>: x^T dy of blocks of 32."""
    return Fact("butterfly_rotate", bytes=2 * ROWS * K * SIZE[arguments[0]], fmas=ROWS * K * 32, wide=False)


def _block_gradient_mma(arguments: tuple[str, ...], arch: int) -> Fact:
    return replace(_block_gradient(arguments, arch), wide=True)


def _reflect(arguments: tuple[str, ...], arch: int) -> Fact:
    """<type>: 8 reflections; x, from the cache the second time, and y."""
    return Fact("householder_rotate", bytes=2 * ROWS * K * SIZE[arguments[0]], fmas=16 * ROWS * K, wide=False)


def _reflect_gradient(arguments: tuple[str, ...], arch: int) -> Fact:
    return Fact("householder_rotate", bytes=ROWS * K * SIZE[arguments[0]], fmas=8 * ROWS * K, wide=False)


def _cayley(matrices: int) -> Callable[[tuple[str, ...], int], Fact]:
    """<elements of a thread's side>: of blocks of the largest size. matrices: of them in shared memory."""

    def described(arguments: tuple[str, ...], arch: int) -> Fact:
        side = 16 * int(arguments[0])
        return Fact("cayley", wide=False, dynamic_shared=4 * matrices * side * (side + 1) if matrices else 32 * side)

    return described


def _by_adapters(arguments: tuple[str, ...], arch: int) -> Fact:
    """<..., each row of x has an adapter of its own>"""
    return Fact("multi_lora_linear" if arguments[-1] == "1" else "lora_linear", wide=False)


def _other(op: str) -> Callable[[tuple[str, ...], int], Fact]:
    return lambda arguments, arch: Fact(op, wide=False)


# Kernels that decode for the sake of shapes that no model has (any), or nothing at all, have no loop to speak of.
FACTS: dict[str, Callable[[tuple[str, ...], int], Fact]] = {
    "dequantize_kernel": _dequantize,
    "rows_kernel": _other("dequantize_4bit"),
    "quantize_kernel": _other("quantize_4bit"),
    "absmax_kernel": _other("quantize_4bit"),
    "gemv_kernel": _gemv,
    "dx_kernel": _dx,
    "mma::kernel": _mma,
    "mma::add_kernel": _other("lora_linear"),  # of parts of its sums, whose roofline has them
    "norm_kernel": _norm,
    "pair_kernel": _pair,
    "turn_kernel": _turned,
    "factor_kernel": _other("butterfly_rotate"),
    "block_product_kernel": _by_blocks,
    "block_gradient_kernel": _block_gradient,
    "block_gradient_mma_kernel": _block_gradient_mma,
    "reflect_kernel": _reflect,
    "reflect_gradient_kernel": _reflect_gradient,
    "cayley_exact_kernel": _cayley(0),
    "cayley_series_kernel": _cayley(2),
    "cayley_backward_kernel": _cayley(4),
    "expand_kernel": _other("multi_lora_linear"),
    **{f"{name}_kernel": _by_adapters for name in ("project", "outer")},
    **{f"{name}_kernel": _other("lora_linear") for name in ("any", "sum", "gain", "groups")},
}


def fact(name: str, arguments: tuple[str, ...], arch: int) -> Fact | None:
    """None for a kernel that is not described: the report then says so, and the tests fail."""
    return FACTS[name](arguments, arch) if name in FACTS else None
