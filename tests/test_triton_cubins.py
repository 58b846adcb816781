"""The Triton kernels as machine code for sm_80 and sm_90, compiled with no GPU: registers, spills, shared memory,
tensor-core instructions, instructions per decoded weight. What is compiled is what the host side would launch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_kernels.ops.lora_linear import triton as backend
from peft_kernels.testing import random_quant_weight
from peft_kernels.triton_lib import host

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets in this process"),
]

f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
REGISTERS_PER_SM = 65536
# per block: the least of sm_86, 89 and 120, which use the same tables
SHARED_PER_BLOCK = 99 * 1024
TENSOR_CORES = {80: "HMMA", 90: "HGMMA"}


@dataclass(frozen=True)
class Case:
    """A layer and a batch. Adapters are float32 like PEFT's; the weight is nested NF4 unless dense."""

    M: int
    N: int = 4096
    K: int = 4096
    r: int = 16
    dtype: torch.dtype = bf16
    p: float = 0.05
    dense: bool = False
    blocksize: int = 64


CASES = {
    "one row": Case(1),
    "many rows": Case(1024),
    "panels": Case(4096),
    "float16, rank 64": Case(1024, r=64, dtype=f16, p=0.0),
    "float32": Case(512, dtype=f32),
    "nothing aligned": Case(512, 1001, 1001),
    "blocks of 32": Case(1024, 2048, 2048, blocksize=32),
    "dense": Case(128, dense=True),
}


@dataclass(frozen=True)
class Code:
    """One compiled kernel: resources from cuobjdump, instructions from nvdisasm."""

    name: str
    registers: int
    stack: int
    local: int
    shared: int
    threads: int
    instructions: tuple[str, ...]
    loop: tuple[str, ...]  # the one that holds most tensor-core instructions
    options: dict[str, Any]

    def count(self, opcode: str) -> int:
        return sum(opcode in i for i in self.instructions)


def tool(name: str) -> str:
    """A CUDA binary tool: the copy that Triton carries, else the one on the path."""
    carried = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(carried) if carried.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is neither in Triton nor on the path")
    return found


def parse_sass(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(all instructions, those of the loop with most MMAs)."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in map(str.strip, text.splitlines()):
        if m := re.match(r"(\.L_x_\d+):", line):
            labels[m.group(1)] = len(code)
        elif m := re.match(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(m.group(1))
    loops = [
        code[labels[m.group(1)] : i + 1]
        for i, text in enumerate(code)
        if (m := re.search(r"BRA.*`\((\.L_x_\d+)\)", text)) and labels.get(m.group(1), i + 1) <= i
    ]
    best = max(loops, key=lambda b: (sum("MMA" in i for i in b), len(b)), default=[])
    return tuple(code), tuple(best)


def inspect(compiled: host.Compiled, folder: Path) -> Code:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.kernel.asm["cubin"])

    def run(*command: str) -> str:
        return subprocess.run([*command, str(cubin)], capture_output=True, text=True, check=True).stdout

    usage = run(tool("cuobjdump"), "--dump-resource-usage")
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    code, loop = parse_sass(run(tool("nvdisasm"), "-c"))
    return Code(
        compiled.name, numbers["REG"], numbers["STACK"], numbers["LOCAL"], compiled.kernel.metadata.shared,
        32 * compiled.options["num_warps"], code, loop, compiled.options,
    )  # fmt: skip


@cache
def compile_case(name: str, capability: int) -> dict[str, Code]:
    """Every kernel of a forward and a backward, by name; "outer_ds" is the outer kernel that also makes ds."""
    import tempfile

    c = CASES[name]

    def meta(*shape: int, dtype: torch.dtype = f32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, dy = meta(c.M, c.K, dtype=c.dtype), meta(c.M, c.N, dtype=c.dtype)
    if c.dense:
        weight: tuple[Any, ...] = (meta(c.N, c.K, dtype=c.dtype), None, None, None, None, 0, 64, 256)
    else:
        weight = random_quant_weight(c.N, c.K, blocksize=c.blocksize, nested=True).to("meta").flatten()
    a, b, s, bias = meta(c.r, c.K), meta(c.N, c.r), meta(c.M, c.r), meta(c.N, dtype=c.dtype)
    seed = meta(1, dtype=torch.int64)
    with host.compile_only(capability) as compiled:
        backend.forward(x, *weight, c.N, a, b, 2.0, bias, c.p, seed)
        backend.backward(dy, x, *weight, a, b, s, 2.0, c.p, seed, True, True)
    codes = {}
    with tempfile.TemporaryDirectory() as folder:
        for k in compiled:
            key = k.name.removesuffix("_kernel") + ("_ds" if k.options.get("WITH_DS") else "")
            if key not in codes:
                codes[key] = inspect(k, Path(folder))
    return codes


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_resources_and_instructions(name: str, capability: int) -> None:
    c = CASES[name]
    codes = compile_case(name, capability)
    assert {"project", "forward", "backward", "outer", "outer_ds"} <= set(codes)
    assert ("decode" in codes) == (name == "panels")
    for key, code in codes.items():
        what = f"{key}, {name}, sm_{capability}"
        assert code.stack == code.local == 0, f"{what}: spills {code.stack} + {code.local} bytes"
        blocks = REGISTERS_PER_SM // (-(-code.registers // 8) * 8 * code.threads)
        assert blocks >= 2, f"{what}: {code.registers} registers leave room for {blocks} block"
        assert code.shared <= SHARED_PER_BLOCK, f"{what}: {code.shared} bytes of shared memory"
        assert not any(re.search(r"\b(RED|ATOM|ATOMG|ATOMS)\b", i) for i in code.instructions), f"{what}: atomics"
        assert code.options["enable_fp_fusion"] is False
        if key in ("reduce", "decode"):
            continue
        mma = code.count("HMMA") + code.count("HGMMA")
        if c.dtype is f32:
            assert mma == 0, f"{what}: float32 must not go through TF32"
            assert code.count("FFMA") > 0, what
        else:
            assert mma > 0, f"{what}: no tensor-core instruction"


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["one row", "many rows", "float16, rank 64", "blocks of 32"])
def test_the_large_products_feed_the_tensor_cores(name: str, capability: int) -> None:
    """The main loops use the architecture's own instruction, load asynchronously, and decode in few instructions.

    The budgets are what was reached, rounded up: per weight decoded, everything in the loop counted, one thread.
    """
    budget = {80: 14.0, 90: 11.0}[capability]
    for key in ("forward", "backward"):
        code = compile_case(name, capability)[key]
        assert any(TENSOR_CORES[capability] in i for i in code.loop), (
            f"{key}: no {TENSOR_CORES[capability]} in the loop"
        )
        assert any("LDGSTS" in i for i in code.loop), f"{key}: the loop's loads are not asynchronous"
        weights = code.options["BN"] * code.options["BK"]
        per_weight = len(code.loop) * code.threads / weights
        assert per_weight <= budget, f"{key}: {per_weight:.1f} instructions per weight, budget {budget}"


def test_the_parser_finds_the_loop() -> None:
    text = """
.L_x_0:
        /*0000*/                   IMAD R1, R2, R3, R4 ;
.L_x_1:
        /*0010*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0020*/              @P0  BRA `(.L_x_1) ;
        /*0030*/                   EXIT ;
"""
    code, loop = parse_sass(text)
    assert [i.split()[0] for i in code] == ["IMAD", "HMMA.16816.F32", "@P0", "EXIT"]
    assert len(loop) == 2
