"""The bench of training steps: their bounds, the table of their products, and what counts as met beside them."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from bench import machine
from bench.results import Limit, Row, as_lines
from bench.suites import bounds, multi_train, products, training, whole, worker
from bench.suites.families_models import save

LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128  # q and o, k and v, the MLP


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig

    path = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(hidden_size=64, num_hidden_layers=2, intermediate_size=128, vocab_size=96, head_dim=16,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    save(config, "AutoModelForCausalLM", path)
    return path


@pytest.fixture
def model(folder: Path) -> Any:
    return worker.load("ours-bf16-own", str(folder), 0.0, "cpu")


def test_the_products_are_those_of_the_bound(model: Any) -> None:
    """Of a step of 2 x 8 tokens; 16 of rank on each of seven layers."""
    found = {p.name: p for p in products.products(model, 2, 8)}
    qkv, head, seen = found["q, k, v: forward"], found["head: dX"], found["attention: backward in one call"]
    assert (qkv.m, qkv.n, qkv.k, qkv.count) == (16, 128, 64, 2)
    assert qkv.flops == 2 * 16 * (128 * 64 + 16 * (128 + 3 * 64))
    assert found["q, k, v: dA, dB"].flops == 2 * 16 * 16 * (128 + 3 * 64)
    assert found["down: dX, no adapter"].flops == 2 * 16 * 64 * 128
    assert (head.n, head.flops) == (96, 2 * 16 * 96 * 64)
    assert seen.flops == 4 * 2 * 64 * 2 * 8 * 9 / 2  # products, 2 of a multiply-add, features, rows, pairs
    parts = (products.FORWARD, products.BACKWARD)
    whole = sum(p.count * p.flops for p in found.values() if p.part in parts) + head.flops
    adapters = 16 * (128 + 3 * 64 + 64 + 64 + 256 + 2 * 64 + 64 + 128)
    linear = 2 * 16 * (2 * (2 * LAYER + 96 * 64) + 3 * 2 * adapters)
    assert whole == bounds.costs(model, 2, 8)["step_flops"] == linear + 2 * 6 * 2 * 64 * 2 * 8 * 9 / 2


def test_several_adapters_count_as_a_token_has_them(folder: Path) -> None:
    one, four = (worker.load("ours-bf16-own", str(folder), 0.0, "cpu", count) for count in (1, 4))
    assert bounds.costs(four, 4, 8, 4)["step_flops"] == bounds.costs(one, 4, 8)["step_flops"]


def test_layers_that_the_table_does_not_have_are_an_error(model: Any) -> None:
    model.get_base_model().model.other = torch.nn.Linear(64, 64)
    with pytest.raises(ValueError, match="other layers than a Llama"):
        products.products(model, 1, 4)


def test_each_product_is_computed_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls give what their names say, on more than one copy of a weight."""
    monkeypatch.setattr(products, "last_cache_bytes", lambda: 1 << 13)
    calls = {p.name: candidate.calls for p, candidate in products.timed(model, 1, 8, 0.0)}
    assert len(calls["o: forward"]) > 1
    y = calls["gate, up: forward"][0]()
    assert [t.shape for t in y] == [(8, 128), (8, 128)]  # type: ignore[attr-defined]
    shapes = {"o: dX": [(8, 64), (0,), (0,)], "o: dA, dB": [(0,), (16, 64), (64, 16)],
              "o: dX, no adapter": [(8, 64), (0,), (0,)], "head: dX": [(8, 64)],
              "q, k, v: backward in one call": [(8, 64), *3 * [(16, 64)], (64, 16), (32, 16), (32, 16)],
              "attention: backward in one call": [(1, 8, 4, 16), (1, 8, 2, 16), (1, 8, 2, 16)]}  # fmt: skip
    for name, expected in shapes.items():
        assert [tuple(t.shape) for t in calls[name][0]()] == expected, name  # type: ignore[attr-defined]


def replies(step: float) -> tuple[list[products.Product], list[dict[str, Any]]]:
    """Two layers of a product that takes 1 s forward; backward 3 s in one call, 2 s and 0.5 s apart."""
    parts = {products.FORWARD: 1.0, products.DX: 2.0, products.DAB: 0.5, products.BACKWARD: 3.0,
             products.FORWARD_ALONE: 0.9, products.DX_ALONE: 1.9}  # fmt: skip
    found = [products.Product("o", part, 8, 8, 8, 2, 1e9) for part in parts]
    return found, 3 * [{"s": step, "bound_s": 4.0, "each": {p.name: parts[p.part] for p in found}}]


def test_the_table_adds_up_what_a_step_has() -> None:
    row = training.table(training.SMALL, {"tokens": 8}, *replies(8.0))
    assert {name: row.stats[name].median for name in ("step", "its bound", "its products alone")} == {
        "step": 8.0, "its bound": 4.0, "its products alone": 2 * (1.0 + 2.0 + 0.5)}  # fmt: skip
    assert row.extra["of the step"]["o: dX"] == "50.0%"
    assert not {"o: backward in one call", "o: dX, no adapter"} & set(row.extra["of the step"])
    assert row.extra["GFLOP/s"]["o: dA, dB"] == 2.0
    assert row.extra["of the bound"] == {"step": 2.0, "its bound": 1.0, "its products alone": 1.75,
                                         "step less attention": 2.0}  # fmt: skip
    line = next(line for line in as_lines([row], {}, True) if line["candidate"] == "step")
    assert line["limits"][0]["most"] == 1.5
    assert "limits" not in as_lines([row], {}, False)[0], "no verdict while tests fail"


@pytest.mark.parametrize(("step", "case", "met"), [
    (5.9, training.SMALL, True), (8.7, training.SMALL, True), (8.8, training.SMALL, False),
    (6.3, training.long_case(4), True), (8.7, training.long_case(4), False),
])  # fmt: skip
def test_a_step_is_held_to_its_bound_or_to_its_products(step: float, case: training.Case, met: bool) -> None:
    """At 1.5 times the bound of 4 s, or 1.25 times the 7 s that the products take: more than 1.2 times the bound."""
    (limit,) = training.table(case, {"tokens": 8}, *replies(step)).limits
    assert limit.met == met


def test_products_near_their_bound_are_no_excuse() -> None:
    found, said = replies(8.7)
    near = [{**reply, "bound_s": 5.85} for reply in said]  # 7 s are less than 1.2 times as much
    (limit,) = training.table(replace(training.SMALL, most=1.4), {"tokens": 8}, found, near).limits
    assert (limit.other, limit.met) == (None, False)


def test_a_limit_says_both_ways() -> None:
    limit = Limit("times the bound", "step", 2.0, 1.5, Limit("times its products alone", "step", 1.2, 1.25))
    assert str(limit) == "times the bound 2, at most 1.5, or times its products alone 1.2, at most 1.25"
    assert limit.as_dict()["or"]["met"]


def test_checkpointing_keeps_less_and_computes_the_same(folder: Path) -> None:
    """Loss and gradients of a step are those without it; what is kept is measured."""
    kept, losses = {}, {}
    for mode in (training.OWN, training.CKPT):
        model = worker.load(mode, str(folder), 0.0, "cpu")
        step = worker.TrainStep(model, mode, worker.tokens_of(model, 2, 32))
        kept[mode] = step.kept()["saved_mib"]
        losses[mode] = [step()["loss"] for _ in range(2)]  # the second is of what the first's gradients made
    assert losses[training.CKPT] == losses[training.OWN]
    assert 0 < kept[training.CKPT] < 0.5 * kept[training.OWN]


def test_a_bound_is_the_flops_at_the_peak(model: Any) -> None:
    library = machine.peak_library()
    task = {"what": "step", "mode": training.OWN, "rows": 2, "length": 8, "threads": 1}
    assert worker.bound(task, model)() == {}
    if library is None:
        pytest.skip("no C++ compiler")
    said = worker.bound({**task, "peak": str(library)}, model)()
    flops = bounds.costs(model, 2, 8)["step_flops"]
    assert said["bound_s"] == pytest.approx(flops / said["peak_gflops"] / 1e9)


@pytest.mark.full_form
def test_a_worker_measures_its_bound_beside_each_step(folder: Path) -> None:
    """The whole way, in a process: the peak, the step, and the memory of the mode."""
    args = Namespace(threads=1, dropout=0.0, device="cpu", quick=True, sample_s=1e-4, model=folder, modes=None)
    stats, last = whole.measure("step", [training.OWN], 2, args, rows=1, length=8, warm=4)
    reply = last[training.OWN]
    library = machine.peak_library()
    assert len(stats[training.OWN].samples) == 2
    assert ("bound_s" in reply) == (library is not None)
    if library is not None:
        assert reply["of the bound"] == stats[training.OWN].median / reply["bound_s"] > 1


def test_parts_that_take_long_run_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.suites import PARTS

    made: list[str] = []
    monkeypatch.setattr(training, "products_row", lambda case, *_: made.append(f"products {case.title}"))
    monkeypatch.setattr(training, "step_row", lambda name, case, *_: made.append(f"{name} {case.title}") or Row("", {}))
    args = Namespace(only=PARTS, modes=None, m=None, step_rounds=1, quick=True)
    list(training.rows(args))
    assert made == ["products SmolLM2-135M, 4 x 128 tokens"]
    made.clear()
    list(training.rows(Namespace(**{**vars(args), "only": ["long", "longest"], "m": [2048]})))
    assert made == ["long SmolLM2-135M, 1 x 2,048 tokens", "long SmolLM2-135M, 1 x 16,384 tokens"]


def test_one_adapter_with_all_rows_steps_once(folder: Path) -> None:
    model = worker.load(multi_train.ONE, str(folder), 0.0, "cpu")
    run = worker.adapters_trainer(model, multi_train.ONE, 4, 8)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    assert all(run()["loss"] > 0 for _ in range(2))
    assert all(not torch.equal(old, p) for old, p in zip(before, trained, strict=True))
    assert multi_train.ONE not in multi_train.WHOLE_MODELS[0].modes, "another checkout does not know it"
