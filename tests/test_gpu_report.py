"""The GPU report without a GPU: what it refuses, what it writes, and the adapters to other projects' kernels, which are
held against stand-ins that have their signatures."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from lora_tools import needs_native
from torch import Tensor

from bench import __main__ as cli
from bench import checks, subjects
from bench.gpu import others, report
from bench.static import gpus
from peft_kernels import dequantize_4bit, lora_linear, use_backend
from peft_kernels.testing import assert_no_worse

PASSED = checks.Verdict(True, "gpu tests of x: 3 passed")
FAILED = checks.Verdict(False, "gpu tests of x fail: 1 failed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_error_says_so() -> None:
    with pytest.raises(SystemExit, match=r"needs a CUDA device.*bench --static"):
        cli.main(["--gpu"])


@pytest.mark.parametrize(
    ("done", "passed", "says"),
    [
        ((0, "12 passed, 3 skipped in 5 s"), True, "12 passed"), ((1, "1 failed, 2 passed"), False, "fail: 1 failed"),
        ((0, "40 skipped in 2 s"), False, "did not run"), ((5, "no tests ran"), False, "did not run"),
        ((2, "1 error"), False, "fail"), ("did not finish in 900 s", False, "did not finish"),
    ],
)  # fmt: skip
def test_only_gpu_tests_that_ran_and_passed_are_a_pass(
    done: object, passed: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(checks, "pytest", lambda files, marker: asked.append((files, marker)) or done)
    judged = report.verdict("lora_linear")
    assert judged.passed is passed
    assert says in judged.text
    ((files, marker),) = asked
    assert marker == "gpu"
    assert {"test_lora_linear.py", "test_triton_lora_linear.py"} <= {f.name for f in files}


def test_every_op_has_gpu_tests() -> None:
    for op in report.OPS:
        assert any("pytest.mark.gpu" in f.read_text() for f in report.test_files(op)), op


def ticking() -> Callable[[Callable[[], object]], float]:
    """A clock of which each reading is a millisecond later than the one before; it runs what it times."""
    count = itertools.count(1)

    def clock(run: Callable[[], object]) -> float:
        run()
        return next(count) / 1e3

    return clock


def arguments() -> SimpleNamespace:
    args = cli.parser().parse_args(["--gpu", "--quick", "--shapes", "64x128", "--m", "2", "--dtype", "f32",
                                    "--backends", "native", "reference"])  # fmt: skip
    args.threads, args.rounds, args.sample_s, args.budget_s = 1, 5, 1e-9, 1.0
    return args


def fake(folder: Path, verdicts: dict[str, checks.Verdict]) -> report.Run:
    return report.Run("cpu", folder, "a fake GPU", ticking(), lambda call: 1.5, lambda op: verdicts[op],
                      {"gflops": 1.0, "gbs": 1.0, "how": "made up"})  # fmt: skip


def test_the_report_refuses_the_numbers_of_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table, JSON lines and picture of what passed; of what failed a line without a number, and no picture."""
    pytest.importorskip("matplotlib")
    run = fake(tmp_path, {"dequantize_4bit": PASSED, "lora_linear": FAILED})
    assert report.report(run, arguments(), ("dequantize_4bit", "lora_linear", "step")) == 1
    good = [json.loads(line) for line in (tmp_path / "dequantize_4bit.jsonl").read_text().splitlines()]
    assert {line["candidate"] for line in good} >= {"reference"}
    assert all(line["median_s"] > 0 and line["peak MiB"] == 1.5 for line in good)
    assert all(line["machine"]["gpu"] == "a fake GPU" for line in good)
    assert (tmp_path / "dequantize_4bit.png").stat().st_size > 1000
    bad = [json.loads(line) for line in (tmp_path / "lora_linear.jsonl").read_text().splitlines()]
    assert [line["what"] for line in bad] == ["forward", "forward+backward"]
    for line in bad:
        assert line["no_number"] == FAILED.text
        assert not {"median_s", "min_s", "gflops", "gbs", "speedups", "peak MiB", "samples"} & set(line)
    assert not (tmp_path / "lora_linear.png").exists()
    assert not (tmp_path / "step.jsonl").exists()
    out = capsys.readouterr().out
    assert "no number: tests failed" in out
    assert "whole model: no number" in out


@needs_native
def test_a_report_that_passes_returns_zero(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = fake(tmp_path, {"lora_linear": PASSED})
    assert report.report(run, arguments(), ("lora_linear",)) == 0
    lines = [json.loads(line) for line in (tmp_path / "lora_linear.jsonl").read_text().splitlines()]
    assert any(line["speedups"] for line in lines)
    assert (tmp_path / "lora_linear.png").exists()


def test_names_of_gpus() -> None:
    assert report.folder_of("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3"
    assert report.bounds_of("NVIDIA H100 80GB HBM3")["gbs"] == gpus.GPUS["H100"].gbs
    assert report.bounds_of("NVIDIA GeForce RTX 4090")["gbs"] == gpus.GPUS["RTX 4090"].gbs
    assert set(report.bounds_of("Some other GPU")) == {"how"}


def test_what_is_absent_or_refuses_is_named() -> None:
    absent: dict[str, str] = {}

    def refuses() -> others.Calls:
        raise ValueError("no such\nthing")

    assert others.optional(absent, "a", "surely_not_installed", refuses) == []
    assert others.optional(absent, "b", "torch", refuses) == []
    assert others.optional(absent, "c", "torch", lambda: [lambda: 1 / 0]) == []
    (found,) = others.optional(absent, "d", "torch", lambda: [lambda: 1])
    assert found.name == "d"
    assert absent == {"a": "surely_not_installed is not installed", "b": "ValueError: no such",
                      "c": "ZeroDivisionError: division by zero"}  # fmt: skip


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    """A module of that name, and its parents, for the time of a test."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def layer_and_inputs() -> tuple[torch.nn.Module, Tensor, Tensor, Tensor, Callable[[Tensor], None]]:
    """A PEFT layer over bitsandbytes' Linear4bit with x, A and B, and a check of a result against the reference."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    (q,) = subjects.quant_copies(128, 64, 1)
    (layer,) = subjects.with_adapter(peft, [subjects.bnb_layer(q, torch.float32)], 16, 0.0, True)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), use_backend("reference"):
        eager, exact = (lora_linear(x.to(t), q, a.to(t), b.to(t), layer.scaling["default"])
                        for t in (torch.float32, torch.float64))  # fmt: skip
    magnitude = x.abs() @ dequantize_4bit(q, torch.float32).abs().t()
    return layer, x, a, b, lambda y: assert_no_worse(y.detach(), eager, exact, magnitude)


def test_unsloths_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """`apply_lora_o(self, X)` takes [batch, length, width] and reads PEFT's attributes of self.o_proj."""
    layer, x, _, _, check = layer_and_inputs()
    import bitsandbytes.functional as bnb

    def apply_lora_o(self: object, X: Tensor) -> Tensor:
        proj = self.o_proj  # type: ignore[attr-defined]
        batch, length, _ = X.shape
        weight, adapter = proj.base_layer.weight, proj.active_adapters[0]
        w = bnb.dequantize_4bit(weight.data, weight.quant_state).float()
        low = X @ proj.lora_A[adapter].weight.t() @ proj.lora_B[adapter].weight.t()
        return (X @ w.t() + proj.scaling[adapter] * low).view(batch, length, -1)

    stand_in(monkeypatch, "unsloth.kernels", apply_lora_o=apply_lora_o)
    through = others.unsloth(layer)
    check(through(x))
    gradients = subjects.step_call(layer, x, torch.ones(3, 128), through)()
    assert [tuple(g.shape) for g in gradients] == [(3, 64), (16, 64), (128, 16)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("newer", [False, True])
def test_vllms_adapter(newer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lora_shrink(x, [A], out, *meta, scaling)`, then `lora_expand(low, [B], y, *meta, offset_start, add_inputs)`;
    what lies between is from `LoRAKernelMeta.meta_args`, which newer versions give a second parameter."""
    layer, x, a, b, check = layer_and_inputs()

    class LoRAKernelMeta:
        @staticmethod
        def make(max_loras: int, max_num_tokens: int, device: object) -> LoRAKernelMeta:
            assert (max_loras, max_num_tokens) == (1, 3)
            return LoRAKernelMeta()

        def prepare_tensors(self, token_lora_mapping: Tensor) -> None:
            self.mapping = token_lora_mapping
            assert token_lora_mapping.tolist() == [0, 0, 0]

        if newer:

            def meta_args(self, token_nums: int, specialize_active_lora: bool) -> tuple[object, ...]:
                return self.mapping[:token_nums], "more"
        else:

            def meta_args(self, token_nums: int) -> tuple[object, ...]:
                return self.mapping[:token_nums], "more"

    def lora_shrink(
        inputs: Tensor, weights: list[Tensor], out: Tensor, mapping: Tensor, more: str, scaling: float
    ) -> None:
        assert (weights[0].shape, out.shape, out.dtype) == ((1, 16, 64), (1, 3, 16), torch.float32)
        out[0] = scaling * inputs @ weights[0][0].t()

    def lora_expand(
        inputs: Tensor, weights: list[Tensor], out: Tensor, mapping: Tensor, more: str, offset_start: int = 0,
        add_inputs: bool = False,
    ) -> None:  # fmt: skip
        assert (weights[0].shape, offset_start, add_inputs) == ((1, 128, 16), 0, True)
        out += inputs[0].to(out.dtype) @ weights[0][0].t()

    stand_in(monkeypatch, "vllm.lora.ops.triton_ops", LoRAKernelMeta=LoRAKernelMeta, lora_shrink=lora_shrink,
             lora_expand=lora_expand)  # fmt: skip
    call = others.vllm(layer.base_layer, x, a, b, layer.scaling["default"])  # type: ignore[arg-type]
    first, second = call(), call()
    assert torch.equal(first, second), "nothing accumulates between calls"
    check(first)
