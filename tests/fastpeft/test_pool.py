"""AdapterPool: every row answered as with its adapter alone, whatever comes and goes."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft import AdapterPool, PoolFull
from torch._dynamo.testing import CompileCounterWithBackend

from peft_kernels.testing import assert_no_worse, assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("pool_tools.py")))
write, llama, logits, content, assert_as_alone = (
    tools[name] for name in ("write", "llama", "logits", "content", "assert_as_alone")
)
X = tools["X"]

# Every way of saying rank and scaling, and of choosing layers.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sixteen": {"r": 16},
    "rslora": {"use_rslora": True, "r": 9},
    "ranks": {"ranks": {"layers.1.self_attn.q_proj": 7, "v_proj": 2}},
    "alphas": {"alpha_pattern": {"q_proj": 1, "layers.0.self_attn.v_proj": 11}},
    "all_of_it": {"ranks": {"v_proj": 12}, "alpha_pattern": {"v_proj": 5}, "use_rslora": True},
    "one_layer": {"layers": [1]},
    "mlp": {"targets": ["down_proj", "gate_proj"], "dtype": torch.bfloat16},
    "half": {"dtype": torch.float16, "lora_dropout": 0.3},
    "expression": {"targets": ["v_proj", "o_proj"], "target_modules": r".*self_attn\.[vo]_proj"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for i, (name, options) in enumerate(KINDS.items()):
        write(root / name, i, **options)
    return root


@pytest.fixture
def six(tmp_path: Path) -> Path:
    """Six adapters of rank 4, `a` to `f`."""
    for i, name in enumerate("abcdef"):
        write(tmp_path / name, i)
    return tmp_path


def use(pool: AdapterPool, *names: str) -> None:
    for name in names:
        pool.acquire(name).release()


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["dense", "nf4", "bnb"])
def test_rows_are_answered_as_with_each_adapter_alone(root: Path, base: str) -> None:
    if base == "bnb":
        pytest.importorskip("bitsandbytes")
    pool = AdapterPool(tools[base](), root, max_resident=4)
    make = tools["nf4" if base == "bnb" else base]
    names = list(KINDS)
    for i in range(0, len(names), 2):  # two and the base in each batch, and more batches than slots
        pair = names[i : i + 2]
        with pool.using([pair[0], None, pair[1]]) as slots:
            y = logits(pool.model)
        assert slots[1] == -1
        assert len(set(slots)) == 3
        for row, name in ((0, pair[0]), (1, None), (2, pair[1])):
            assert_as_alone(y[row : row + 1], make, None if name is None else root / name, X[row : row + 1])
    assert pool.stats().evictions >= len(KINDS) - 4


def test_bfloat16_models_and_stacks_of_another_dtype(root: Path) -> None:
    for dtype in (None, torch.float32):
        pool = AdapterPool(tools["dense"](torch.bfloat16), root, dtype=dtype)
        assert {s.a.dtype for s in pool._buffers.stacks.values()} == {dtype or torch.bfloat16}
        with pool.using(["mlp"] * 3):
            y = logits(pool.model)
        assert_as_alone(y, lambda: tools["dense"](torch.bfloat16), root / "mlp", X)


def test_generate_decodes_each_row_with_its_adapter(root: Path) -> None:
    pool = AdapterPool(llama(), root)
    names = ["all_of_it", None, "sixteen"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with pool.using(names):
        mixed = pool.model.generate(X, **options)
    for row, name in enumerate(names):
        with pool.using([name]):
            assert torch.equal(pool.model.generate(X[row : row + 1], **options)[0], mixed[row])


def test_tokens_packed_flat_have_adapters_of_their_own(six: Path) -> None:
    """Continuous batching lays requests of many lengths side by side in one row."""
    pool = AdapterPool(llama(), six)
    name = "model.layers.0.self_attn.q_proj"
    layer = pool.layers[name]
    x = torch.randn(1, 7, 16)
    with pool.acquire("a") as a, pool.acquire("b") as b:
        pool.assign(torch.tensor([a, a, b, -1, -1, b, a]))
        packed = layer(x)
        for slot, places in ((a, [0, 1, 6]), (b, [2, 5]), (-1, [3, 4])):
            down, up, scaling = content(pool, slot)[name] if slot >= 0 else (torch.zeros(1, 16), torch.zeros(1, 16), 0)
            rows = x[:, places]
            exact, eager = (
                t @ layer.weight.to(t).t() + scaling * (t @ down.to(t).t()) @ up.to(t) for t in (rows.double(), rows)
            )
            assert_no_worse(packed[:, places], eager, exact, exact.abs() + 1)


def test_without_an_assignment_and_after_close_the_model_is_what_it_was(six: Path) -> None:
    model, plain = llama(), llama()
    expected = logits(plain)
    kinds = {name: type(module) for name, module in plain.named_modules()}
    with AdapterPool(model, six) as pool:
        assert_same_bits(logits(model), expected)
        with pool.using(["a", "b", "c"]):
            assert not torch.equal(logits(model), expected)
        assert_same_bits(logits(model), expected)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert_same_bits(logits(model), expected)
    with pytest.raises(RuntimeError, match="closed"):
        pool.acquire("a")
    pool.close()


def test_it_works_the_same_in_inference_mode(six: Path) -> None:
    with torch.inference_mode():
        pool = AdapterPool(llama(), six, max_resident=1)
        first = pool.using(["a"] * 3)
        with first:
            y = pool.model(X).logits
    with pool.using(["b"] * 3), pool.using(["b"] * 3):
        pass
    with torch.inference_mode(), pool.using(["a"] * 3):
        assert torch.equal(pool.model(X).logits, y)


# --- who stays --------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_one_goes(six: Path) -> None:
    pool = AdapterPool(llama(), six, max_resident=3)
    use(pool, "a", "b", "c", "a")
    assert pool.resident() == ["b", "c", "a"]
    use(pool, "d")
    assert pool.resident() == ["c", "a", "d"]
    with pool.acquire("c"):
        use(pool, "a", "e")
    assert pool.resident() == ["a", "e", "c"]  # the end of a lease is a use as well
    stats = pool.stats()
    assert (stats.hits, stats.misses, stats.evictions, stats.loads) == (3, 5, 2, 5)
    assert (stats.resident, stats.in_use, stats.rows_taken, stats.adapters) == (3, 0, 24, 6)


def test_pinned_ones_stay(six: Path) -> None:
    pool = AdapterPool(llama(), six, max_resident=2)
    pool.pin("a")
    use(pool, *"bcdef")
    assert pool.resident() == ["a", "f"]
    assert pool.stats().pinned == 1
    pool.pin("f")
    with pytest.raises(PoolFull, match="2 of 2 slots are in use or pinned"):
        pool.acquire("b", timeout=0.05)
    assert pool.try_acquire("b") is None
    pool.unpin("a")
    use(pool, "b")
    assert pool.resident() == ["f", "b"]


def test_a_slot_in_use_is_never_evicted(six: Path) -> None:
    pool = AdapterPool(llama(), six, max_resident=2)
    a, again, b = pool.acquire("a"), pool.acquire("a"), pool.acquire("b")
    assert int(a) == int(again) != int(b)
    assert bool(a)
    before = [t.clone() for parts in content(pool, a).values() for t in parts[:2]]
    for name in "cdef":
        with pytest.raises(PoolFull):
            pool.acquire(name, timeout=0.01)
    a.release()
    a.release()  # once more is not one less
    with pytest.raises(PoolFull):
        pool.acquire("c", timeout=0.01)
    for t, was in zip((t for parts in content(pool, a).values() for t in parts[:2]), before, strict=True):
        assert_same_bits(t, was)
    again.release()
    assert int(pool.acquire("c")) == int(a)
    assert pool.resident() == ["b", "c"]
    with pytest.raises(TypeError, match="what this pool's acquire returned"):
        pool.release(0)  # type: ignore[arg-type]


def test_an_error_within_using_lets_go_of_everything(six: Path) -> None:
    pool = AdapterPool(llama(), six, max_resident=2)
    with pytest.raises(PoolFull), pool.using(["a", "b", "c"], timeout=0.05):
        pass
    with pytest.raises(ZeroDivisionError), pool.using(["a", "b"]):
        raise ZeroDivisionError
    assert pool.stats().in_use == 0
    last = list(pool.layers.values())[-1]
    last.set_rows(["elsewhere"])
    with pytest.raises(ValueError, match="adapters by name"), pool.using(["a", "b"]):
        pass
    assert all(layer.rows.stack is None for layer in pool.layers.values())


# --- rows and bytes ---------------------------------------------------------------------------------------------------


def test_small_adapters_take_few_rows_and_large_ones_make_room(tmp_path: Path) -> None:
    for i in range(6):
        write(tmp_path / f"small{i}", i)
    write(tmp_path / "large", 9, r=30)
    pool = AdapterPool(llama(), tmp_path, max_resident=6)
    assert pool.stats().rows == 32 + 5 * 8  # what the six largest need
    use(pool, *(f"small{i}" for i in range(6)))
    assert pool.stats().rows_taken == 48
    use(pool, "small0")
    with pool.acquire("large"):
        # 32 rows at a multiple of 32, of which there are two; the second region holds what was used longest ago ...
        assert pool.stats().rows_taken == 32 + 8 * (len(pool.resident()) - 1)
        y_large = content(pool, pool.acquire("large"))
    assert all(parts[0].shape[0] == 30 for parts in y_large.values())
    use(pool, *(f"small{i}" for i in range(6)))
    assert pool.stats().resident <= 6
    with pool.using(["large", "small3", "small5"]):
        y = logits(pool.model)
    for row, name in enumerate(["large", "small3", "small5"]):
        assert_as_alone(y[row : row + 1], tools["dense"], tmp_path / name, X[row : row + 1])


def test_a_budget_of_bytes_is_kept(six: Path) -> None:
    row = AdapterPool(llama(), six).stats().row_bytes
    assert row == 4 * sum(m.in_features + m.out_features for n, m in llama().named_modules()
                          if n.endswith(("q_proj", "v_proj")))  # fmt: skip
    for budget in (40 * row, 100 * row + 13):
        pool = AdapterPool(llama(), six, max_resident=None, byte_budget=budget)
        stats = pool.stats()
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for s in pool._buffers.stacks.values() for t in (s.a, s.b, s.starts, s.ranks, s.scaling)}  # fmt: skip
        assert sum(held.values()) == stats.nbytes <= budget
        assert stats.max_resident * 8 == stats.rows == budget // row // 8 * 8 - 8 * (budget == 40 * row)
        use(pool, *"abcdef")
        assert pool.stats().resident == min(6, stats.max_resident)
    limited = AdapterPool(llama(), six, max_resident=32, byte_budget=20 * row).stats()
    assert limited.rows == 16
    assert limited.nbytes <= 20 * row
    with pytest.raises(ValueError, match=rf"has room for 0 rows of {row} bytes .* takes 8"):
        AdapterPool(llama(), six, max_resident=1, byte_budget=7 * row)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_resident": 0}, "max_resident must be at least 1"),
        ({"max_resident": None}, "max_resident, byte_budget or both"),
        ({"loaders": 0}, "loaders must be at least 1"),
        ({"max_staged": 0}, "max_staged must be at least 1"),
        ({"dtype": torch.int8}, "dtype must be one of"),
        ({"target_modules": ["nothing"]}, "select nothing"),
        ({"target_modules": ["embed_tokens"]}, "is no linear layer"),
    ],
)
def test_what_cannot_be_is_said_before_the_model_is_touched(six: Path, options: dict[str, Any], message: str) -> None:
    model = llama().train()
    with pytest.raises(ValueError, match=message):
        AdapterPool(model, six, **options)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(type(m).__name__ == "AdapterLayer" for m in model.modules())


def test_a_directory_is_needed_or_targets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give target_modules"):
        AdapterPool(llama(), tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        AdapterPool(llama(), tmp_path / "nowhere")
    pool = AdapterPool(llama(), target_modules=["q_proj"])
    assert pool.names() == []
    assert set(pool.layers) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    pool.add("later", write(tmp_path / "x", 0, targets=["q_proj"], r=64))
    use(pool, "later")
    with pytest.raises(ValueError, match="holds adapters already"):
        AdapterPool(pool.model, target_modules=["q_proj"])


# --- in place ---------------------------------------------------------------------------------------------------------


def test_buffers_are_written_in_place(root: Path) -> None:
    pool = AdapterPool(llama(), root, max_resident=2)
    stacks = pool._buffers.stacks
    tensors = [t for s in stacks.values() for t in (s.a, s.b, s.starts, s.ranks, s.scaling)]
    where = [t.data_ptr() for t in tensors]
    slots = torch.zeros(3, dtype=torch.int64)
    for name in KINDS:
        with pool.acquire(name) as slot:
            slots.fill_(int(slot))
            pool.assign(slots)
            logits(pool.model)
        for layer_name, layer in pool.layers.items():
            stack, rows = layer.rows.stack
            assert rows is slots
            assert stack is stacks[layer_name]
    now = [t for s in stacks.values() for t in (s.a, s.b, s.starts, s.ranks, s.scaling)]
    assert all(a is b for a, b in zip(tensors, now, strict=True))
    assert [t.data_ptr() for t in now] == where


def test_free_slots_act_as_the_base(six: Path) -> None:
    pool = AdapterPool(llama(), six, max_resident=2)
    use(pool, "a")
    pool.remove("a")
    pool.assign(torch.tensor([-1, -1, -1]))
    expected = logits(pool.model)
    assert_as_alone(expected, tools["dense"], None, X)
    pool.assign(torch.tensor([0, 1, -1]))
    assert_same_bits(logits(pool.model), expected)


@pytest.mark.parametrize("slots", [torch.zeros(3), torch.zeros(1, 3, dtype=torch.int64)])
def test_assignments_that_cannot_be(six: Path, slots: torch.Tensor) -> None:
    pool = AdapterPool(llama(), six)
    with pytest.raises(ValueError, match=r"slots must be int64 \[rows\]"):
        pool.assign(slots)


@torch.no_grad()
def test_a_compiled_forward_is_not_compiled_again(six: Path) -> None:
    for i, name in enumerate("ghij"):
        write(six / name, i, targets=["gate_proj", "down_proj"], r=2 + 5 * i, ranks={"down_proj": 3})
    torch._dynamo.reset()
    pool = AdapterPool(llama(), six, max_resident=2)
    counter = CompileCounterWithBackend("aot_eager")
    mlp = pool.model.model.layers[1].mlp
    compiled = torch.compile(mlp, backend=counter, fullgraph=True)
    x = torch.randn(3, 4, 16)
    slots = torch.full((3,), -1, dtype=torch.int64)
    pool.assign(slots)
    plain = mlp(x)
    assert_same_bits(compiled(x), plain)
    for name in "ghijgbh":
        with pool.acquire(name) as slot:
            slots.copy_(torch.tensor([int(slot), -1, int(slot)]))
            y = compiled(x)
            assert_same_bits(y, mlp(x))
            assert torch.equal(y[0], plain[0]) == (name == "b")
            assert torch.equal(y[1], plain[1])
    assert counter.frame_count == 1
    torch._dynamo.reset()


# --- many -------------------------------------------------------------------------------------------------------------


def test_a_long_load_of_many_adapters(tmp_path: Path) -> None:
    """The issue's load, scaled down: Zipf's law over 60 adapters, 8 resident, every answer as with it alone."""
    count, requests = 60, 120
    for i in range(count):
        write(tmp_path / f"u{i}", i, dtype=torch.bfloat16)
    pool = AdapterPool(llama(), tmp_path, max_resident=8)
    nbytes = pool.stats().nbytes
    g = torch.Generator().manual_seed(0)
    chances = torch.tensor([1 / (i + 1) for i in range(count)])
    asked = [f"u{int(i)}" for i in torch.multinomial(chances, requests, replacement=True, generator=g)]
    seen: dict[str, torch.Tensor] = {}
    for i in range(0, requests, 3):
        batch = asked[i : i + 3]
        for name in asked[i + 3 : i + 6]:
            pool.prefetch(name)
        with pool.using(batch):
            y = logits(pool.model, X[:1].expand(3, -1))
        for row, name in enumerate(batch):
            assert_same_bits(y[row], seen.setdefault(name, y[row]))
        assert pool.stats().staged + pool.stats().in_flight <= 8 + 2
    for name, y in list(seen.items())[::6]:
        assert_as_alone(y[None], tools["dense"], tmp_path / name, X[:1])
    stats = pool.stats()
    assert stats.nbytes == nbytes
    assert stats.resident == 8
    assert stats.failures == 0
    assert stats.in_use == 0
    assert stats.hits + stats.misses == sum(len(set(asked[i : i + 3])) for i in range(0, requests, 3))
    # The most popular of 60 are asked for far more often than an eighth of the time.
    assert stats.hits / (stats.hits + stats.misses) > 8 / count
