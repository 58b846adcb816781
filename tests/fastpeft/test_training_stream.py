"""Data of several files, with weights, and larger than memory: order, resuming, memory, errors."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_tools import interrupted
from fastpeft.apps.training import data, lines, order, packing, run
from fastpeft.apps.training.config import TrainConfig, from_dict
from fastpeft.apps.training.data import Encoder, Lazy
from fastpeft.apps.training.errors import UserError
from fastpeft.apps.training.lines import JsonLines, Table, split
from fastpeft.apps.training.loop import Trainer
from fastpeft.apps.training.metrics import Silent, read_metrics
from fastpeft.apps.training.order import Order
from fastpeft.apps.training.packing import HeldOut, Plan
from fastpeft.apps.training.testing import make_byte_tokenizer, make_tiny_model, write_jsonl

from peft_kernels.testing import assert_same_bits

PLAIN = make_byte_tokenizer(chat=False)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are large from nine examples on."""
    for module in (data, order, packing):
        monkeypatch.setattr(module, "BLOCK", 8)
    monkeypatch.setattr(data, "_SAMPLE", 8)
    monkeypatch.setattr(lines, "_IN_MEMORY", 64)


def blocks(parts: list[tuple[int, float | None]], epoch: int, seed: int = 0) -> list[list[int]]:
    made = Order(parts, seed)
    return [made.block(epoch, number) for number in range(made.blocks)]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("counts", [[5], [8], [9], [100], [60, 3, 1], [64, 1]])
def test_an_epoch_has_every_line_once(counts: list[int]) -> None:
    parts: list[tuple[int, float | None]] = [(count, None) for count in counts]
    for epoch in range(3):
        made = blocks(parts, epoch)
        assert sorted(i for block in made for i in block) == list(range(sum(counts)))
        assert max(map(len, made)) <= 8 + len(counts)
    assert blocks(parts, 1) == blocks(parts, 1)
    if sum(counts) > 8:
        assert blocks(parts, 0) != blocks(parts, 1) != blocks(parts, 1, seed=1)


@pytest.mark.usefixtures("small_blocks")
def test_blocks_are_of_lines_from_all_over_the_file() -> None:
    for block in blocks([(400, None)], 1):
        found = sorted(block)
        assert max(b - a for a, b in zip([-1, *found], [*found, 400], strict=True)) < 4 * 400 / len(block)


@pytest.mark.usefixtures("small_blocks")
def test_weights_are_shares_of_every_block_and_no_line_comes_again_early() -> None:
    parts: list[tuple[int, float | None]] = [(90, 3.0), (10, 1.0)]
    seen: Counter[int] = Counter()
    for epoch in range(4):
        for block in blocks(parts, epoch):
            second = sum(i >= 90 for i in block)
            assert abs(second - len(block) / 4) <= 1
            seen.update(block)
            light, heavy = [seen[i] for i in range(90)], [seen[i] for i in range(90, 100)]
            assert max(light) - min(light) <= 1
            assert max(heavy) - min(heavy) <= 1
    assert sum(heavy) == 100  # a quarter of four epochs of 100


def test_tables_are_looked_up_in_memory_and_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (1 << 20, 10):
        monkeypatch.setattr(lines, "_IN_MEMORY", limit)
        table = Table("<QI")
        for i in range(5):
            table.append(i << 40, i)
        assert [tuple(row) for row in table] == [(i << 40, i) for i in range(5)]
        with pytest.raises(IndexError):
            table[5]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("packing", [True, False])
def test_encoding_when_used_is_encoding_at_once(
    tmp_path: Path, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long and short lines, some of which are left out: each that is usable is in an epoch once, with the tokens that
    it has at once; so it is for what is held out."""
    file = tmp_path / "d.jsonl"
    records = [{"prompt": "p" * (i % 19), "completion": f"{i}"} for i in range(50)]
    file.write_text("\n".join(map(json.dumps, records)))
    encoder = Encoder(PLAIN, max_length=14)
    found = encoder.dataset(JsonLines(str(file)))
    assert isinstance(found.examples, Lazy)
    assert found.about
    monkeypatch.setattr(data, "BLOCK", 1000)
    at_once = encoder.dataset(JsonLines(str(file)))
    assert not at_once.about
    assert at_once.dropped > 0
    monkeypatch.setattr(data, "BLOCK", 8)
    plan = Plan(
        found.examples, seed=0, max_length=16, packing=packing, batch_size=2, gradient_accumulation=1, epochs=3.0,
        max_steps=0,
    )  # fmt: skip
    by_epoch: dict[int, list[Any]] = {}
    for epoch, passes in plan.steps:
        by_epoch.setdefault(epoch, []).extend(plan.examples[i] for rows in passes for row in rows for i in row)
    assert sorted(by_epoch[1], key=repr) == sorted(at_once.examples, key=repr)
    learned = [sum(batch.targets.numel() for batch in HeldOut(examples, 16, 2, packing, 0))
               for examples in (found.examples, at_once.examples)]  # fmt: skip
    assert learned[0] == learned[1] == at_once.learned


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_tiny_model(folder / "model", layers=1)
    write_jsonl(folder / "a.jsonl", 30)
    write_jsonl(folder / "b.jsonl", 12)
    return folder


def config(world: Path, output: Path, **changes: Any) -> TrainConfig:
    values = {
        "model": str(world / "model"), "output": str(output), "eval_fraction": 0.2, "max_length": 48,
        "data": [{"file": str(world / "a.jsonl"), "weight": 1}, {"file": str(world / "b.jsonl"), "weight": 2}],
        "dtype": "float32", "max_steps": 12, "save_every": 3, "batch_size": 4, "gradient_accumulation": 2,
        "quantize": "none",
        "lora": {"r": 2, "lora_dropout": 0.1, "target_modules": ["q_proj"]},
    }  # fmt: skip
    return from_dict({**values, **changes})


def trainer(settings: TrainConfig) -> Trainer:
    prepared = run.prepare(settings)
    return Trainer(settings, run.adapted_model(prepared), run.make_tracks([prepared]),
                   prepared.tokenizer.pad_token_id, torch.device("cpu"), Silent())  # fmt: skip


def losses(folder: Path) -> list[tuple[Any, ...]]:
    keys = ("step", "epoch", "loss", "held_out_loss", "lr", "grad_norm", "tokens", "learned_tokens")
    return [tuple(line.get(k) for k in keys) for line in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.usefixtures("small_blocks")
def test_resuming_in_a_mixture_of_blocks_is_exact(world: Path, tmp_path: Path) -> None:
    """Steps that reach over blocks and epochs, resumed in the middle, from a checkpoint that says where it is and from
    one of before that was said."""
    whole = trainer(config(world, tmp_path / "whole"))
    whole.run()
    epochs = [line["epoch"] for line in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "epoch" in line]
    assert len(set(epochs)) > 2
    interrupted(trainer(config(world, tmp_path / "broken")), 8)
    resumed = trainer(config(world, tmp_path / "broken"))
    assert resumed.run(resume=True)["default"].resumed_from == 6
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert_same_bits(a, b)
    plan, other = whole.tracks[0].plan, trainer(config(world, tmp_path / "other")).tracks[0].plan
    assert plan.place(9) == other.place(9)
    other.go_to(9, json.loads(json.dumps(plan.place(9))))
    assert other.step(9) == plan.step(9)


@pytest.mark.usefixtures("small_blocks")
def test_other_weights_and_other_lines_are_other_data(world: Path, tmp_path: Path) -> None:
    def fingerprint(**changes: Any) -> str:
        return run.make_tracks([run.prepare(config(world, tmp_path, **changes))])[0].plan.fingerprint

    a, b = str(world / "a.jsonl"), str(world / "b.jsonl")
    other = tmp_path / "other.jsonl"
    other.write_text((world / "a.jsonl").read_text().replace("colour 29?", "colour 30?"))
    found = [fingerprint(data=files) for files in (
        a, [a, b], [{"file": a, "weight": 1}, {"file": b, "weight": 3}], [str(other), b],
    )]  # fmt: skip
    assert len({fingerprint(), *found}) == 5
    assert fingerprint() == fingerprint(learning_rate=1e-3)


@pytest.mark.usefixtures("small_blocks")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Reading, dividing and laying out steps of a file, and of one eight times as large."""
    peaks = []
    for count in (100, 800):
        file = tmp_path / f"{count}.jsonl"
        records = ({"prompt": f"{i:03}" * 200, "completion": "c"} for i in range(count))
        file.write_text("\n".join(map(json.dumps, records)))
        tracemalloc.start()
        train, held_out = split(JsonLines(str(file)), 0.3)
        encoder = Encoder(PLAIN, max_length=1024)
        plan = Plan(encoder.dataset(train).examples, seed=0, max_length=1024, packing=True, batch_size=1,
                    gradient_accumulation=1, epochs=1.0, max_steps=20)  # fmt: skip
        assert len(list(plan.steps)) == 20
        assert sum(batch.tokens for batch in HeldOut(encoder.dataset(held_out).examples, 1024, 4, True, 0)) > 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    grown = (tmp_path / "800.jsonl").stat().st_size - (tmp_path / "100.jsonl").stat().st_size
    assert peaks[1] - peaks[0] < grown / 10


@pytest.mark.usefixtures("small_blocks")
def test_a_line_that_is_changed_meanwhile_is_named(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", 20)
    records = JsonLines(str(file))
    text = file.read_text()
    file.write_text(text.replace("colour 7?", "color 7?"))
    assert records[6][1]["prompt"] == "colour 6?"
    with pytest.raises(UserError, match=r"d\.jsonl:8: the line was changed since training began"):
        records[7]


@pytest.mark.parametrize(("given", "message"), [
    ([], "the setting 'data' is missing"),
    ([3], "data[0]: expected a path or {file:, weight:}, got 3"),
    (["a", {"flie": "b"}], "data[1]: unknown setting 'flie'; did you mean 'file'?"),
    ([{"weight": 1}], "data[0].file: expected a path, got None"),
    ([{"file": "a", "weight": 0}], "data[0].weight: expected a positive number, got 0.0"),
    ([{"file": "a", "weight": "x"}], "data[0].weight: expected a number, got 'x'"),
    ([{"file": "a", "weight": 1}, "b"], "data: some files have a weight and others none; give each of them one"),
    ({"file": "a"}, "data: expected text, got {'file': 'a'}"),
])  # fmt: skip
def test_bad_lists_of_files_are_named(given: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_dict({"model": "m", "data": given})
    assert message in str(caught.value)


def test_the_file_of_a_bad_line_is_named(world: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2: missing completion"):
        run.prepare(config(world, tmp_path, data=[str(world / "a.jsonl"), str(tmp_path / "bad.jsonl")]))


@pytest.mark.parametrize("most", [0, 1, 3, 5, 100])
def test_the_most_to_hold_out_is_of_all_files(world: Path, tmp_path: Path, most: int) -> None:
    everything = len(run.prepare(config(world, tmp_path)).held_out.examples)
    found = run.prepare(config(world, tmp_path, max_eval_examples=most))
    assert len(found.held_out.examples) == min(most or everything, everything)
