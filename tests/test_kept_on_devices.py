"""Calls leave nothing on a device. Tables of codes are made with the weight, a call under CUDA graph capture
works or raises with a reason, and operators on Triton's interpreter keep nothing and allocate the same again."""

from __future__ import annotations

import ast
import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forms import by_form
from interpreter_tools import INTERPRETER
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from peft_kernels import dispatch, formats, quantize_4bit, use_backend, verdicts
from peft_kernels.checks import moved
from peft_kernels.dispatch import Backend
from peft_kernels.formats import tables
from peft_kernels.ops.lora_linear import cuda as lora_cuda
from peft_kernels.ops.lora_linear import triton as lora_triton
from peft_kernels.ops.quantize_4bit import levels
from peft_kernels.testing import random_quant_weight

ROOT = Path(__file__).parents[1] / "peft_kernels"
META = torch.device("meta")  # stands for a GPU: tensors that are not on the CPU
OPS = dispatch.ops()
ON_TRITON = [n for n, op in sorted(OPS.items()) if isinstance(op.load("triton"), Backend)]


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


@pytest.fixture(autouse=True)
def _tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_tables", {k: v for k, v in tables._tables.items() if k.type == "cpu"})


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_tables_are_made_with_the_weight_and_by_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(tables, "_tables", {})
    w = random_quant_weight(8, 64)
    assert set(tables._tables) == {cpu}
    first = formats.table(1)
    assert formats.table(1) is first
    w.to("cpu")
    assert formats.table(1) is first
    monkeypatch.setattr(tables, "_tables", {})
    for _ in range(2):  # of raw tensors: made for the call, and not kept
        assert formats.table(2).tolist() == pytest.approx(formats.TABLES[2])
        assert formats.pair_table(1, "cpu").shape == (256,)
    assert tables._tables == {}


def test_a_call_under_capture_finds_its_tables_or_says_why_not(
    capturing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = random_quant_weight(8, 64).flatten()
    formats.decode_4bit(*w, (8, 64))  # they are there
    monkeypatch.setattr(tables, "_tables", {})
    with pytest.raises(RuntimeError, match=r"tables of 4-bit codes are not on cpu, .* make the QuantWeight"):
        formats.decode_4bit(*w, (8, 64))
    formats.make_tables(w[0])  # is no place to make them
    assert tables._tables == {}


def test_no_table_is_a_fake_one() -> None:
    before = dict(tables._tables)
    with FakeTensorMode():
        random_quant_weight(8, 64).flatten()
    random_quant_weight(8, 64).to("meta")
    assert tables._tables == before
    assert all(type(t) is Tensor for made in tables._tables.values() for pair in made.values() for t in pair)


def test_a_moved_layer_has_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpeft.weights.nf4_linear import NF4Linear

    layer = NF4Linear(quantize_4bit(torch.randn(8, 64)))
    monkeypatch.setattr(tables, "_tables", {})
    layer.to("cpu")
    assert set(tables._tables) == {torch.device("cpu")}


# ---- what a call copies to the device -------------------------------------------------------------------------------


def test_a_seed_on_the_cpu_raises_under_capture(capturing: None) -> None:
    seed, like = torch.zeros(1, dtype=torch.int64), torch.empty(4, device=META)
    says = r"dropout: seed must be on meta where a CUDA graph is captured \(move it there before\), got one on cpu"
    with pytest.raises(RuntimeError, match=says):
        lora_triton._Dropout(0.5, seed, 64, like)
    with pytest.raises(RuntimeError, match=says):
        lora_cuda.seed_beside(seed, like)
    assert lora_cuda.seed_beside(seed, torch.empty(4)) is seed
    assert lora_cuda.seed_beside(None, like) is None
    lora_triton._Dropout(0.0, seed, 64, like)  # draws nothing
    assert moved("op", "t", like, META) is like
    with pytest.raises(RuntimeError, match="quantize_4bit: nested_rounding of codes must be on meta"):
        levels.on_device("nested_rounding", 0, META)


def test_a_reference_that_reads_values_says_so_under_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["multi_lora_linear"]
    args = op.sample(torch.float32)
    op.reference(*args)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="multi_lora_linear: the reference reads which adapters there are"):
        op.reference(*args)


def test_a_seed_on_the_cpu_moves_elsewhere() -> None:
    seed, like = torch.zeros(1, dtype=torch.int64), torch.empty(4, device=META)
    assert lora_triton._Dropout(0.5, seed, 64, like).seed.device == META
    assert levels.on_device("midpoints", 1, META).device == META


# ---- nothing is kept ------------------------------------------------------------------------------------------------


def kept_by(source: str) -> Iterator[str]:
    """Places in a backend's module where tensors could outlive a call."""
    tree = ast.parse(source)
    for node in tree.body:
        value = getattr(node, "value", None) if isinstance(node, ast.Assign | ast.AnnAssign) else None
        empty = isinstance(value, ast.Dict | ast.List | ast.Set) and not ast.dump(value).count("Constant")
        made = isinstance(value, ast.Call) and getattr(value.func, "id", "") in ("dict", "list", "set", "defaultdict")
        streams = "Stream" in ast.dump(getattr(node, "annotation", node))  # they hold no memory, and are torch's own
        if (empty or made) and not streams:
            yield f"line {node.lineno}: a container that calls can fill"
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        marks = {n.id for d in node.decorator_list for n in ast.walk(d) if isinstance(n, ast.Name)}
        marks |= {n.attr for d in node.decorator_list for n in ast.walk(d) if isinstance(n, ast.Attribute)}
        given = [ast.dump(a.annotation) for a in node.args.args if a.annotation is not None]
        if marks & {"cache", "lru_cache", "cached_property"} and any("Tensor" in a or "device" in a for a in given):
            yield f"line {node.lineno}: {node.name} remembers what it makes for a tensor or a device"
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        shared = {name for g in ast.walk(node) if isinstance(g, ast.Global) for name in g.names}
        if names & shared - {"_recording", "_wanted"}:  # of `compile_only`, which runs nothing
            yield f"line {node.lineno}: {node.name} writes a global"


def test_backends_have_no_caches_for_devices() -> None:
    files = [f for f in ROOT.glob("ops/**/*.py") if f.stem != "native"] + [*ROOT.glob("triton_lib/*.py")]
    assert len(files) > 40
    found = {str(f.relative_to(ROOT)): [*kept_by(f.read_text())] for f in [*files, ROOT / "cuda_rt.py"]}
    assert {k: v for k, v in found.items() if v} == {}


@pytest.mark.parametrize(
    "planted",
    [
        "_tables: dict[int, Tensor] = {}",
        "_tables = dict()",
        "@lru_cache\ndef f(quant_type: int, device: torch.device) -> Tensor: ...",
        "@functools.cache\ndef f(x: Tensor) -> Tensor: ...",
        "_one = None\ndef f(x):\n    global _one\n    _one = x",
    ],
)
def test_a_planted_cache_is_found(planted: str) -> None:
    assert len([*kept_by(planted)]) == 1


class _Made(TorchDispatchMode):
    """Counts elements of the tensors that a call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not any(made is a for a in args):
            self.elements += made.numel()
        return made


def living() -> int:
    gc.collect()
    return sum(isinstance(o, Tensor) for o in gc.get_objects())


@pytest.mark.skipif(not INTERPRETER, reason="runs in the interpreter's process of test_triton_stacked.py")
@pytest.mark.filterwarnings("ignore")
def test_device_calls_keep_nothing() -> None:
    assert len(ON_TRITON) >= 25
    for what, of in (("midpoints", 1), ("order", 1), ("nested_map", 0), ("nested_rounding", 0)):
        levels.on_device(what, of, torch.device("cpu"))  # constants of the host, which it keeps
    with torch.no_grad(), use_backend("triton"):
        for name in by_form(short=["lora_linear", "quantize_4bit"], full_form=ON_TRITON):
            backend, args = OPS[name].load("triton"), OPS[name].sample(torch.bfloat16)
            assert isinstance(backend, Backend)
            assert backend.reason(args, forced=True) is None, name
            before, amounts = living(), []
            for _ in range(3):
                with _Made() as made:
                    backend.fn(*args)
                amounts.append(made.elements)
                del made
                assert living() == before, f"{name}: a call keeps tensors"
            assert len({*amounts}) == 1, f"{name}: the first call makes more than the second: {amounts}"


@pytest.mark.skipif(not INTERPRETER, reason="runs in the interpreter's process of test_triton_stacked.py")
@pytest.mark.filterwarnings("ignore")
def test_device_kernels_pass_their_checks() -> None:
    """As on a GPU before they serve: every operator's small calls are ones that Triton serves, and right there."""
    for dtype in by_form(short=[torch.bfloat16], full_form=dispatch.FLOATS):
        for name in by_form(short=["lora_linear", "dora_norm", "attention_backward"], full_form=ON_TRITON):
            backend = OPS[name].load("triton")
            assert isinstance(backend, Backend)
            here = replace(backend, devices=frozenset({"cpu"}))
            assert verdicts.check(OPS[name], here, OPS[name].sample(dtype)) is None, (name, dtype)
