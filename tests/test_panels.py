"""The two streams of a product by panels (ops/lora_linear/panels.py), on stand-ins for streams and events.

The stand-ins keep what is given to a stream, and run it later: each stream in its own order, the two as events allow
and no more, one of them as far ahead of the other as it can be, or in an order that is drawn. What an order may spoil,
it spoils. The same call without one of its events must be found out.
"""

from __future__ import annotations

import contextlib
import random
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_kernels import dequantize_4bit, tuning, use_backend
from peft_kernels.ops import lora_linear as op
from peft_kernels.ops.lora_linear import panels, triton
from peft_kernels.testing import assert_no_worse, assert_same_bits, random_quant_weight

simt = runpy.run_path(str(Path(__file__).with_name("simt_tools.py")))["simt"]
ORDERS = ["main first", "side first", *range(6)]
K = 24
ADD = panels.add_product


class Event:
    """Recorded once, when its stream comes to it."""

    done = False


class Stream:
    def __init__(self, device: Device, name: str) -> None:
        self.device, self.name, self.queue = device, name, list[Callable[[], bool]]()

    def add(self, run: Callable[[], object]) -> None:
        self.queue.append(lambda: (run(), True)[1])

    def record_event(self) -> Event:
        event = Event()
        self.add(lambda: setattr(event, "done", True))
        return event

    def wait_event(self, event: Event) -> None:
        number = self.device.counts[self.name]
        self.device.counts[self.name] += 1
        if (self.name, number) not in self.device.lost:
            self.queue.append(lambda: event.done)


class Device:
    """lost: (stream, number) of waits that are left out, for one that is planted."""

    def __init__(self, lost: frozenset[tuple[str, int]] = frozenset()) -> None:
        self.lost, self.counts, self.log = lost, {"main": 0, "side": 0}, list[str]()
        self.main, self.side = Stream(self, "main"), Stream(self, "side")
        self.current = self.main

    def step(self, kind: str, run: Callable[[], object]) -> None:
        self.current.add(lambda: (run(), self.log.append(kind)))

    @contextlib.contextmanager
    def on_side(self) -> Iterator[None]:
        self.current, before = self.side, self.current
        yield
        self.current = before

    def run(self, order: str | int) -> None:
        draw = random.Random(order) if isinstance(order, int) else None
        streams = [self.main, self.side]
        if order == "side first":
            streams.reverse()
        while any(s.queue for s in streams):
            if draw:
                draw.shuffle(streams)
            # the first that is not waiting goes a step
            assert any(s.queue and s.queue[0]() and s.queue.pop(0) for s in streams), "each waits for the other"


class Weight:
    """A dense matrix that is decoded by copying: panels of rows or columns, on whichever stream is the current one."""

    dense = False

    def __init__(self, device: Device, w: Tensor, step: int) -> None:
        self.device, self.w, self.step, self.shape = device, w, step, (w.shape[0], w.shape[1])
        self.streams: list[str] = []

    def decoder(self, by_rows: bool, most: int) -> tuple[panels.Decode, int]:
        def decode(part: range, memory: Tensor) -> Tensor:
            now = slice(part.start, part.stop)
            shape = (len(part), self.shape[1]) if by_rows else (self.shape[0], len(part))
            out = memory[: len(part) * self.shape[int(by_rows)]].view(shape)
            self.device.step("decode", lambda: out.copy_(self.w[now] if by_rows else self.w[:, now]))
            self.streams.append(self.device.current.name)
            return out

        return decode, self.step


def call(
    order: str | int, monkeypatch: pytest.MonkeyPatch, *, lost: frozenset[tuple[str, int]] = frozenset(),
    by_rows: bool = True, size: int = 5 * 8, error_at: int | None = None,
) -> tuple[Tensor, Tensor, Device, Weight]:  # fmt: skip
    """(out, what it should be, ...) of a product with panels of 8 rows or columns: five of them where size is 40.

    Before it the stream's work is W's last change, and something else in the memory of the panels; behind it W and that
    memory are overwritten.
    """
    torch.manual_seed(0)
    device = Device(lost)
    right = torch.randn(size, K) if by_rows else torch.randn(K, size)
    w = Weight(device, torch.full_like(right, torch.nan), 8)
    x, start = torch.randn(3, K), torch.randn(3, size)
    out = torch.full((3, size), torch.nan)
    memory: list[Tensor] = []
    products = 0

    def new_empty(shape: tuple[int]) -> Tensor:
        memory.append(torch.empty(shape))
        held = memory[-1]
        device.main.queue.insert(0, lambda: bool((held.fill_(torch.nan), True)[1]))  # used before, by what is there
        return held

    def product(out: Tensor, x: Tensor, panel: Tensor, started: bool) -> None:
        nonlocal products
        products += 1
        if products - 1 == error_at:
            raise MemoryError
        device.step("product", lambda: ADD(out, x, panel, started))

    monkeypatch.setattr(panels, "streams", lambda _: panels_streams(device))
    monkeypatch.setattr(panels, "add_product", product)
    monkeypatch.setattr(x, "new_empty", new_empty, raising=False)
    device.main.add(lambda: w.w.copy_(right))
    with contextlib.suppress(MemoryError), tuning.override("panels", elements=8 * K):
        panels.multiply(x, w, out, True, by_rows, "sm_90", lambda: device.current.add(lambda: out.copy_(start)))
    assert device.current is device.main
    for t in (*memory, w.w):  # freed, and used again by what comes next
        device.main.add(lambda t=t: t.fill_(torch.nan))
    device.run(order)
    expected = start.clone()
    for first in range(0, size, 8):  # as many panels: the same bits
        part = slice(first, first + 8)
        expected[:, part].addmm_(x, right[part].t() if by_rows else right[:, part])
    return out, expected, device, w


def panels_streams(device: Device) -> Any:
    class Both(panels.Streams):
        def on_side(self) -> contextlib.AbstractContextManager[Any]:
            return device.on_side()

    return Both(device.main, device.side)


@pytest.mark.parametrize("by_rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("size", [16, 24, 40, 44])
def test_every_order_of_two_streams_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, by_rows: bool, size: int
) -> None:
    for order in ORDERS:
        out, expected, _, w = call(order, monkeypatch, by_rows=by_rows, size=size)
        assert_same_bits(out, expected)
        assert set(w.streams) == {"side"}


def test_every_wait_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one left out by itself: a panel is multiplied before it is decoded, or decoded over while it is multiplied,
    or decoded from a W, or into memory, that is not ready."""
    _, _, device, _ = call("main first", monkeypatch)
    counts = device.counts
    assert counts == {"main": 5, "side": 4}
    for lost in [(name, i) for name, count in counts.items() for i in range(count)]:
        found = [call(order, monkeypatch, lost=frozenset({lost}))[:2] for order in ORDERS]
        assert not all(torch.equal(*pair) for pair in found), lost


def test_the_next_panel_is_decoded_beside_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the second stream runs as far ahead as it may, no product waits for its panel."""
    _, _, device, _ = call("side first", monkeypatch)
    products = [i for i, kind in enumerate(device.log) if kind == "product"]
    assert [device.log[:at].count("decode") for at in products] == [2, 3, 4, 5, 5]


def test_one_panel_needs_no_second_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    out, expected, device, w = call("main first", monkeypatch, size=8)
    assert_same_bits(out, expected)
    assert device.counts == {"main": 0, "side": 0}
    assert w.streams == ["main"]


@pytest.mark.parametrize("order", ORDERS)
def test_an_error_leaves_no_decode_behind(monkeypatch: pytest.MonkeyPatch, order: str | int) -> None:
    """The memory goes back when the call ends: what comes on the caller's stream comes behind every decode."""
    _, _, device, w = call(order, monkeypatch, error_at=1)
    assert len(w.streams) == 3
    assert w.w.isnan().all()
    assert not device.side.queue


def test_on_a_cpu_there_is_one_stream() -> None:
    assert panels.streams(torch.device("cpu")) is None


@pytest.mark.parametrize(("nested", "dtype", "n", "k"), [
    (False, torch.bfloat16, 200, 96), (True, torch.float16, 150, 4096), (True, torch.bfloat16, 300, 192),
])  # fmt: skip
@pytest.mark.usefixtures("simt")
def test_rows_are_decoded_by_the_cuda_kernel(
    monkeypatch: pytest.MonkeyPatch, nested: bool, dtype: torch.dtype, n: int, k: int
) -> None:
    """To the bits of dequantize_4bit, in panels that begin with a block of scales."""
    monkeypatch.setattr(triton._Weight, "_decode", lambda *_: pytest.fail("Triton decodes"))
    weight = random_quant_weight(n, k, nested=nested)
    x = torch.randn(5, k).to(dtype)
    rows = 256 if k == 192 else 64  # of a panel
    with tuning.override("panels", from_M=1, elements=rows * k + 5), use_backend(dequantize_4bit="cuda"):
        y, _ = triton.forward(x, *weight.flatten(), n, None, None, 1.0, None, 0.0, None)
    with use_backend("reference"):
        w = dequantize_4bit(weight, dtype).view(n, k)
    expected = torch.cat([torch.empty(5, len(part), dtype=dtype).addmm_(x, part.t(), beta=0) for part in w.split(rows)],
                         dim=1)  # fmt: skip
    assert_same_bits(y, expected)


@pytest.mark.usefixtures("simt")
def test_triton_decodes_where_the_cuda_kernel_cannot() -> None:
    """Columns; rows of which no panel begins with a block of scales; and where another backend is forced."""
    def steps(k: int, by_rows: bool, most: int) -> tuple[str, int]:
        parts = random_quant_weight(4, k, nested=True).flatten()
        decode, step = triton._Weight(*parts, 4, k, torch.bfloat16).decoder(by_rows, most)
        return ("cuda" if "cuda" in decode.__code__.co_freevars + decode.__code__.co_names else "triton"), step

    with use_backend(dequantize_4bit="cuda"):
        assert steps(192, True, 256) == ("cuda", 256)
        assert steps(192, True, 255) == ("triton", 64)
        assert steps(192, False, 256) == ("triton", 64)
    with use_backend("triton", dequantize_4bit="reference"):
        assert steps(192, True, 256) == ("triton", 64)


def test_from_how_many_rows() -> None:
    """On sm_90 fewer in the backward, elsewhere as many as in the forward; never with float32."""
    for arch, forward, backward in (("sm_90", 768, 512), ("sm_80", 2048, 2048)):
        for least, way in ((forward, False), (backward, True)):
            fewer, enough = (torch.empty(m, 1, dtype=torch.bfloat16) for m in (least - 1, least))
            assert (panels.use(fewer, False, arch, way), panels.use(enough, False, arch, way)) == (False, True)
            assert not panels.use(enough.float(), False, arch, way)
    assert tuning.panels("sm_90").source == "model"


@pytest.mark.gpu
def test_on_a_gpu_bits_stay_the_same_also_in_a_graph() -> None:
    n, k = 4096, 1024
    packed = random_quant_weight(n, k, nested=True).to("cuda")
    weight, dense = packed.flatten(), (None, None, None, None, 0, 64, 256)
    x = torch.randn(1024, k, device="cuda", dtype=torch.bfloat16)
    a, b = torch.randn(16, k, device="cuda"), torch.randn(n, 16, device="cuda")
    arguments = (x, *weight, n, a, b, 2.0, None, 0.0, None)
    with tuning.override("panels", from_M=1, elements=512 * k), use_backend(lora_linear="triton"):
        expected, _ = op.forward_op.op(*arguments)
        wide = x.double(), dequantize_4bit(packed, torch.float32).double(), a.double(), b.double()
        exact, size = (op.forward_op.reference(x_, w_, *dense, n, a_, b_, 2.0, None, 0.0, None)[0]
                       for x_, w_, a_, b_ in (wide, [t.abs() for t in wide]))  # fmt: skip
        assert_no_worse(expected, op.forward_op.reference(*arguments)[0], exact, size, terms=k)
        for _ in range(20):
            assert_same_bits(op.forward_op.op(*arguments)[0].cpu(), expected.cpu())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = op.forward_op.op(*arguments)
        for _ in range(3):
            y.zero_()
            graph.replay()
            assert_same_bits(y.cpu(), expected.cpu())
