"""Several threads call one model: rows belong to calls, what is run again finds them, and nothing is left behind."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fastpeft import LoraConfig, get_peft_model
from forms import by_form, grid
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_kernels.testing import assert_no_worse, assert_same_bits

K, ROUNDS = 16, by_form(short=3, full_form=60)
X = torch.randn(4, K, generator=torch.Generator().manual_seed(1))
ROWS: list[list[str] | None] = [
    ["a", "b", "__base__", "dora"], ["b", "b", "a", "a"], ["dora", "__base__", "b", "b"], None,
]  # fmt: skip


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh()).tanh()  # type: ignore[no-any-return]


class Blocks(nn.Module):
    """way: "" computes its blocks, "once" checkpoints two at a time, "nested" each of them in this again."""

    def __init__(self, way: str = "", reentrant: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.way, self.reentrant = way, reentrant

    def pair(self, x: Tensor, i: int) -> Tensor:
        for block in self.blocks[i : i + 2]:
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.way == "nested" else block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        for i in (0, 2):
            x = checkpoint(self.pair, x, i, use_reentrant=self.reentrant) if self.way else self.pair(x, i)
        return x


def make(*how: Any, train: bool = False) -> Any:
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": ["up", "down"], "init_lora_weights": False}
    model = get_peft_model(Blocks(*how), LoraConfig(**options), "a")
    model.add_adapter("b", LoraConfig(**options))
    model.add_adapter("dora", LoraConfig(**options, use_dora=True))
    if train:
        model.set_requires_grad(["a", "b", "dora"])
    return model.train(train)


def loss(model: Any, rows: Sequence[str] | None) -> Tensor:
    x = X.to(next(model.parameters()).dtype).requires_grad_()  # reentrant checkpoints need it
    if rows is None:
        return model(x).square().sum()  # type: ignore[no-any-return]
    with model.base_model.rows_assigned(rows):
        return model(x).square().sum()  # type: ignore[no-any-return]


def gradients(model: Any, total: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Those of every adapter's tensors, zeros where there is none; `grad` of parameters is for all threads."""
    trained = [p for p in model.parameters() if p.requires_grad]
    each = [total] if isinstance(total, Tensor) else total
    for one in each:
        one.backward()  # type: ignore[no-untyped-call]
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    model.zero_grad()
    return found


@functools.cache
def plain_gradients(i: int) -> list[list[Tensor]]:
    """Of a step with these rows without checkpoints, in float32 and in float64."""
    return [gradients(model, loss(model, ROWS[i])) for model in (make(train=True), make(train=True).double())]


def assert_as_plain(mine: Sequence[Tensor | None], *steps: int) -> None:
    """Hold gradients to the sum of those that these steps have alone."""
    for k, gradient in enumerate(mine):
        theirs, true = (torch.stack([plain_gradients(i)[way][k] for i in steps]).sum(0) for way in (0, 1))
        ours = torch.zeros_like(theirs) if gradient is None else gradient
        assert_no_worse(ours, theirs, true, 64 * true.abs().max().expand_as(true))


def elsewhere(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def at_once(functions: Sequence[Callable[[], None]]) -> None:
    """Run each in a thread of its own, all at the same time; their errors are raised."""
    start = threading.Barrier(len(functions))

    def run(function: Callable[[], None]) -> None:
        start.wait()
        function()

    with ThreadPoolExecutor(len(functions)) as pool:
        for done in [pool.submit(run, function) for function in functions]:
            done.result()


def state(model: Any) -> list[Any]:
    layers = [layer for _, layer in model.base_model.adapter_modules()]
    return [(layer.row_names, layer.rows.idle, layer.rows.values, layer.version) for layer in layers]


def test_forwards_of_other_rows_in_other_threads() -> None:
    """Each is bit for bit what it is alone, plain calls and generating contexts between them; then all is as before."""
    model = make()
    with torch.no_grad():
        want = [model(X) if rows is None else model(X, adapter_names=rows) for rows in ROWS]
        before = state(model)

        def calls(i: int) -> Callable[[], None]:
            def run() -> None:
                with torch.no_grad():  # of this thread
                    for _ in range(ROUNDS):
                        for j in (i, (i + 1) % len(ROWS)):
                            rows = ROWS[j]
                            assert_same_bits(model(X) if rows is None else model(X, adapter_names=rows), want[j])

            return run

        at_once([calls(i % len(ROWS)) for i in range(6)])
        assert state(model) == before
        assert_same_bits(model(X), want[-1])
        assert model(X[:3]).shape == (3, K)


def test_a_call_that_ends_after_another_leaves_nothing() -> None:
    """A call took the rows of another that ran for those from before it, and put them there for good."""
    model, entered, ended = make(), threading.Event(), threading.Event()
    plain = model(X)

    def first() -> None:
        with model.base_model.rows_assigned(ROWS[0]):
            entered.set()
            assert ended.wait(60)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(first)
        assert entered.wait(60)
        assert_same_bits(model(X), plain)
        other = model.base_model.rows_assigned(ROWS[1])
        other.__enter__()
        ended.set()
        done.result()
        other.__exit__(None, None, None)
    assert_same_bits(model(X), plain)
    assert model(X[:1]).shape == (1, K)


@pytest.mark.parametrize(("way", "reentrant"), grid(["once", "nested"], [True, False], strength=2))
def test_what_runs_again_has_the_rows_that_it_had(way: str, reentrant: bool) -> None:
    model = make(way, reentrant, train=True)
    every = range(len(ROWS))
    for i in every:
        assert_as_plain(gradients(model, loss(model, ROWS[i])), i)
        assert_as_plain(gradients(model, elsewhere(lambda i=i: loss(model, ROWS[i]))), i)
        total = loss(model, ROWS[i])
        assert_as_plain(elsewhere(lambda total=total: gradients(model, total)), i)
        total = loss(model, ROWS[i])
        with model.base_model.rows_assigned(ROWS[1]):  # of no backward pass
            assert_as_plain(gradients(model, total), i)
    assert_as_plain(gradients(model, torch.stack([loss(model, rows) for rows in ROWS]).sum()), *every)
    assert_as_plain(gradients(model, [loss(model, rows) for rows in ROWS][::-1]), *every)
    assert_as_plain(
        gradients(model, torch.stack([elsewhere(lambda r=rows: loss(model, r)) for rows in ROWS]).sum()), *every
    )
    assert all(names is None for names, *_ in state(model))


class Within(torch.autograd.Function):
    """A backward pass in another one, and so on; below 60 of them autograd goes on in a thread of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, last: Callable[[], None]) -> Tensor:
        ctx.depth, ctx.last = depth, last
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        with torch.enable_grad():
            if ctx.depth:
                Within.apply(torch.zeros(1, requires_grad=True), ctx.depth - 1, ctx.last).sum().backward()
            else:
                ctx.last()
        return dy, None, None


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_runs_again_in_a_thread_of_autograds_own(reentrant: bool) -> None:
    model, threads = make("once", reentrant, train=True), set()
    model.get_base_model().blocks[0].register_forward_pre_hook(lambda *_: threads.add(threading.get_ident()))
    every, graph = range(len(ROWS)), torch.zeros(1, requires_grad=True)
    total = torch.stack([loss(model, rows) for rows in ROWS]).sum()
    found: list[Tensor] = []
    Within.apply(graph, 70, lambda: found.extend(gradients(model, total))).sum().backward()  # type: ignore[no-untyped-call]
    assert_as_plain(found, *every)
    assert len(threads) == 2


def test_training_steps_in_threads() -> None:
    """Gradients go through `torch.autograd.grad`, since `p.grad` is one for all threads."""
    model = make("once", False, train=True)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step(rows: Sequence[str] | None) -> list[Tensor | None]:
        return [*torch.autograd.grad(loss(model, rows), trained, allow_unused=True)]

    found: dict[int, list[list[Tensor | None]]] = {i: [] for i in range(len(ROWS))}

    def steps(i: int) -> Callable[[], None]:
        return lambda: found[i].extend(step(ROWS[i]) for _ in range(ROUNDS))

    at_once([steps(i) for i in found])
    for i, each in found.items():
        for mine in each:
            assert_as_plain(mine, i)


def test_evaluation_with_gradients_is_checkpointed_too() -> None:
    model = make("once", True)
    model.set_requires_grad(["a", "b", "dora"])
    total = model(X.clone().requires_grad_(), adapter_names=ROWS[0]).square().sum()
    assert_as_plain(gradients(model, total), 0)


def test_a_hook_that_calls_the_model_has_rows_of_its_own() -> None:
    model = make()
    wanted = {"plain": model(X), "rows": model(X, adapter_names=ROWS[1])}
    outer, found = model(X, adapter_names=ROWS[0]), {}

    def hook(*_: Any) -> None:
        handle.remove()
        found["plain"], found["short"] = model(X), model(X[:1])
        found["rows"] = model(X, adapter_names=ROWS[1])

    for block in (0, 2):
        handle = model.get_base_model().blocks[block].register_forward_hook(hook)
        assert_same_bits(model(X, adapter_names=ROWS[0]), outer)
        assert_same_bits(found["short"], wanted["plain"][:1])
        for name, want in wanted.items():
            assert_same_bits(found[name], want)
    with model.base_model.rows_assigned(ROWS[0]):
        handle = model.get_base_model().blocks[0].register_forward_hook(hook)
        assert_same_bits(model(X), outer)
    assert_same_bits(found["plain"], wanted["plain"])


def test_calls_of_two_models_in_each_other() -> None:
    def total(one: Any, two: Any) -> list[Tensor]:
        x = X.to(next(one.parameters()).dtype).requires_grad_()
        with one.base_model.rows_assigned(ROWS[0]), two.base_model.rows_assigned(ROWS[1]):
            return gradients(nn.ModuleList([one, two]), two(one(x)).square().sum())

    plain = [make(train=True) for _ in range(2)]
    eager, exact = total(*plain), total(*(model.double() for model in plain))
    for mine, theirs, true in zip(
        total(*(make("once", i, train=True) for i in (False, True))), eager, exact, strict=True
    ):
        assert_no_worse(mine, theirs, true, 64 * true.abs().max().expand_as(true))


def test_a_context_that_is_used_again() -> None:
    model, inner = make("nested", False, train=True), make(train=True)
    rows = model.base_model.rows_assigned(ROWS[0])
    with rows, rows:
        total = model(X.clone().requires_grad_()).square().sum()
        assert_same_bits(inner(X), make(train=True)(X))  # another model, of which nothing was said
    model(X)
    with rows:
        more = model(X.clone().requires_grad_()).square().sum()
    assert_as_plain(gradients(model, [total, more]), 0, 0)


def test_other_hooks_of_saved_tensors_and_writes_to_them() -> None:
    model, packed = make(train=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(1) or t.clone(), lambda t: t):
        total = loss(model, ROWS[0])
    assert packed  # ours go on top of them
    assert_as_plain(gradients(model, total), 0)
    total = loss(model, ROWS[1])
    with torch.no_grad():
        model.get_base_model().blocks[3].down.lora_A["a"].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()  # type: ignore[no-untyped-call]


def test_one_thread_disables_adapters_while_others_call() -> None:
    """Disabling is the model's, as in PEFT: others meet either state, and no error."""
    model = make()
    with torch.no_grad():
        rows = model(X, adapter_names=ROWS[0])
        with model.disable_adapter():
            base = model(X, adapter_names=ROWS[0])

    def disable() -> None:
        for _ in range(4 * ROUNDS):
            with model.disable_adapter():
                pass

    def call() -> None:
        with torch.no_grad():
            for _ in range(ROUNDS):
                assert model(X, adapter_names=ROWS[0]).isfinite().all()

    at_once([disable, call, call])
    with torch.no_grad():
        assert_same_bits(model(X, adapter_names=ROWS[0]), rows)
        with model.disable_adapter():
            assert_same_bits(model(X, adapter_names=ROWS[0]), base)


class Experts(nn.Module):
    """Waits in its first call until another one is in it, or a little."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(K, K, generator=torch.Generator().manual_seed(2)))
        self.inside = [threading.Event(), threading.Event()]

    def forward(self, x: Tensor) -> Tensor:
        first = not self.inside[0].is_set()
        self.inside[1 - first].set()
        if first:
            self.inside[1].wait(0.2)
        return x @ self.up.T


def test_weights_that_their_module_reads_are_one_threads_at_a_time() -> None:
    torch.manual_seed(0)
    options = {"r": 2, "target_parameters": ["up"], "init_lora_weights": False}
    model = get_peft_model(nn.Sequential(Experts()), LoraConfig(**options), "a")
    model.add_adapter("b", LoraConfig(**options))
    model.eval().requires_grad_(False)
    experts = model.get_base_model()[0].base_layer
    before = experts.up
    want = {name: model(X, adapter_names=[name] * 4) for name in ("a", "b")}
    for event in experts.inside:
        event.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: model(X, adapter_names=["a"] * 4))
        assert experts.inside[0].wait(60)
        second = pool.submit(lambda: model(X, adapter_names=["b"] * 4))
        assert_same_bits(first.result(), want["a"])
        assert_same_bits(second.result(), want["b"])
    assert experts.up is before


def test_a_copy_is_of_its_own() -> None:
    model = make()
    with model.base_model.rows_assigned(ROWS[0]):
        inside = model(X)
        assert_same_bits(copy.deepcopy(model)(X), make()(X))
        assert_same_bits(model(X), inside)
