"""lora_linear_stacked on the GPU (csrc/cuda): the host build of its sources (csrc/simt), taken for an sm_90, on which
launches overlap, and for others; the same tests on a GPU where there is one. The backward is another backend's.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import CDLL, byref, c_int64
from pathlib import Path

import pytest
import torch
from forms import grid
from lora_tools import BF16, F16, Case, Stack, check_stack, make
from torch import Tensor

from peft_kernels import Projection, explain, lora_linear_stacked, native, use_backend
from peft_kernels.ops import lora_linear as single
from peft_kernels.ops import lora_linear_stacked as op
from peft_kernels.ops.lora_linear_stacked import cuda
from peft_kernels.testing import assert_same_bits, random_quant_weight

tools = runpy.run_path(str(Path(__file__).with_name("simt_tools.py")))
simt, races, seed = tools["simt"], tools["races"], tools["seed"]
HALVES = (BF16, F16)

STACKS: dict[str, Callable[..., list[Case]]] = {
    # q, k and v: of several sizes, one with a bias, one without an adapter; K is split
    "qkv": lambda m, t: [make(m, 70, 2080, dtype=t, r=16, nested=True),
                         make(m, 9, 2080, dtype=t, r=3, ab=BF16, bias=True, nested=True, seed=1),
                         make(m, 40, 2080, dtype=t, nested=True, seed=2)],
    # masks of their own
    "dropout": lambda m, t: [make(m, 33, 192, dtype=t, r=5, p=0.25), make(m, 264, 192, dtype=t, r=40, p=0.5, seed=1)],
    # no launch is for all: two formats, two blocksizes, nested or not
    "mixed": lambda m, t: [make(m, 20, 320, dtype=t, r=2, nested=True),
                           make(m, 34, 320, dtype=t, quant="fp4", r=7, seed=1),
                           make(m, 7, 320, dtype=t, blocksize=32, seed=2),
                           make(m, 41, 320, dtype=t, r=4, nested=True, seed=3)],
    "any shape": lambda m, t: [make(m, 11, 77, dtype=t, r=3), make(m, 30, 77, dtype=t, r=1, bias=True, seed=1)],
    "no adapters": lambda m, t: [make(m, 64, 2048, dtype=t, nested=True),
                                 make(m, 32, 2048, dtype=t, nested=True, seed=1)],
}  # fmt: skip


@pytest.fixture(params=[90, 89, 80, pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The forward forced: on a GPU, or on CPU tensors by a host build that is taken for one."""
    if request.param != "cuda":
        request.getfixturevalue("simt").pk_simt_set_device(request.param, 108)
    with forced(), dirty_memory():
        yield "cuda" if request.param == "cuda" else "cpu"


@contextmanager
def forced() -> Iterator[None]:
    with use_backend(lora_linear="cuda", lora_linear_stacked="cuda", lora_linear_stacked_backward="reference"):
        yield


@contextmanager
def dirty_memory() -> Iterator[None]:
    """torch.empty gives NaN and ones: a workspace holds nothing that was not put there."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def forward(cases: list[Case]) -> list[Tensor]:
    return Stack(cases).forward(op.forward_op.op)


# ---- against float64 -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "m", "dtype"), grid(STACKS, [1, 3, 8, 9, 17, 40, 64], HALVES), ids=str)
def test_no_worse_than_eager(device: str, name: str, m: int, dtype: torch.dtype) -> None:
    check_stack(Stack([c.to(device) for c in STACKS[name](m, dtype)]))


@pytest.mark.parametrize("m", [2, 20])
def test_nothing_of_something(device: str, m: int) -> None:
    """A projection without outputs among others; no rows; no columns."""
    cases = [make(m, n, 64, dtype=BF16, r=r, seed=n).to(device) for n, r in ((24, 4), (0, 2), (8, 0), (16, 1))]
    check_stack(Stack(cases))
    for rows, k in ((0, 64), (m, 0)):
        empty = [make(rows, n, k, dtype=BF16, r=2, bias=True, seed=n).to(device) for n in (3, 5)]
        with use_backend("reference"):
            want = forward(empty)
        for got, expected in zip(forward(empty), want, strict=True):
            assert_same_bits(got + 0.0, expected + 0.0)


def test_gradients_flow_through_it(device: str) -> None:
    c = make(4, 24, 64, dtype=BF16, r=4, nested=True).to(device)
    q = random_quant_weight(24, 64, nested=True).to(device)
    x, a, b = (t.clone().requires_grad_() for t in (c.x, c.a, c.b))
    ys = lora_linear_stacked(x, [Projection(q, a, b), Projection(q)])
    (ys[0].float().sum() + ys[1].float().sum()).backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in (x, a, b))


# ---- the same bits, and no races, in any order of blocks and launches ------------------------------------------------
ORDERS = [("qkv", 1), ("qkv", 6), ("qkv", 20), ("mixed", 5), ("any shape", 2), ("any shape", 12)]


def test_in_any_order_of_blocks_and_launches(simt: CDLL, seed: int) -> None:
    """On an sm_90 blocks of a product run before the sums that it waits for are there."""
    simt.pk_simt_set_device(90, 108)
    for name, m in ORDERS:
        cases = STACKS[name](m, BF16)
        with forced(), dirty_memory():
            simt.pk_simt_set_seed(0)
            first = forward(cases)
            simt.pk_simt_set_seed(seed + 1)
            before = simt.pk_simt_launches(1)
            for got, want in zip(forward(cases), first, strict=True):
                assert_same_bits(got, want)
        assert simt.pk_simt_launches(1) > before, "no launch began early"


def test_no_races(races: CDLL) -> None:
    races.pk_simt_set_device(90, 108)
    small = {
        "split": lambda m: [make(m, 40, 2048, dtype=BF16, r=5, nested=True), make(m, 9, 2048, dtype=BF16)],
        "mixed": lambda m: [make(m, 20, 96, dtype=BF16, r=2, p=0.1), make(m, 9, 96, dtype=BF16, quant="fp4")],
        "any": lambda m: [make(m, 5, 23, dtype=BF16, r=3), make(m, 11, 23, dtype=BF16, r=9, seed=1)],
    }
    calls = (("split", 1), ("mixed", 5), ("any", 3), ("split", 12), ("mixed", 20), ("any", 9))
    for order, (name, m) in enumerate(calls):
        races.pk_simt_set_seed(order)
        with forced(), dirty_memory():
            forward(small[name](m))
            forward(small[name](m))  # the sums begin while the products before them run


@pytest.mark.parametrize("kind", ["plain", "races"])
def test_parts_that_a_kernel_of_its_own_adds(kind: str) -> None:
    """From 65 rows on: it begins when all parts are there, and the next call's sums when it has ended."""
    c = make(66, 16, 1152, dtype=BF16, r=2, bias=True)
    results = []
    with tools["loaded"](kind) as lib, forced(), dirty_memory():
        lib.pk_simt_set_device(90, 108)
        for order in range(3):
            lib.pk_simt_set_seed(order)
            before = lib.pk_simt_launches(0), lib.pk_simt_launches(1)
            results.append(c.forward(single.forward_op.op)[0])
            assert lib.pk_simt_launches(0) - before[0] == 3
            assert lib.pk_simt_launches(1) - before[1] == (kind == "plain")  # the product, before its S is there
    for got in results[1:]:
        assert_same_bits(got, results[0])


@pytest.mark.slow
def test_nothing_out_of_bounds() -> None:
    tools["under_asan"](__file__, "-k", "nothing_of or any_order")


# ---- launches --------------------------------------------------------------------------------------------------------
def llama_layer(m: int, k: int, kv: int, hidden: int, r: int, counted: bool) -> None:
    """The products of a layer of Llama, with LoRA on all: q, k, v, then o, then gate and up, then down."""

    def case(n: int, width: int) -> Case:
        if not counted:
            return make(m, n, width, dtype=BF16, r=r, nested=True)
        blocks = n * width // 64  # memory that nobody looks at
        weight = (torch.empty(n * width // 2, dtype=torch.uint8), torch.empty(blocks, dtype=torch.uint8),
                  torch.empty(-(-blocks // 256)), torch.empty(256), torch.empty(()), 1, 64, 256)  # fmt: skip
        return Case(torch.empty(m, width, dtype=BF16), torch.empty(0), weight, n, torch.empty(r, width),
                    torch.empty(n, r), None, 1.0, 0.0, None)  # fmt: skip

    forward([case(k, k), case(kv, k), case(kv, k)])
    case(k, k).forward(single.forward_op.op)
    forward([case(hidden, k), case(hidden, k)])
    case(k, hidden).forward(single.forward_op.op)


@pytest.mark.parametrize("capability", [80, 90])
def test_a_layer_takes_eight_launches(simt: CDLL, capability: int) -> None:
    """Two for each group of projections: of a 1B and an 8B model's, counted, and of a small one's, run."""
    simt.pk_simt_set_device(capability, 132)
    with forced():
        for m in (1, 3, 16):
            before = simt.pk_simt_launches(0), simt.pk_simt_launches(1)
            llama_layer(m, 128, 32, 256, 4, counted=False)
            assert simt.pk_simt_launches(0) - before[0] == 8, m
            assert simt.pk_simt_launches(1) - before[1] == (4 if capability == 90 else 0), m
        simt.pk_simt_count_only(1)
        try:
            for m in (1, 4, 8, 9, 16, 64):
                for k, kv, hidden in ((2048, 512, 8192), (4096, 1024, 14336)):
                    before = simt.pk_simt_launches(0)
                    llama_layer(m, k, kv, hidden, 16, counted=True)
                    assert simt.pk_simt_launches(0) - before == 8, (m, k)
        finally:
            simt.pk_simt_count_only(0)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_the_library_loads_on_every_gpu(simt: CDLL, capability: int) -> None:
    """Also where little shared memory meets PTX of those with much: sm_120 has compute_90's."""
    simt.pk_simt_set_device(capability, 108)
    native.check(simt.pk_cuda_loads(0), "cuda")


# ---- what it does not serve ------------------------------------------------------------------------------------------
def reason(cases: list[Case]) -> str:
    stack = Stack(cases)
    rows = [(*c.weight, c.n, c.a, c.b, c.scaling, c.bias, c.p, c.seed) for c in stack.cases]
    return explain("lora_linear_stacked", stack.cases[0].x, *map(list, zip(*rows, strict=True)))["cuda"]


def test_reasons(simt: CDLL) -> None:
    with use_backend(lora_linear_stacked="cuda"):
        assert reason([make(64, 8, 64, dtype=BF16, r=2)] * cuda.MOST) == "chosen"
        for cases, text in (
            ([make(65, 8, 64, dtype=BF16)] * 2, "serves up to 64 rows of x, these are 65"),
            ([make(1, 8, 64, dtype=BF16)] * 5, "does not serve more than 4 projections at once"),
            ([make(1, 8, 64)] * 2, "does not serve torch.float32"),
            ([make(1, 8, 64, dtype=BF16), make(1, 8, 64, dtype=BF16, quant="dense")],
             "serves 4-bit weights only, this one is dense (projection 1)"),
        ):  # fmt: skip
            assert reason(cases) == text


def test_errors_name_what_came(simt: CDLL) -> None:
    cases = STACKS["qkv"](1, BF16)
    calls = []
    for c in cases:
        own, y, s = cuda.single.forward_arguments(c.x, *c.weight, c.n, c.a, c.b, c.scaling, c.bias, c.p, c.seed)
        calls.append((cuda.single.with_tail(cuda.single.pack(0, c.x, *own, y=y, s=s), own[5]), own, y, s))

    def call(packed: list[bytes]) -> None:
        native.check(simt.pk_cuda_lora_linear_stacked(b"".join(packed), len(packed), 0, None), "cuda")

    with pytest.raises(native.NativeError, match="serves 1 to 4 projections, got 5"):
        call([calls[0][0]] * 5)
    with pytest.raises(native.NativeError, match="share x, x_dtype, M and K; 1 does not"):
        call([calls[0][0], calls[1][0]])  # each has an x of its own
    needed = c_int64(0)
    native.check(simt.pk_cuda_lora_stacked_workspace(calls[0][0], 1, byref(needed)), "cuda")
    assert needed.value > 0
    with pytest.raises(native.NativeError, match=rf"needs {needed.value} bytes of workspace, 16-byte aligned; got 0"):
        call([calls[0][0]])


# ---- on a GPU only ---------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 16])
def test_a_layer_in_a_cuda_graph(m: int) -> None:
    """Recorded once, with launches that overlap; replayed on other inputs it gives what direct calls give, always."""
    qkv = Stack([make(m, n, 2048, dtype=BF16, r=16, nested=True, seed=n).to("cuda") for n in (2048, 512, 256)])
    down = make(m, 2048, 2048, dtype=BF16, r=16, nested=True).to("cuda")

    def run() -> Tensor:
        down.x = qkv.forward(op.forward_op.op)[0]
        return down.forward(single.forward_op.op)[0]

    with use_backend(lora_linear="cuda", lora_linear_stacked="cuda"):
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = run()
        for i in range(50):
            qkv.cases[0].x.copy_(torch.randn(m, 2048, generator=torch.Generator().manual_seed(i)))
            graph.replay()
            got = recorded.clone()
            assert_same_bits(got, run())


def test_a_stack_of_one_is_lora_linear(simt: CDLL) -> None:
    c = make(3, 40, 2080, dtype=BF16, r=4, nested=True)
    with forced():
        assert_same_bits(forward([c])[0], c.forward(single.forward_op.op)[0])
