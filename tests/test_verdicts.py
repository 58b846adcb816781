"""Verdicts before trust: wrong kernels are found, refused and remembered. A CPU counts as a GPU here; kernels are
planted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forms import by_form
from torch import Tensor

import peft_kernels
from peft_kernels import dispatch, native, samples, tuning, use_backend, verdicts
from peft_kernels.code_paths import rows_class
from peft_kernels.dispatch import Backend, Op
from peft_kernels.testing import assert_same_bits, random_affine_weight

OPS = dispatch.ops()
Spoil = Callable[[list[Tensor]], None]


@pytest.fixture(autouse=True)
def _watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path))
    with verdicts.watching("cpu"), use_backend(None), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def plant(monkeypatch: pytest.MonkeyPatch, name: str, spoil: Spoil) -> list[int]:
    """A native backend of an operator: the reference, whose results are spoilt. Returns a list that grows by calls."""
    op, calls = OPS[name], [0]

    def fn(*args: Any) -> Any:
        calls[0] += 1
        results = op.reference(*args)
        returned = [] if results is None else [results] if isinstance(results, Tensor) else [*results]
        spoil([*(args[i] for i in op.operands.written), *returned])
        return results

    everything = frozenset({*dispatch.FLOATS, torch.uint8})
    monkeypatch.setitem(op._loaded, "native", Backend("native", fn, frozenset({"cpu"}), dtypes=everything))
    return calls


def right(results: list[Tensor]) -> None:
    """Leaves them."""


def one_element(results: list[Tensor]) -> None:
    """One element of the last result that has any is off by what an element is."""
    last = [t for t in results if t.numel()][-1].view(-1)
    last[last.numel() // 2] += 1 if not last.is_floating_point() else last.abs().max().clamp(min=0.1)


def raising(results: list[Tensor]) -> None:
    raise RuntimeError("planted")


def reasons(name: str, args: list[Any]) -> dict[str, str]:
    return peft_kernels.explain(name, *args)


def rows() -> list[dict[str, Any]]:
    return verdicts.kept()


def test_a_right_kernel_is_checked_once_and_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, args = plant(monkeypatch, "lora_linear", right), OPS["lora_linear"].sample(torch.bfloat16)
    assert OPS["lora_linear"].choose(tuple(args)).name == "native"
    checked = calls[0]
    assert checked == len(verdicts._FEATURES)
    for _ in range(3):
        OPS["lora_linear"].op(*args)
    assert calls[0] == checked + 3
    assert [(r["op"], r["why"], r["arch"]) for r in rows()] == [("lora_linear", None, "cpu")]
    other = [*args]
    other[0] = torch.randn(64, 128, dtype=torch.bfloat16)  # another class of rows: another verdict
    OPS["lora_linear"].op(*other)
    assert calls[0] == 2 * checked + 4
    assert reasons("lora_linear", args)["native"] == "chosen"


WRONG = [(one_element, "result 1 is wrong, 1 of"), (raising, "RuntimeError: planted")]


@pytest.mark.parametrize(("spoil", "says"), WRONG)
def test_a_wrong_forward_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch, spoil: Spoil, says: str) -> None:
    calls, args = plant(monkeypatch, "lora_linear", spoil), OPS["lora_linear"].sample(torch.float32)
    with pytest.warns(UserWarning, match=f"lora_linear: backend 'native' failed its check: .*{says}"):
        got = OPS["lora_linear"].op(*args)
    for a, b in zip(got, OPS["lora_linear"].reference(*args), strict=True):
        assert_same_bits(a, b)
    assert calls[0] == 1  # one look was enough
    told = reasons("lora_linear", args)
    assert told["reference"] == "chosen"
    assert says in told["native"]
    assert says in rows()[0]["why"]
    with use_backend("native"):  # forced is forced
        if spoil is one_element:
            OPS["lora_linear"].op(*args)
        assert reasons("lora_linear", args)["native"] == "chosen"


def test_a_wrong_backward_costs_the_backward_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.available():
        pytest.skip("the forward of this test is the native library's")
    plant(monkeypatch, "lora_linear_backward", one_element)
    w = torch.randn(64, 128)
    x, a, b = (torch.randn(shape, requires_grad=True) for shape in ((8, 128), (16, 128), (64, 16)))
    with use_backend(lora_linear="native", lora_linear_backward="reference"):
        want = torch.autograd.grad(peft_kernels.lora_linear(x, w, a, b).square().sum(), (x, a, b))
    peft_kernels.lora_linear(x, w, a, b).square().sum().backward()
    for leaf, expected in zip((x, a, b), want, strict=True):
        assert leaf.grad is not None
        assert_same_bits(leaf.grad, expected)
    assert {(r["op"], r["why"] is None) for r in rows()} == {("lora_linear", True), ("lora_linear_backward", False)}


def test_every_operator_says_its_check_and_one_wrong_element_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, op in OPS.items():
        for dtype in by_form(short=(torch.bfloat16,), full_form=(torch.float32, torch.bfloat16, torch.float16)):
            args = op.sample(dtype)
            op.examine(args)
            for spoil in (right, one_element):
                plant(monkeypatch, name, spoil)
                backend = op.load("native")
                assert isinstance(backend, Backend)
                why = verdicts.check(op, backend, args)
                assert (why is None) == (spoil is right), (name, why)


@pytest.mark.parametrize("name", ["lora_linear", "multi_lora_linear", "dora_linear", "lora_linear_stacked"])
def test_small_calls_take_the_path_of_the_call(name: str) -> None:
    op = OPS[name]
    args = op.sample(torch.bfloat16)
    names = op.operands.names
    large, many = [*args], 600
    wide = torch.randn(many, 8192 + 32, dtype=torch.bfloat16)
    stacked = name == "lora_linear_stacked"
    fill = (lambda t: [t]) if stacked else (lambda t: t)
    p = args[names.index("b")].shape[0] if name == "multi_lora_linear" else 16
    n = 1000
    dense = torch.randn(n, 8192 + 32, dtype=torch.bfloat16)
    for key, value in {
        "x": wide, "weight": fill(dense), **dict.fromkeys(samples.FIXED, fill(None)),
        "quant_type": fill(0), "out_features": fill(n), "a": fill(torch.randn(p, 8192 + 32)),
        "b": fill(torch.randn(*((p, n) if name == "multi_lora_linear" else (n, p)))),
        "adapters": torch.zeros(many, dtype=torch.int64), "gain": torch.ones(n),
    }.items():  # fmt: skip
        if key in names:
            large[names.index(key)] = value
    op.examine(large)
    from peft_kernels import code_paths

    for features in verdicts._FEATURES:
        small = samples.like(names, op.sizes, large, features)
        op.examine(small)
        assert code_paths.of(op, small) == code_paths.of(op, large)
        weight = small[names.index("weight")]
        assert (weight[0] if stacked else weight).numel() < 600 * 2100


def test_small_calls_have_the_parts_of_the_call() -> None:
    from peft_kernels import code_paths

    op, seen = OPS["lora_linear"], set()
    parts = [(None, False, False), ("codes", True, False), ("values", False, True)]
    for name, (zeros, shifts, order) in zip(("int4", "int8", "uint8"), parts, strict=True):
        for each in (parts[0], (zeros, shifts, order)):
            w = random_affine_weight(80, 200, name, 48, zeros=each[0], shifts=each[1], act_order=each[2])
            call = [torch.randn(3, 200), *w.flatten(), 80, None, None, 1.0, None, 0.0, None]
            small = samples.like(op.operands.names, op.sizes, call, verdicts._FEATURES[0])
            op.examine(small)
            assert code_paths.of(op, small) == code_paths.of(op, call)
            seen.add(code_paths.of(op, call))
    assert len(seen) == 5  # int4 without parts is both


def test_classes_of_rows_end_where_code_paths_end() -> None:
    from peft_kernels.ops.lora_linear import cuda
    from peft_kernels.ops.multi_lora_linear import triton as multi

    ends = {cuda.ROWS, cuda.BACKWARD_ROWS, 8, multi._MOST_COUNTED, multi._FEW_ROWS, multi._MOST_ROWS}
    starts = set()
    for arch in tuning.architectures().values():
        table = tuning.table(arch)
        ends |= {row["max_M"] for each in table["kernels"].values() for row in each if "max_M" in row}
        starts |= {table["panels"]["from_M"], table["panels"]["from_M_dense"]}
    assert all(rows_class(m) < rows_class(m + 1) for m in ends), ends
    assert all(rows_class(m - 1) < rows_class(m) for m in starts), starts
    assert max(ends | starts) < samples.MOST_ROWS
    assert sorted(map(rows_class, range(9000))) == [*map(rows_class, range(9000))]


def test_verdicts_outlive_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = OPS["gated"].sample(torch.float32)
    plant(monkeypatch, "gated", one_element)
    OPS["gated"].op(*args)
    (file,) = tmp_path.glob("verdicts/*.json")
    data = json.loads(file.read_text())
    data["rows"] += [{"op": "gated"}, "what is this"]  # of a later format
    file.write_text(json.dumps({**data, "format": 99, "new": 1}))
    calls = plant(monkeypatch, "gated", right)
    with verdicts.watching("cpu"):  # knows nothing but the file
        assert "failed its check" in reasons("gated", args)["native"]
        OPS["gated"].op(*args)
        assert calls[0] == 0
    program = (
        "import sys, torch; from peft_kernels import dispatch, verdicts, explain\n"
        "assert verdicts.watched == {'cuda'} and 'peft_kernels.samples' not in sys.modules\n"
        "op = dispatch.ops()['gated']; args = op.sample(torch.float32)\n"
        "verdicts.check = None  # nothing is checked again\n"
        "with verdicts.watching('cpu'): assert op.choose(args).name == 'reference'; print(explain('gated', *args))"
    )
    env = {**os.environ, verdicts.ENV: ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert "failed its check: result 0 is wrong" in done.stdout, done.stderr
    file.write_text("{ cut")
    with verdicts.watching("cpu"):  # a file that cannot be read is no verdict
        OPS["gated"].op(*args)
        assert calls[0] == 2
    assert [r["why"] for r in rows()] == [None]
    monkeypatch.setattr(verdicts, "_made_by", lambda backend, arch: "another compiler")
    with verdicts.watching("cpu"):
        OPS["gated"].op(*args)
    assert calls[0] == 4
    assert len([*tmp_path.glob("verdicts/*.json")]) == 2


def test_a_folder_that_cannot_be_written_keeps_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "verdicts").write_text("a file")
    calls, args = plant(monkeypatch, "gated", right), OPS["gated"].sample(torch.float32)
    with pytest.warns(UserWarning, match="verdicts cannot be kept"):
        OPS["gated"].op(*args)
    OPS["gated"].op(*args)
    assert calls[0] == 3


@pytest.mark.parametrize("where", ["capture", "compile"])
def test_where_nothing_can_be_checked_an_unchecked_kernel_does_not_serve(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    calls, args = plant(monkeypatch, "gated", right), OPS["gated"].sample(torch.float32)
    with monkeypatch.context() as m:
        if where == "capture":
            m.setattr(torch.cuda, "is_initialized", lambda: True)
            m.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        else:
            m.setattr(torch.compiler, "is_compiling", lambda: True)
        with pytest.warns(UserWarning, match="gated: backend 'native' has no verdict on this GPU yet"):
            assert OPS["gated"].choose(tuple(args)).name == "reference"
        assert calls[0] == 0
        assert "cannot be checked while" in reasons("gated", args)["native"]
    assert rows() == []
    assert OPS["gated"].choose(tuple(args)).name == "native"  # and outside it is checked
    assert reasons("gated", args)["native"] == "chosen"
    with monkeypatch.context() as m:
        m.setattr(torch.cuda, "is_initialized", lambda: True)
        m.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert OPS["gated"].choose(tuple(args)).name == "native"


def test_strict_raises_and_0_checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, args = plant(monkeypatch, "gated", one_element), OPS["gated"].sample(torch.float32)
    with verdicts.watching("cpu", mode="strict"):
        for _ in range(2):
            with pytest.raises(verdicts.VerdictError, match="gated: backend 'native' failed its check"):
                OPS["gated"].op(*args)
    assert calls[0] == 1
    with verdicts.watching("cpu", mode="0"):
        assert OPS["gated"].choose(tuple(args)).name == "native"
    with pytest.raises(ValueError, match=r"PEFT_KERNELS_VERIFY: .* must be 0, 1 or strict, got 'yes'"):
        verdicts._mode_of("yes")


def test_out_of_memory_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(results: list[Tensor]) -> None:
        raise torch.OutOfMemoryError("planted")

    plant(monkeypatch, "gated", full)
    args = OPS["gated"].sample(torch.float32)
    assert OPS["gated"].choose(tuple(args)).name == "reference"
    assert rows() == []
    plant(monkeypatch, "gated", right)
    assert OPS["gated"].choose(tuple(args)).name == "native"


def test_a_kernel_that_cannot_be_checked_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "gated", right)
    backend = OPS["gated"].load("native")
    assert isinstance(backend, Backend)
    monkeypatch.setitem(OPS["gated"]._loaded, "native", replace(backend, when=lambda x, *_: "too small" * (len(x) < 81)
                                                               or None))  # fmt: skip
    gate = torch.randn(200, 512)
    args = [gate, gate, *OPS["gated"].sample(torch.float32)[2:]]
    assert OPS["gated"].choose(tuple(args)).name == "reference"
    assert "does not serve the small call" in reasons("gated", args)["native"]


def test_gpus_are_watched_and_a_cpu_is_not() -> None:
    assert verdicts._watched_by("1") == verdicts._watched_by("strict") == {"cuda"}
    assert verdicts._watched_by("0") == frozenset()


def test_compilers_are_named() -> None:
    pytest.importorskip("triton")
    assert verdicts.compilers("sm_90").startswith("Triton 3.")
    assert "ptxas" in verdicts.compilers("sm_90")
    assert "sources" in verdicts._made_by("triton", "sm_90")
    assert verdicts._made_by("cuda", "sm_90").startswith("library ")
    assert isinstance(OPS["lora_linear"], Op)
