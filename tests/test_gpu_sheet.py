"""The GPU run's conclusions: who is blamed for failing tests, what is withheld, crossovers, a sanitizer's findings."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import sheet, verdicts
from bench.gpu.device import Device
from bench.gpu.parts import sanitizer
from bench.gpu.verdicts import Verdicts
from bench.gpu.worker import withheld

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("failing", "passed", "wrong"),
    [
        ({"t": {"a cuda forward f32 1-8"}}, {"a cuda forward f32 1-8": 99}, {"a cuda forward f32 1-8"}),
        # the forward passes by itself
        ({"t": {"a cuda forward x 1", "a cuda backward x 1"}}, {"a cuda forward x 1": 1}, {"a cuda backward x 1"}),
        # and so it does for other rows
        ({"t": {"a cuda forward x 1", "a cuda backward x 1"}}, {"a cuda forward x 9": 1}, {"a cuda backward x 1"}),
        # nothing tells them apart
        ({"t": {"a cuda forward x 1", "b cuda forward x 1"}}, {}, {"a cuda forward x 1", "b cuda forward x 1"}),
        # the forward fails by itself, which explains the rest
        ({"s": {"a cuda forward x 1"}, "t": {"a cuda forward x 1", "a cuda backward x 1"}}, {}, {"a cuda forward x 1"}),
        ({"t": set()}, {}, set()),
    ],
)  # fmt: skip
def test_who_is_blamed(failing: dict[str, set[str]], passed: dict[str, int], wrong: set[str]) -> None:
    assert verdicts.blamed(failing, passed) == wrong


def test_keys_of_calls() -> None:
    import torch

    x, packed = torch.zeros(3, 5, 8, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.uint8)
    assert verdicts.key_of("lora_linear_backward", "cuda", (x, x)) == "lora_linear cuda backward bf16 9-64"
    assert verdicts.key_of("dequantize_4bit", "cuda", (packed, torch.float16)) == "dequantize_4bit cuda forward f16 any"
    unprinted = type("Unprinted", (torch.Tensor,), {"__str__": None, "__repr__": None})
    key = verdicts.key_of("rms_norm", "cuda", (x, torch.ones(8).as_subclass(unprinted)))
    assert key == "rms_norm cuda forward bf16 9-64", "to print a tensor would wait for the device"
    assert verdicts.key_of("dora_norm", "triton", (packed,)) == "dora_norm triton forward any any"
    judged = Verdicts({"dora_norm triton forward any any": {"verdict": "wrong", "why": "w"}})
    assert judged.wrong("dora_norm", "triton", "forward", "bf16", 77) == "wrong by its tests: w"
    assert [verdicts.class_of(m) for m in (0, 1, 8, 9, 64, 65, 512, 513, 9999)] == [
        "1-8", "1-8", "1-8", "9-64", "9-64", "65-512", "65-512", "513-", "513-"]  # fmt: skip


def test_numbers_of_wrong_kernels_are_withheld(tmp_path: Path) -> None:
    judged = Verdicts({"a cuda backward bf16 1-8": {"verdict": "wrong", "why": "w"}})
    device = Device("cpu", "fake", 0, True, ("native",), tmp_path, judged)
    row = {"op": "a", "direction": "step", "dtype": "bf16", "m": 4,
           "times": {"cuda": {"eager_s": 1.0}, "cuda panels": {}, "triton": {"eager_s": 2.0}}}  # fmt: skip
    kept = withheld(row, device)
    assert list(kept["times"]) == ["triton"]
    assert set(kept["refused"]) == {"cuda", "cuda panels"}
    assert withheld({**row, "direction": "forward"}, device)["times"] == row["times"]


def test_crossovers_and_shares() -> None:
    def row(m: int, **times: float) -> dict[str, Any]:
        case = {"op": "a", "direction": "forward", "dtype": "bf16", "shape": "s", "m": m, "bound_s": 1e-6}
        return {**case, "title": f"M={m}", "times": {k: {"graph_s": v, "eager_s": 9.0} for k, v in times.items()}}

    rows = [row(512, cuda=8e-6, triton=4e-6, dense=3e-6), row(1, cuda=2e-6, triton=3e-6, dense=9e-6),
            row(16, cuda=2e-6, dense=9e-6)]  # fmt: skip
    found = sheet.answer({"x": {r["title"]: r for r in rows}}, Verdicts(), {}, {"digest": "d"})
    name = "a forward bf16 s"
    assert found["crossovers"] == {name: {"all": ["1 cuda", "512 dense"], "ours": ["1 cuda", "512 triton"]}}
    assert found["shares"][name]["512"] == "triton 4 us, 25% of the bound"
    rows[0]["times"]["dense"].pop("graph_s")
    assert sheet.seconds(rows[0])["cuda"] == 9.0, "one clock for all candidates of a row"
    assert "From this" not in sheet.text(found)
    assert "512 triton" in sheet.text(found)


SANITIZER = """#!/bin/sh
while [ "$1" != --log-file ]; do shift; done
cat > "${2%\\%p.log}7.log" <<'END'
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at void (anonymous namespace)::gemv_kernel<int>(Call)+0x1f0 in lora_gemv.cu:60
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f is out of bounds
=========
========= Invalid __global__ read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<4>(int)+0x10
=========
========= Error: Race reported between Write access at void mma::kernel<int>(Problem)+0x1 in a.cuh:1 and Read access
========= ERROR SUMMARY: 3 errors
END
echo "5 passed in 1 s"
"""


def test_the_sanitizers_findings_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    device = Device("cuda", "a GPU", 90, False, ("cuda",), tmp_path)
    row = sanitizer.row("memcheck", device)
    assert (row["findings"], row["in_others"], row["finished"], row["tests"]) == (2, 1, True, "5 passed in 1 s")
    assert "Invalid __global__ read of size 4 bytes; at void (anonymous namespace)::gemv_kernel" in row["words"][0]
    tool.write_text("#!/bin/sh\necho no such device\n")
    assert sanitizer.row("memcheck", device) == {"absent": "memcheck wrote no report: no such device"}


def test_the_names_of_our_kernels_are_found() -> None:
    sources = [p.read_text() for p in (ROOT / "csrc" / "cuda").glob("*.cu*")]
    declared = sum(len(re.findall(r"^(?:template .*)?__global__ ", text, flags=re.M)) for text in sources)
    assert sum(len(re.findall(sanitizer.KERNEL, text)) for text in sources) == declared > 20
    assert {"gemv_kernel", "dx_kernel", "quantize_kernel"} <= sanitizer.kernels()
