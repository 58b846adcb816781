"""Choosing a backend: order, forcing, reasons, errors, laziness. On ops made here, and over every op that there is."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_kernels import BackendUnavailable, RowGroups, dispatch, explain, native, use_backend
from peft_kernels.dispatch import Backend, Op, arg_error
from peft_kernels.testing import random_quant_weight

ROOT = Path(__file__).parents[1]
calls: list[str] = []


def _check(x: Tensor, factor: float) -> None:
    if x.dim() != 1:
        raise arg_error("toy", "x", "[N]", tuple(x.shape))


def _named(name: str) -> Callable[[Tensor, float], Tensor]:
    def fn(x: Tensor, factor: float) -> Tensor:
        calls.append(name)
        return x * factor

    return fn


toy = Op(
    name="toy",
    schema="(Tensor x, float factor) -> Tensor",
    check=_check,
    fake=lambda x, factor: torch.empty_like(x),
    reference=_named("reference"),
    folder="no_such_folder",
)
del dispatch._ops["toy"]  # other tests go over every op; this one is there while a test of this file asks for it


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Backend | str]]:
    """toy with a native backend for contiguous float32, a Triton one for CPU tensors when forced, and no CUDA one."""
    table: dict[str, Backend | str] = {
        "cuda": "toy has no cuda backend",
        "triton": Backend("triton", _named("triton"), frozenset({"cuda"}), forced_devices=frozenset({"cpu"})),
        "native": Backend(
            "native",
            _named("native"),
            frozenset({"cpu"}),
            dtypes=frozenset({torch.float32}),
            when=lambda x, factor: None if x.is_contiguous() else "x is not contiguous",
        ),
    }
    monkeypatch.setattr(toy, "_loaded", table)
    monkeypatch.setitem(dispatch._ops, "toy", toy)
    calls.clear()
    with use_backend(None):
        yield table


def served(x: Tensor) -> str:
    calls.clear()
    assert torch.equal(toy.op(x, 2.0), x * 2)
    assert len(calls) == 1
    return calls[0]


# ---- choosing ------------------------------------------------------------------------------------------------------
def test_first_that_can_serve(backends):
    assert served(torch.ones(4)) == "native"
    assert served(torch.ones(4, dtype=torch.float64)) == "reference"
    assert served(torch.ones(8)[::2]) == "reference"


def test_backends_of_other_devices_are_not_even_loaded(backends):
    """On CPU tensors the Triton module must stay unimported: it would cost its import."""
    del backends["triton"], backends["cuda"]
    assert served(torch.ones(4)) == "native"
    assert set(backends) == {"native"}


def test_forced(backends):
    x = torch.ones(4)
    for name in ("reference", "triton", "native"):
        with use_backend(name):
            assert served(x) == name
    assert served(x) == "native"


def test_a_forced_backend_that_cannot_serve_raises_with_its_reason(backends):
    with use_backend("native"):
        with pytest.raises(BackendUnavailable, match=r"toy: backend 'native' was forced .*not serve torch.float64"):
            toy.op(torch.ones(4, dtype=torch.float64), 2.0)
        with pytest.raises(BackendUnavailable, match=r"toy: .*: x is not contiguous"):
            toy.op(torch.ones(8)[::2], 2.0)
    with use_backend("cuda"), pytest.raises(BackendUnavailable, match=r"toy: .*: toy has no cuda backend"):
        toy.op(torch.ones(4), 2.0)
    assert not calls


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (Backend("native", _named("n"), frozenset({"cuda"})), "does not serve cpu tensors"),
        (
            Backend("native", _named("n"), frozenset({"cuda"}), forced_devices=frozenset({"cpu"})),
            "does not serve cpu tensors unless forced",
        ),
        (
            Backend("native", _named("n"), frozenset({"cpu"}), package="no_such_package"),
            "needs the package no_such_package, which is not installed",
        ),
        (
            Backend("native", _named("n"), frozenset({"cpu"}), available=lambda: "the moon is in the wrong phase"),
            "the moon is in the wrong phase",
        ),
    ],
)
def test_reasons(backends, backend, reason):
    backends["native"] = backend
    assert backend.reason((torch.ones(4), 2.0)) == reason
    assert served(torch.ones(4)) == "reference"
    assert explain("toy", torch.ones(4), 2.0)["native"] == reason


def test_a_module_that_cannot_be_imported_is_a_reason(tmp_path, monkeypatch):
    package = tmp_path / "broken_ops"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "native.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(toy, "_loaded", {})
    monkeypatch.setattr(toy, "folder", "broken_ops")
    assert "cannot be imported here: No module named 'no_such_module_anywhere'" in str(toy.load("native"))
    assert toy.load("cuda") == "toy has no cuda backend"
    assert served(torch.ones(4)) == "reference"


# ---- explain -------------------------------------------------------------------------------------------------------
def test_explain(backends):
    assert explain("toy", torch.ones(4), 2.0) == {
        "cuda": "toy has no cuda backend",
        "triton": "does not serve cpu tensors unless forced",
        "native": "chosen",
        "reference": "able",
    }
    with use_backend("triton"):
        report = toy.explain(torch.ones(4), 2.0)
    assert report["triton"] == "chosen"
    assert report["native"] == report["reference"] == "'triton' is forced"
    assert not calls  # it runs nothing


def test_explain_and_choose_agree_on_every_op():
    args = _arguments()
    for name, op in dispatch.ops().items():
        assert name in args, f"give test_dispatch._arguments a call of {name}"
        report = op.explain(*args[name])
        assert list(report) == list(dispatch.ORDER)
        assert [b for b, why in report.items() if why == "chosen"] == [op.choose(args[name]).name]


def _arguments() -> dict[str, tuple[Any, ...]]:
    """A valid call of each op."""
    qw = random_quant_weight(8, 64)
    x, dy, a, b = torch.randn(3, 64), torch.randn(3, 8), torch.randn(2, 64), torch.randn(8, 2)
    plan = (torch.tensor([0, 0, -1]), torch.zeros(1, dtype=torch.int64), torch.tensor([2]), torch.ones(1), 2)
    stack = [[value] * 2 for value in (*qw.flatten(), 8, a, b, 1.0, None, 0.0, None)]
    head = torch.randn(1, 3, 2, 8)
    rows, slots = RowGroups(torch.tensor([0, 1, -1]), 2).rows(3), torch.randn(2, 4, 64)
    return {
        "quantize_4bit": (torch.randn(8, 64), 1, 64, False, 256),
        "dequantize_4bit": (*qw.flatten(), [8, 64], torch.float32),
        "lora_linear": (x, *qw.flatten(), 8, a, b, 1.0, None, 0.0, None),
        "lora_linear_backward": (dy, x, *qw.flatten(), a, b, x @ a.t(), 1.0, 0.0, None, True, True),
        "multi_lora_linear": (x, *qw.flatten(), 8, a, b.t(), *plan, None, 0.0, None),
        "multi_lora_linear_backward": (dy, x, *qw.flatten(), a, b.t(), x @ a.t(), *plan, 0.0, None, True, True),
        "lora_linear_stacked": (x, *stack),
        "lora_linear_stacked_backward": (x, [dy] * 2, *stack[:8], *stack[9:11], [x @ a.t()] * 2, stack[11],
                                         *stack[13:], True, [True] * 2),
        "lora_mixture": (x, *qw.flatten(), 8, a[None], b[:, None], torch.ones(3, 1), False, None, 0.0, None),
        "lora_mixture_backward": (dy, x, *qw.flatten(), a[None], b[:, None], (x @ a.t())[:, None], torch.ones(3, 1),
                                  False, 0.0, None, True, True, True),
        "grouped_linear": (x, *qw.flatten(), torch.tensor([0, 1, 3]), 4, slots[:, :2], torch.randn(2, 4, 2), 0.5, None),
        "grouped_linear_backward": (dy[:, :4], x, *qw.flatten(), torch.tensor([0, 1, 3]), slots[:, :2],
                                    torch.randn(2, 4, 2), 0.5, True, True),
        "lora_shrink": (x, [slots, slots], *rows, 0.5, 1),
        "lora_expand": (x, [torch.randn(1, 3, 4)], [slots.mT.contiguous()], *rows, [0], True),
        "squared_row_norms": (*qw.flatten(), 8, 64),
        "dora_norm": (*qw.flatten(), a, b, 1.0, None),
        "dora_linear": (x, *qw.flatten(), 8, a, b, torch.ones(8), 1.0, None, 0.0, None, True),
        "dora_linear_normed": (x, *qw.flatten(), 8, a, b, torch.ones(8), 1.0, None, 0.0, None, True),
        "dora_linear_backward": (dy, x, *qw.flatten(), a, b, torch.ones(8), dy, x @ a.t(), 1.0, 0.0, None, True, True,
                                 True),
        "butterfly_linear": (x, torch.randn(2, 16, 4, 4), *qw.flatten(), 8, torch.ones(8), None, True),
        "butterfly_linear_backward": (dy, x, torch.randn(2, 16, 4, 4), *qw.flatten(), torch.ones(8), dy, True, True,
                                      True),
        "butterfly_rotate": (x, torch.randn(2, 16, 4, 4), False),
        "butterfly_rotate_backward": (x, x, torch.randn(2, 16, 4, 4), False, True, True),
        "cayley": (torch.zeros(3, 4, 4), 5),
        "cayley_backward": (*[torch.zeros(3, 4, 4)] * 3, 5),
        "householder_rotate": (x, a, a),
        "householder_rotate_backward": (x, x, a, a, x @ a.t(), True, True),
        "pair_rotate": (x, *torch.randn(2, 64), 16),
        "pair_rotate_backward": (x, x, *torch.randn(2, 64), 16, True, True),
        "attention": (*[head] * 3, *torch.randn(2, 1, 3, 8), *[None] * 5, 0.5, False, True, 0, 0.0, 0.0,
                      None),
        "attention_backward": (*[head] * 5, torch.ones(1, 2, 3), *torch.randn(2, 1, 3, 8), *[None] * 4, 0.5, False,
                               True, 0, 0.0, 0.0, None),
        "rms_norm": (x, torch.randn(64), 1e-5, 0.0),
        "rms_norm_backward": (x, x, torch.randn(64), 1e-5, 0.0, True, True),
        "layer_norm": (x, torch.randn(64), torch.randn(64), 1e-5),
        "layer_norm_backward": (x, x, torch.randn(64), 1e-5, True, True),
        "gated": (x, x, 0, 1.0, 0.0, 0.0),
        "gated_backward": (x, x, x, 0, 1.0, 0.0, 0.0, 0),
    }


def test_unknown_op():
    with pytest.raises(ValueError, match=r"explain: op must be one of \[.*'lora_linear'.*\], got 'lora_lineal'"):
        explain("lora_lineal")


# ---- use_backend ---------------------------------------------------------------------------------------------------
def test_nesting(backends):
    x = torch.ones(4)
    with use_backend("reference"):
        with use_backend(toy="triton"):
            assert served(x) == "triton"
        assert served(x) == "reference"
        with use_backend(lora_linear="native"):
            assert served(x) == "reference"  # another op's choice leaves the outer one standing
        with use_backend(None):
            assert served(x) == "native"
        with use_backend("native", toy="triton"):
            assert served(x) == "triton"
    assert served(x) == "native"


def test_restored_after_an_error(backends):
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert served(torch.ones(4)) == "native"


def test_process_wide(backends):
    """A backward runs on other threads: what is forced here is forced there."""
    with use_backend("reference"):
        thread = threading.Thread(target=toy.op, args=(torch.ones(4), 2.0))
        thread.start()
        thread.join()
    assert calls == ["reference"]


def test_unknown_names():
    with (
        pytest.raises(ValueError, match=r"a backend must be one of \('cuda', 'triton', .*\), got 'tritno'"),
        use_backend("tritno"),
    ):
        pass
    with pytest.raises(ValueError, match=r"use_backend: op must be one of .*, got 'to'"), use_backend(to="native"):
        pass


# ---- the operator as torch sees it ---------------------------------------------------------------------------------
def test_errors_name_op_argument_expected_and_got(backends):
    with pytest.raises(ValueError, match=r"^toy: x must be \[N\], got \(2, 2\)$"):
        toy.op(torch.ones(2, 2), 2.0)
    with torch._subclasses.FakeTensorMode(), pytest.raises(ValueError, match=r"toy: x must be \[N\]"):
        toy.op(torch.empty(2, 2), 2.0)


def test_inputs_that_need_gradients_are_refused(backends):
    x = torch.ones(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="toy: the raw operator records no gradients"):
        toy.op(x, 2.0)
    with torch.no_grad():
        assert toy.op(x, 2.0).sum() == 8


def test_autocast_is_off_inside(monkeypatch):
    monkeypatch.setattr(toy, "_loaded", {})
    monkeypatch.setattr(toy, "reference", lambda x, factor: torch.outer(x, x).mm(torch.ones(4, 4))[0] * factor)
    with use_backend("reference"):
        toy._loaded.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert toy.op(torch.ones(4), 2.0).dtype == torch.float32


def test_a_compiled_graph_does_not_freeze_the_choice(backends):
    torch._dynamo.reset()
    f = torch.compile(lambda x: toy.op(x, 2.0) + 1, backend="aot_eager", fullgraph=True)
    x = torch.ones(4)
    f(x)
    assert calls[-1] == "native"
    with use_backend("triton"):
        f(x)
    assert calls[-1] == "triton"


def test_opcheck(backends):
    torch.library.opcheck(toy.op, (torch.ones(4), 2.0))


# ---- the environment, and what an import costs -----------------------------------------------------------------------
def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PEFT_KERNELS_", "TRITON_INTERPRET"))}
    return subprocess.run(
        [sys.executable, "-c", code], env={**environment, **env}, capture_output=True, text=True, cwd=ROOT, timeout=120
    )


CHOICE = """
import torch, peft_kernels
from peft_kernels.dispatch import ops
from peft_kernels.testing import random_quant_weight
print(ops()["quantize_4bit"].choose((torch.ones(64), 1, 64, False, 256)).name)
print(ops()["dequantize_4bit"].choose((*random_quant_weight(1, 64).flatten(), [1, 64], torch.float32)).name)
"""


@pytest.mark.parametrize(
    ("value", "first", "second"),
    [
        ("reference", "reference", "reference"),
        ("quantize_4bit=reference", "reference", None),
        (" quantize_4bit=reference , dequantize_4bit=reference ", "reference", "reference"),
        ("reference,dequantize_4bit=reference", "reference", "reference"),
        ("", None, None),
    ],
)
def test_environment(value, first, second):
    default = "reference" if native.available() else "native"
    done = python(CHOICE, PEFT_KERNELS_BACKEND=value)
    assert done.stdout.split() == [first or default, second or default], done.stderr


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("tritno", "PEFT_KERNELS_BACKEND: a backend must be one of ('cuda', 'triton', 'native', 'reference'), got 'tr"),
        ("lora_linear=cuda11", "PEFT_KERNELS_BACKEND: a backend must be one of"),
        ("lora_lineal=native", "PEFT_KERNELS_BACKEND: op must be one of"),
    ],
)  # fmt: skip
def test_environment_with_a_mistake(value, text):
    done = python("import peft_kernels", PEFT_KERNELS_BACKEND=value)
    assert done.returncode != 0
    assert text in done.stderr, done.stderr


def test_forced_by_the_environment_and_unable():
    done = python("import torch, peft_kernels as pk; pk.quantize_4bit(torch.ones(64))", PEFT_KERNELS_BACKEND="cuda")
    assert "BackendUnavailable: quantize_4bit: backend 'cuda' was forced" in done.stderr, done.stderr


def test_import_is_light():
    """No optional package, no compiler, no native library (tests/test_repo.py holds it to its time)."""
    code = """
import torch, sys
import peft_kernels
heavy = ("transformers", "bitsandbytes", "peft", "triton", "accelerate", "safetensors", "torch._inductor")
print(*[m for m in heavy if m in sys.modules])
print("peft_kernels.native" in sys.modules)
peft_kernels.dequantize_4bit(peft_kernels.quantize_4bit(torch.ones(64)))
print(*[m for m in heavy if m in sys.modules])
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")
    assert lines[0] == "", f"import peft_kernels imports {lines[0]}"
    assert lines[1] == "False", "import peft_kernels loads a native library"
    assert lines[2] == "", f"an op on CPU tensors imports {lines[2]}"
