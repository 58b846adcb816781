"""The static report's parts: reading machine code, loops, occupancy, formulas, budgets, the command. Nothing compiles
here but what a built CUDA library holds; tests/test_triton_cubins.py compiles."""

from __future__ import annotations

import ast
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_matrix import TRITONS, environment

from bench import __main__ as cli
from bench.static import budgets, calls, cases, cuda, cuda_kernels, gpus, loops, metrics, report, sass, splits
from peft_kernels import tuning
from peft_kernels.triton_lib import toolchain

LISTING = """
	.section	.text.first_kernel,"ax",@progbits
.L_x_0:
        /*0000*/                   IMAD R1, R2, R3, R4 ;
.L_x_1:
        /*0010*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/              @P1  BRA `(.L_x_3) ;
.L_x_2:
        /*0040*/              @P0  BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
.L_x_3:
        /*0060*/                   NANOSLEEP 0x20 ;
        /*0070*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*0080*/                   BRA `(.L_x_4);
        /*0090*/                   NOP;
	.section	.text.second_kernel,"ax",@progbits
        /*0000*/                   STL [R1], R2 ;
        /*0010*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R5 ;
        /*0020*/                   EXIT ;
"""


def kernel(code: tuple[str, ...], loop: tuple[str, ...] = (), registers: int = 64) -> sass.Kernel:
    return sass.Kernel("k", registers, 0, 0, 0, 128, code, loop)


def test_the_parser_finds_functions_and_loops() -> None:
    found = sass.parse(LISTING)
    assert set(found) == {"first_kernel", "second_kernel"}
    code, loop, _ = found["first_kernel"]
    assert [sass.opcode(i) for i in code][-2:] == ["NANOSLEEP", "BRA"], "the padding goes, a real branch stays"
    # the slow path, out of line behind the exit, belongs to the loop; the exit does not, nor what comes before the head
    assert [sass.opcode(i).split(".")[0] for i in loop] == ["LDG", "HMMA", "BRA", "BRA", "NANOSLEEP", "BRA"]
    code, loop, _ = found["second_kernel"]
    assert loop == ()
    spilling = kernel(code)
    assert (spilling.spills, spilling.atomics) == (1, 1)


def test_a_backward_branch_alone_is_no_loop() -> None:
    """An out-of-line path that comes back to the middle of straight code."""
    code = ["@P0 BRA `(.L_x_1)", "IADD3 R1, R1, 1", "EXIT", "MOV R2, R3", "BRA `(.L_x_0)"]
    assert loops.loops(code, {".L_x_0": 1, ".L_x_1": 3}) == []


def test_nested_loops() -> None:
    code = ["MOV R0, 0", "MOV R1, 0", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA `(.L_x_1)", "@P1 BRA `(.L_x_0)"]
    labels = {".L_x_0": 1, ".L_x_1": 2}
    assert sorted(loops.loops(code, labels)) == [(1, 2, 3, 4), (2, 3)]
    assert len(sass.main_loop(code, labels)) == 2, "the innermost of those with most products"


@pytest.mark.parametrize(
    ("op", "pipe", "width"),
    [
        ("HGMMA.64x128x16.F32.BF16", "tensor", 4), ("UTCHMMA", "tensor", 4), ("LDGSTS.E.BYPASS.LTC128B.128", "lsu", 16),
        ("LDG.E.U8", "lsu", 1), ("LDG.E.64.CONSTANT", "lsu", 8), ("LDG.E", "lsu", 4), ("LDS.U16", "lsu", 2),
        ("LDGDEPBAR", "control", 4), ("FFMA", "fma", 4), ("HFMA2.BF16_V2", "fma", 4), ("IMAD.MOV.U32", "fma", 4),
        ("F2FP.BF16.F32.PACK_AB", "alu", 4), ("F2F.F16.F32", "xu", 4), ("PRMT", "alu", 4), ("LOP3.LUT", "alu", 4),
        ("ULOP3.LUT", "uniform", 4), ("BAR.SYNC.DEFER_BLOCKING", "control", 4), ("SHFL.IDX", "lsu", 4),
    ],
)  # fmt: skip
def test_pipes_and_widths(op: str, pipe: str, width: int) -> None:
    assert (sass.pipe(op), sass.width(op)) == (pipe, width)


def test_loads_and_products_are_counted() -> None:
    code = (
        "LDG.E.128 R4, [R2]", "@!P0 LDGSTS.E.BYPASS.128 [R1], [R2]", "LDGDEPBAR", "LDS.128 R4, [R1]",
        "LDG.E.U8 R1, [R2]", "HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24",
        "HGMMA.64x128x8.F32.TF32 R24, R4, gdesc[UR8], R24",
    )  # fmt: skip
    assert (sass.wide_loads(code), sass.async_copies(code), sass.load_bytes(code)) == (2, 1, 33)
    assert sass.block_fmas(code, warps=8) == 2 * 64 * 128 * 16, "TF32 is no product of 16-bit numbers"
    assert sass.narrow_mma(code) == 1
    assert sass.mma_kind(code) == "HGMMA"
    assert sass.fillers(("HMMA.16816.F32 R0, R1, R2, R0", "NOP", "NOP", "LDS R1, [R2]", "NOP")) == 1
    assert sass.block_fmas(["HMMA.16816.F32 R0, R1, R2, R0"], warps=4) == 4 * 16 * 8 * 16


def test_names() -> None:
    inner = "_ZN51_GLOBAL__N__1f0bd768_18_dequantize_4bit_cu_877a7a7f17dequantize_kernelI13__nv_bfloat16EEvPKh"
    assert cuda.demangle(inner) == ("dequantize_kernel", ("bf16",))
    assert cuda.demangle("_Z11gemv_kernelI6__halfLi4ELb1EfEvPKhl") == ("gemv_kernel", ("f16", "4", "1", "f32"))
    assert cuda.demangle("_Z6plain_Pf") == ("plain_", ())
    assert cuda.demangle("main") == ("main", ())
    nested = "_ZN3mma6kernelI6__halfNS_4TileILi16ELi2ELi4ELNS_5WhereE1ELb0EEEEEvNS_7ProblemE"
    assert cuda.demangle(nested) == ("mma::kernel", ("f16", "Tile<16, 2, 4, 1, 0>"))


def test_occupancy() -> None:
    """By registers, shared memory, warps and blocks, each the limit once."""
    assert gpus.blocks_per_sm(90, 128, 0, 128) == 4
    assert gpus.blocks_per_sm(90, 32, 100 * 1024, 128) == 2
    assert gpus.blocks_per_sm(90, 16, 0, 1024) == 2
    assert gpus.blocks_per_sm(90, 16, 0, 32) == 32
    assert gpus.blocks_per_sm(89, 32, 100 * 1024, 128) == 0, "more shared memory than a block may have"


def test_peaks_follow_from_clocks() -> None:
    """A peak is SMs x clock x what an SM does a clock: the clocks that come out are the makers' boost clocks (MHz)."""
    boost = {"A100": 1410, "RTX 4090": 2520, "H100": 1830, "RTX 5090": 2407}
    assert {name: round(gpus.GPUS[name].ghz * 100) for name in boost} == {n: round(m / 10) for n, m in boost.items()}
    assert {name for arch in gpus.ARCHS for name in gpus.of(arch)} == set(gpus.GPUS)


def product(**changes: object) -> metrics.Row:
    """A row by hand: 100 instructions of 4 warps, of which 2 products, for a tile of 64 x 128 x 16 and 2048 weights."""
    products = ("HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24",) * 2
    loop = products + ("LDGSTS.E.128 [R1], [R2]",) * 2 + ("LOP3.LUT R1, R2",) * 96
    work = metrics.Work(weights=2048, tile=(64, 128, 16), bytes=3350e3, fmas=1e6, loop_bytes=2048, passes=1, blocks=1)
    made = metrics.row(
        kernel(loop, loop), work, 90, kernel="forward", backend="triton", title="", threads=128, shared=0,
        config={"BM": 128, "MODE": 1, "enable_fp_fusion": False}, shared_accumulators=0,
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def test_formulas() -> None:
    r = product()
    assert r.tiles == 1
    assert r.per_element == 98 * 128 / 2048
    assert sum(r.per_element_by_pipe.values()) == 100 * 128 / 2048
    assert r.issue_cycles == 100 * 4 / 4
    assert r.tensor_cycles == 64 * 128 * 16 / 2048
    assert r.issue_over_tensor == 100 / 64
    assert r.bytes_over_least == 32 * 128 / 2048
    assert r.occupancy == 8 * 4 / 64
    assert (r.roofline_us["H100"], r.bound["H100"]) == (1.0, "memory")
    assert r.roofline_us["H200"] < 1.0


def test_parts_of_sums_are_in_the_roofline() -> None:
    """Written and read again by whoever adds them: of 128 rows of the 4096^2 layer on an H100, 4 parts of each sum."""
    sums = splits.Sums(tiles=32, steps=32, step=2048, part=64 << 10)
    work = metrics.Work(bytes=3350e3, fmas=1e6)
    alone, _ = metrics.roofline(work, 90, 0)
    shared, bound = metrics.roofline(replace(work, sums=sums), 90, 0)
    clocks = (64 << 10) / 32 + splits.NEXT_KERNEL + -(-32 * 4 * (64 << 10) // 32 // 132)
    assert sums.split(132) == (4, True)
    assert shared["H100"] - alone["H100"] == pytest.approx(clocks / gpus.GPUS["H100"].ghz / 1e3)
    assert bound["H100"] == "memory"
    whole = replace(sums, tiles=132)
    assert metrics.roofline(replace(work, sums=whole), 90, 0)[0]["H100"] == alone["H100"], "no parts, nothing to add"
    facts = [cuda_kernels.fact("mma::kernel", ("bf16", f"Tile<{rows}, 2, 3, 1, 1>"), 90) for rows in (16, 128)]
    assert [f.sums.part for f in facts if f and f.sums] == [8 << 10, 64 << 10]
    assert cuda_kernels.fact("dx_kernel", ("bf16", "64", "0"), 90).apart  # type: ignore[union-attr]


def test_a_row_within_its_budgets_passes() -> None:
    assert budgets.check([product(issue_over_tensor=0.9)]) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"spills": 2}, "spills is 2"), ({"stack": 8}, "stack is 8"), ({"atomics": 1}, "atomics is 1"),
        ({"per_element": 7.6}, "per_element is 7.6"), ({"per_element": None}, "per_element is not known"),
        ({"issue_over_tensor": 0.96}, "issue_over_tensor is 0.96"), ({"mma": "HMMA"}, "mma is HMMA, not HGMMA"),
        ({"mma": None}, "mma is None"), ({"tiles": 2.0}, "tiles is 2.0"), ({"occupancy": 0.0}, "occupancy is 0"),
        ({"async_copies": 0}, "async_copies is 0"), ({"overwritten": 1}, "overwritten is 1"),
        ({"shared_accumulators": 2}, "shared_accumulators is 2"), ({"shared_accumulators": None}, "is not known"),
    ],
)  # fmt: skip
def test_what_exceeds_a_budget_is_named(changes: dict[str, object], text: str) -> None:
    found = budgets.check([product(**{"issue_over_tensor": 0.9, **changes})])
    assert found
    assert any(text in line for line in found), found


def test_an_exception_holds_under_its_compiler_alone() -> None:
    row = product(kernel="dora_forward", issue_over_tensor=1.05)
    assert budgets.check([replace(row, triton="3.6.0")]) == []
    assert "issue_over_tensor is 1.05, at most 0.99" in budgets.check([replace(row, triton="3.9.0")])[0]
    assert "at most 1.1" in budgets.check([replace(row, triton="3.6.0", issue_over_tensor=1.2)])[0]


def test_a_wgmma_that_reads_registers_is_found_where_ptxas_overwrites_them() -> None:
    code = ("HGMMA.64x16x16.F32.BF16 R24, R32, gdesc[UR20], R24, gsb0", "HGMMA.64x16x16.F32 R24, gdesc[UR4], R24",
            "HMMA.16816.F32.BF16 R4, R8, R12, R4")  # fmt: skip
    assert sass.wgmma_from_registers(code) == 1
    row = product(issue_over_tensor=0.9, wgmma_from_registers=1)
    assert "wgmma_from_registers is 1, at most 0" in budgets.check([replace(row, ptxas="12.9")])[0]
    assert budgets.check([replace(row, ptxas="13.4")]) == []


def test_the_budgets_name_fields_and_versions_that_exist() -> None:
    every = [one for rule in budgets.rules() for one in (rule, *rule.get("but", ()))]
    names = {name for rule in every for part in ("where", "most", "least", "is") for name in rule.get(part, {})}
    assert {n for n in names if not n.startswith("config.")} <= set(product().__dataclass_fields__)
    assert all(rule["why"] for rule in every)
    assert all({"most", "least", "is"} & set(rule) for rule in every)
    versions = {v for rule in every for v in budgets.listed(rule["where"].get("triton", []))}
    assert versions <= set(TRITONS), "`make test-triton-matrix` runs them"


def test_a_triton_that_lies_in_a_folder_comes_first_on_the_path(tmp_path: Path) -> None:
    """tools/test_matrix.py installs no version that is in its folder of versions."""
    for name, version in (("triton-3.6.0", "3.6.0"), ("v3.8.0", "3.8.0")):
        (tmp_path / name).mkdir()
        python, env = environment(f"triton=={version}", tmp_path)
        assert env["PYTHONPATH"].split(os.pathsep)[0] == str((tmp_path / name).resolve())
        assert python == Path(sys.executable)


def test_every_row_of_every_table_has_a_case() -> None:
    for capability in report.ARCHS:
        table = tuning.table(tuning.nearest(capability))["kernels"]
        found = cases.cases(capability)
        here = toolchain.of(tuning.nearest(capability))
        assert {(c.kernel, c.row) for c in found if c.row is not None} == {
            (kernel, i) for kernel, some in table.items() for i, row in enumerate(some) if tuning.compiles(row, here)
        }
        assert [c.core for c in found] == sorted((c.core for c in found), reverse=True)


def test_every_triton_kernel_has_a_case() -> None:
    root = Path(cli.__file__).parents[1]
    found = set()
    for path in (root / "peft_kernels" / "ops").glob("*/triton_kernels.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found.add((path.parent.name, node.name))
    assert found == {(op, kernel) for op, kernel, _ in calls.CALLS.values()}


def test_a_kernel_without_a_case_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {**tuning.table("sm_90"), "kernels": {"unheard_of": [{"bits": 16, "BM": 16}]}}
    monkeypatch.setattr(tuning, "table", lambda arch: table)
    with pytest.raises(KeyError, match="unheard_of: add the call"):
        cases.cases(90)


needs_code = pytest.mark.skipif(
    cuda.library() is None, reason="no CUDA library that is newer than its sources: run `make native`"
)
needs_tools = pytest.mark.skipif(
    sass.carried_tool("cuobjdump") is None or sass.carried_tool("nvdisasm") is None, reason="no CUDA binary tools"
)


@needs_code
@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("arch", report.ARCHS)
def test_cuda_kernels_within_their_budgets(arch: int) -> None:
    found, skipped = report.measure([arch], backends=["cuda"])
    assert skipped == [], "each kernel of csrc/cuda is described in bench/static/cuda_kernels.py"
    assert {r.kernel for r in found} == {name.removesuffix("_kernel") for name in cuda_kernels.FACTS}
    rules = [r for r in budgets.of(arch=f"sm_{arch}") if r["where"].get("backend") == "cuda"]
    assert budgets.unused(found, rules) == []
    assert budgets.check(found) == []


def test_without_library_and_compiler_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "library", lambda: None)
    monkeypatch.setattr(cuda, "nvcc", lambda: None)
    found, skipped = report.measure([90], backends=["cuda"])
    assert found == []
    assert "there is no nvcc" in skipped[0]


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One JSON object a line, a table otherwise; the exit code says whether a budget was exceeded."""
    asked = []

    def measure(archs: list[int], kernels: list[str], *_: object) -> tuple[list[metrics.Row], list[str]]:
        asked.append((archs, list(kernels)))
        return [product()], ["cuda: a reason"]

    monkeypatch.setattr(report, "measure", measure)
    assert cli.main(["--static", "--arch", "sm_90", "80", "--kernels", "lora_linear", "--json"]) == 1
    out = capsys.readouterr()
    (line,) = out.out.splitlines()
    told = json.loads(line)
    assert {"kernel", "arch", "registers", "spills", "stack", "shared_memory", "mma"} <= set(told)
    assert (told["kernel"], told["arch"], told["mma"]) == ("forward", "sm_90", "HGMMA")
    assert "issue_over_tensor is 1.56" in out.err
    assert "cuda: a reason" in out.err
    assert asked == [([90, 80], ["lora_linear"])]
    file = tmp_path / "o.jsonl"
    assert cli.main(["--static", "--json", str(file)]) == 1
    assert json.loads(file.read_text())["kernel"] == "forward"
    monkeypatch.setattr(report, "measure", lambda *_: ([product(issue_over_tensor=0.5)], []))
    assert cli.main(["--static"]) == 0
    assert "forward" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--static", "--arch", "sm_61"])
    assert "sm_90" in capsys.readouterr().err


def test_reading_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reads = []

    def read(cubin: bytes, marker: str | None) -> list[sass.Kernel]:
        reads.append(cubin)
        return [kernel(("EXIT",))]

    monkeypatch.setattr(report, "CACHE", tmp_path)
    monkeypatch.setattr(sass, "read", read)
    assert report.read(b"one") == report.read(b"one") == [kernel(("EXIT",))]
    report.read(b"two")
    assert reads == [b"one", b"two"]
