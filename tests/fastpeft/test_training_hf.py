"""`fastpeft train --trainer hf` beside our own loop: the same settings give the same losses, adapters and files."""

from __future__ import annotations

import importlib.util
import json
import runpy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft.apps.training import run
from fastpeft.apps.training.config import TrainConfig, from_dict
from fastpeft.apps.training.data import Encoder
from fastpeft.apps.training.errors import UserError
from fastpeft.apps.training.inference import Answerer
from fastpeft.apps.training.preferences import PairEncoder, check_pair, columns
from fastpeft.apps.training.stop import Interrupted
from fastpeft.apps.training.testing import make_byte_tokenizer
from fastpeft.apps.training.trainers import check_trainer
from forms import matrix

from peft_kernels.testing import assert_no_worse, assert_same_bits

_tools = runpy.run_path(str(Path(__file__).with_name("hf_tools.py")))
Lines, config, make_world, train, weights, written = (
    _tools[name] for name in ("Lines", "config", "make_world", "train", "weights", "written")
)
needs_accelerate = pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="needs the package accelerate")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = make_world(tmp_path_factory.mktemp("world"))
    return made


OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {}, "dora, dense": {"method": "dora", "quantize": "none"}, "one row each": {"packing": False},
    "checkpointing": {"gradient_checkpointing": True}, "no clipping": {"max_grad_norm": 0.0},
    "some layers": {"gradient_checkpointing": True, "checkpointing_keeps": 0.5},
    "clipping": {"max_grad_norm": 0.05}, "lora+": {"lora_plus_ratio": 8.0, "weight_decay": 0.1},
    "adafactor": {"optimizer": "adafactor"}, "chunks": {"loss_chunk_vocab": 64, "loss_chunk_tokens": 8},
    "slow layers": {"fast_layers": False}, "vera": {"method": "vera", "adapter": {"r": 8}},
    "adalora": {"method": "adalora", "adapter": {"total_step": 7, "tinit": 1, "tfinal": 1, "init_r": 4, "target_r": 2}},
    "prompt": {"method": "prompt_tuning"}, "prefix": {"method": "prefix_tuning"}, "shadow": {"method": "shadow"},
    "nothing held out": {"eval_fraction": 0.0}, "whole epochs": {"max_steps": 0, "epochs": 1.5},
    "bfloat16": {"dtype": "bfloat16"}, "accumulated alone": {"batch_size": 1, "gradient_accumulation": 2},
}  # fmt: skip
COUNTS = ("step", "epoch", "tokens", "learned_tokens", "lr")


@needs_accelerate
@pytest.mark.parametrize("option", matrix(OPTIONS, ["lora"]))
def test_losses_are_those_of_our_loop(option: str, world: Path, tmp_path: Path) -> None:
    """In float32, beside a run of the loop in float64: every loss, held-out loss and gradient norm."""

    def lines(trainer: str, change: Callable[[Any], Any] = lambda model: model) -> Any:
        settings = config(world, tmp_path / (trainer + change.__name__), **OPTIONS[option])
        return train(settings, trainer, None, change)[2]

    ours, theirs, exact = lines("own"), lines("hf"), lines("own", torch.nn.Module.double)
    for key in COUNTS:
        assert torch.equal(theirs.column(key), ours.column(key)), key
    assert len(set(ours.column("loss").tolist())) > 3
    for key in ("loss", "held_out_loss", "grad_norm"):
        best = exact.column(key, torch.float64)
        assert_no_worse(theirs.column(key), ours.column(key), best, best * 10)
    files = [{p.name for p in (tmp_path / f"{t}<lambda>" / "adapter").iterdir()} for t in ("own", "hf")]
    assert files[0] == files[1]


class Crash(Exception):
    pass


def crash(line: dict[str, Any]) -> None:
    if line["step"] == 5:
        raise Crash


@needs_accelerate
@pytest.mark.parametrize(("begun", "ended"), matrix([("hf", "hf"), ("own", "hf"), ("hf", "own")], [("hf", "hf")]))
def test_either_trainer_goes_on_from_the_others_checkpoint(begun: str, ended: str, world: Path, tmp_path: Path) -> None:
    whole, parts = (config(world, tmp_path / name) for name in ("whole", "parts"))
    train(whole, ended)
    with pytest.raises(Crash):
        train(parts, begun, Lines(crash))
    with pytest.raises(UserError, match="holds the checkpoints of an earlier run"):
        train(parts, ended)
    result, _, _ = train(parts, ended, resume=True)
    assert (result.resumed_from, result.steps) == (3, 7)
    if begun == ended:  # to the last bit
        assert written(tmp_path / "parts") == written(tmp_path / "whole")
        for key, tensor in weights(tmp_path / "whole" / "adapter").items():
            assert_same_bits(weights(tmp_path / "parts" / "adapter")[key], tensor)
    found, expected = (
        torch.tensor([line["loss"] for line in written(tmp_path / name) if "loss" in line])
        for name in ("parts", "whole")
    )
    assert_no_worse(found, expected, expected, expected * 10)
    again, _, told = train(whole, ended, resume=True)
    assert (again.tokens, again.steps, told.lines) == (0, 7, [])
    answerer = Answerer.load(None, str(tmp_path / "parts" / "adapter"))  # as `fastpeft generate`
    assert "nf4" in answerer.note
    assert answerer.answer(["colour 3?"], 2)[0].tokens > 0


STOPPING = {
    "learning_rate": 0.1, "schedule": "constant", "eval_every": 1, "save_every": 0, "max_steps": 24,
    "early_stopping_patience": 3, "keep_checkpoints": 1,
}  # fmt: skip


def stopped_early(world: Path, output: Path) -> tuple[int, Any]:
    """(step of the best evaluation, result) of a run whose learning rate soon makes it worse."""
    result, _, told = train(config(world, output, **STOPPING))
    held_out = told.column("held_out_loss")[1:]  # after each step
    best = int(held_out.argmin()) + 1
    assert result.steps == len(held_out) == best + 3 < 24
    assert torch.tensor(result.held_out_after) == held_out.min()
    assert f"the adapter is that of step {best}" in told.said[-1]
    return best, result


@needs_accelerate
def test_early_stopping_takes_the_best_adapter(world: Path, tmp_path: Path) -> None:
    best, result = stopped_early(world, tmp_path)
    names = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert names == {f"checkpoint-{best}", f"checkpoint-{result.steps}"}
    taken, kept, last = (weights(tmp_path / name) for name in ("adapter", *sorted(names, key=lambda n: int(n[11:]))))
    for key, tensor in taken.items():
        assert_same_bits(tensor, kept[key])
    assert any((kept[key] != last[key]).any() for key in kept)
    over, _, told = train(config(world, tmp_path, **STOPPING), resume=True)  # nothing is trained
    assert (over.steps, over.held_out_after, told.lines) == (result.steps, result.held_out_after, [])


@needs_accelerate
@pytest.mark.full_form
def test_early_stopping_goes_on_counting(world: Path, tmp_path: Path) -> None:
    """Interrupted after the best evaluation, by Ctrl-C."""
    best, result = stopped_early(world, tmp_path / "whole")

    def interrupt(line: dict[str, Any]) -> None:
        if line["step"] == best + 1:
            signal.raise_signal(signal.SIGINT)

    settings = config(world, tmp_path / "parts", **STOPPING)
    with pytest.raises(Interrupted, match=f"ended after step {best + 1} of 24.* go on with --resume"):
        train(settings, "hf", Lines(interrupt))
    parts, _, _ = train(settings, resume=True)
    assert (parts.resumed_from, parts.steps) == (best + 1, result.steps)
    assert written(tmp_path / "parts") == written(tmp_path / "whole")
    for key, tensor in weights(tmp_path / "whole" / "adapter").items():
        assert_same_bits(weights(tmp_path / "parts" / "adapter")[key], tensor)


@needs_accelerate
@pytest.mark.parametrize("fraction", matrix([0.2, 0.0], [0.0]))
def test_prompts_are_answered_as_by_our_loop(fraction: float, world: Path, tmp_path: Path) -> None:
    options = {"sample_prompts": ["colour 3?", "colour 5?"], "sample_tokens": 3, "eval_fraction": fraction}
    found = {}
    for trainer in ("own", "hf"):
        _, _, told = train(config(world, tmp_path / trainer, max_steps=4, **options), trainer)
        found[trainer] = [(line["step"], line["samples"]) for line in told.lines if "samples" in line]
    assert found["hf"] == found["own"]
    assert [step for step, _ in found["own"]] == [0, 3, 4]
    assert all(len(samples) == 2 for _, samples in found["own"])


@needs_accelerate
def test_divergence_is_one_clear_line(world: Path, tmp_path: Path) -> None:
    settings = config(world, tmp_path, learning_rate=1e30, schedule="constant", warmup=0.0, eval_every=0)
    with pytest.raises(UserError, match=r"the loss is nan .* training diverged"):
        train(settings)


def settings_of(**changes: Any) -> TrainConfig:
    return from_dict({"model": "m", "data": "d", **changes})


EVALUATED = {"eval_fraction": 0.1, "eval_every": 2}
DPO: dict[str, Any] = {"objective": "dpo"}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("own", DPO, "objective is for the trainers of transformers and TRL; add --trainer hf"),
    ("own", {"report_to": ["wandb"]}, "report_to is for"),
    ("own", {"early_stopping_patience": 1}, "early_stopping_patience is for"),
    ("own", {"adapters": {"a": {"objective": "dpo"}}}, "adapters.a.objective is for"),
    ("hfs", {}, "trainer: expected one of own, hf, got 'hfs'; did you mean 'hf'?"),
    ("hf", {"adapters": {"a": {}}}, "adapters: --trainer hf trains one adapter"),
    ("hf", {"device": "cuda:1"}, "device: --trainer hf takes the first GPU, got cuda:1"),
    ("hf", {"early_stopping_patience": 1}, "counts evaluations, and there are none during the run; set eval_every"),
    ("hf", {"early_stopping_threshold": 0.1}, "early_stopping_threshold without early_stopping_patience"),
    ("hf", {"dpo": {"beta": 0.2}}, "dpo.beta: the objective is sft; add objective=dpo"),
    ("hf", {**DPO, "dpo": {"betta": 0.2}}, "unknown setting dpo.betta; did you mean 'beta'?"),
    ("hf", {**DPO, "dpo": {"max_length": 9}}, "unknown setting dpo.max_length"),
    ("hf", {**DPO, "dpo": {"beta": "big"}}, "dpo.beta: expected a number, got 'big'"),
    ("hf", {**DPO, "dpo": {"beta": True}}, "dpo.beta: expected a number, got True"),
    ("hf", {**DPO, "dpo": {"disable_dropout": 0}}, "dpo.disable_dropout: expected true or false, got 0"),
    ("hf", {**DPO, "loss_chunk_tokens": 64}, "loss_chunk_tokens: TRL computes the loss"),
    ("hf", {**DPO, "method": "prefix_tuning"}, "method: prefix_tuning with objective=dpo"),
    ("hf", {**DPO, "lora": {"lora_dropout": 0.1}}, "lora.lora_dropout: TRL switches dropout off"),
]


@pytest.mark.parametrize(("trainer", "changes", "message"), REFUSED)
def test_what_a_trainer_cannot_honour_is_named(trainer: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_trainer(settings_of(**changes), trainer)
    assert message in str(caught.value)


def test_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs in one process, WORLD_SIZE is 2"):
        check_trainer(settings_of(), "hf")


@pytest.mark.parametrize(
    ("missing", "changes"),
    [
        ("accelerate", {}), ("tensorboard", {"report_to": ["tensorboard"]}), ("wandb", {"report_to": ["wandb"]}),
        ("trl", DPO), ("datasets", DPO), ("peft", DPO),
    ],
)  # fmt: skip
def test_a_missing_package_is_named(missing: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> object:
        return None if name.lower().startswith(missing) else object()

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(UserError, match=f"needs the package {missing}: .*; pip install {missing}"):
        check_trainer(settings_of(**changes), "hf")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "expected a JSON object, got a list"),
        ({"prompt": "a", "chosen": "b"}, "missing rejected (found: prompt, chosen); objective=dpo needs"),
        ({"prompt": 1, "chosen": "b", "rejected": "c"}, "expected text in 'prompt', got a number"),
        ({"prompt": "a", "chosen": " ", "rejected": "c"}, "the chosen is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same text"),
        ({"prompt": [], "chosen": "b", "rejected": "c"}, "prompt: expected a list of messages"),
        ({"prompt": [{"role": "assistant", "content": "a"}], "chosen": "b", "rejected": "c"}, "ends with an assistant"),
    ],
)
def test_bad_pairs(record: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_pair(record, "f:1")
    assert message in str(caught.value)


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}, {"role": "user", "content": "d"}]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("prompt", ["what?", TALK], ids=["text", "messages"])
def test_rows_of_a_pair_are_those_of_its_answers(chat: bool, prompt: Any) -> None:
    tokenizer = make_byte_tokenizer(chat)
    record = {"prompt": prompt, "chosen": "yes!", "rejected": "no"}
    if isinstance(prompt, list) and not chat:
        with pytest.raises(UserError, match="messages need a chat template"):
            PairEncoder(tokenizer).encode(record)
        return
    pair, one = PairEncoder(tokenizer).encode(record), Encoder(tokenizer)
    parts = columns(pair)
    for key in ("chosen", "rejected"):
        if isinstance(prompt, list):
            alone = one.encode({"messages": [*prompt, {"role": "assistant", "content": record[key]}]})
        else:
            alone = one.encode({"prompt": prompt, "completion": record[key]})
            assert parts["prompt_ids"] == one.prompt_ids(prompt)
        assert parts["prompt_ids"] + parts[f"{key}_ids"] == alone.input_ids
        assert tokenizer.decode(parts[f"{key}_ids"]).startswith(record[key])
    assert pair.learned == len(parts["chosen_ids"]) + len(parts["rejected_ids"])


def test_a_prompt_of_a_pair_has_a_token() -> None:
    record = {"prompt": "", "chosen": "yes", "rejected": "no"}
    with pytest.raises(UserError, match="the prompt has no token"):
        PairEncoder(make_byte_tokenizer(chat=False)).encode(record)


def test_long_pairs(tmp_path: Path) -> None:
    tokenizer = make_byte_tokenizer(chat=False)
    record = {"prompt": "p" * 8, "chosen": "c" * 5, "rejected": "r" * 2}  # and an end token after each answer

    def lengths(length: int, truncate: str) -> list[int]:
        (pair,) = PairEncoder(tokenizer, "auto", length, truncate).dataset([("f:1", record)]).examples
        return [len(ids) for ids in columns(pair).values()]

    assert lengths(14, "error") == [8, 6, 3]
    assert lengths(12, "completion") == [8, 4, 3]
    assert lengths(12, "prompt") == [6, 6, 3]
    for length, truncate, message in (
        (12, "drop", "no example is left"),
        (8, "completion", "no example is left"),
        (6, "prompt", "no example is left"),
        (12, "error", "14 tokens are more than max_length=12"),
    ):
        with pytest.raises(UserError, match=message):
            lengths(length, truncate)


def test_pairs_are_read_and_planned(world: Path, tmp_path: Path) -> None:
    from fastpeft.apps.estimate.describe import describe

    settings = config(world, tmp_path, objective="dpo")
    assert settings.packing is False
    (prepared,) = run.prepare_all(settings)
    assert all(len(columns(example)["prompt_ids"]) > 0 for example in prepared.train.examples)
    plan = describe(settings, [prepared])
    assert plan["rows_per_step"] == 6
    assert json.dumps(plan)
    wrong = config(world, tmp_path, data=str(world / "pairs.jsonl"))
    with pytest.raises(UserError, match="missing completion"):
        run.prepare_all(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"bias": "all"}, "trains the base's biases"), ({"init_lora_weights": "pissa"}, "edits the base's weights")],
)
def test_an_adapter_that_changes_the_reference_is_refused(
    changes: dict[str, Any], message: str, world: Path, tmp_path: Path
) -> None:
    lora = {"r": 4, "target_modules": "all-linear", **changes}
    settings = config(world, tmp_path, objective="dpo", lora=lora, quantize="none")
    with pytest.raises(UserError, match=f"lora: .*{message}, which the reference of objective=dpo computes with"):
        run.adapted_model(*run.prepare_all(settings))
