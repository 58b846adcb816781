"""`fastpeft train --trainer hf` with TRL and TensorBoard: DPO by its formula, resumed, reported, stopped early."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft.apps.cli.app import app
from fastpeft.apps.training import run
from fastpeft.apps.training.errors import UserError
from fastpeft.apps.training.preferences import columns
from torch import Tensor
from torch.nn.functional import logsigmoid
from typer.testing import CliRunner

from peft_kernels.testing import assert_no_worse, assert_same_bits

pytestmark = pytest.mark.ecosystem
_tools = runpy.run_path(str(Path(__file__).with_name("hf_tools.py")))
Lines, config, make_world, train, weights, written = (
    _tools[name] for name in ("Lines", "config", "make_world", "train", "weights", "written")
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = make_world(tmp_path_factory.mktemp("world"))
    return made


def log_probability(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()


@torch.no_grad()
def dpo_loss(model: Any, pairs: list[Any], beta: float) -> Tensor:
    """The mean of -log sigmoid(beta (margin - the base's margin)), pair by pair."""
    losses = []
    for pair in pairs:
        prompt, chosen, rejected = columns(pair).values()
        margin = log_probability(model, prompt, chosen) - log_probability(model, prompt, rejected)
        with model.disable_adapter():
            base = log_probability(model, prompt, chosen) - log_probability(model, prompt, rejected)
        losses.append(-logsigmoid(beta * (margin - base)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_dpo_is_its_formula(quantize: str, world: Path, tmp_path: Path) -> None:
    """Held-out losses before and after training beside the model's own log-probabilities, in float64 and float32."""
    settings = config(world, tmp_path, objective="dpo", dpo={"beta": 0.3}, quantize=quantize)
    result, model, told = train(settings)
    (prepared,) = run.prepare_all(settings)
    pairs = prepared.held_out.examples
    assert_no_worse(torch.tensor(result.held_out_before), *[torch.tensor(2.0, dtype=d).log() for d in
                                                            (torch.float32, torch.float64)])  # fmt: skip
    exact = dpo_loss(copy.deepcopy(model).double(), pairs, 0.3)
    # Behind a loss stand four sums of log-probabilities.
    sums = torch.tensor(max(abs(line["held_out_logps/chosen"]) for line in told.lines if "held_out_loss" in line))
    found = torch.tensor(result.held_out_after)
    assert_no_worse(found, dpo_loss(model, pairs, 0.3), exact, 4 * sums)
    assert result.held_out_after < 0.9 * result.held_out_before
    assert told.lines[-1]["rewards/margins"] > 0
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}  # TRL makes bfloat16 of them
    assert list(model.peft_config) == ["default"]
    assert not (tmp_path / "adapter" / "ref").exists()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "dora": {"method": "dora"}, "checkpointing": {"gradient_checkpointing": True},
    "ipo": {"dpo": {"loss_type": ["ipo"]}}, "slow layers": {"fast_layers": False}, "bfloat16": {"dtype": "bfloat16"},
    "vera": {"method": "vera", "adapter": {"r": 8}},
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_dpo_resumes_bit_for_bit(option: str, world: Path, tmp_path: Path) -> None:
    class Crash(Exception):
        pass

    def crash(line: dict[str, Any]) -> None:
        if line["step"] == 5:
            raise Crash

    whole, parts = (config(world, tmp_path / n, objective="dpo", **OPTIONS[option]) for n in ("whole", "parts"))
    train(whole)
    with pytest.raises(Crash):
        train(parts, "hf", Lines(crash))
    result, _, _ = train(parts, resume=True)
    assert result.resumed_from == 3
    total = {"num_tokens", "held_out_num_tokens"}  # TRL's count begins anew
    assert written(tmp_path / "parts", *total) == written(tmp_path / "whole", *total)
    assert len({line.get("loss") for line in written(tmp_path / "whole")}) > 3
    for key, tensor in weights(tmp_path / "whole" / "adapter").items():
        assert_same_bits(weights(tmp_path / "parts" / "adapter")[key], tensor)


def test_dpo_stops_early(world: Path, tmp_path: Path) -> None:
    result, _, told = train(config(
        world, tmp_path, objective="dpo", learning_rate=0.5, schedule="constant", eval_every=1, save_every=0,
        max_steps=12, early_stopping_patience=2,
    ))  # fmt: skip
    held_out = told.column("held_out_loss")[1:]
    best = int(held_out.argmin()) + 1
    assert result.steps == best + 2 < 12
    kept = weights(tmp_path / f"checkpoint-{best}")
    for key, tensor in weights(tmp_path / "adapter").items():
        assert_same_bits(tensor, kept[key])


def test_an_adapter_on_the_head_is_refused(world: Path, tmp_path: Path) -> None:
    lora = {"r": 2, "target_modules": ["q_proj", "lm_head"]}
    with pytest.raises(UserError, match=r"objective: dpo: .*lm_head"):
        train(config(world, tmp_path, objective="dpo", lora=lora, quantize="none"))


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_tensorboard_gets_the_losses(objective: str, world: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, _, told = train(config(world, tmp_path, objective=objective, report_to=["tensorboard"]))
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    found = {name: [(e.step, e.value) for e in events.Scalars(f"{name}/loss")] for name in ("train", "eval")}
    for name, key in (("train", "loss"), ("eval", "held_out_loss")):
        expected = [(line["step"], line[key]) for line in told.lines if key in line]
        assert [step for step, _ in found[name]] == [step for step, _ in expected]
        assert torch.equal(torch.tensor([v for _, v in found[name]]), torch.tensor([v for _, v in expected]))


def test_the_command_line_trains_by_preferences_and_generates(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        f"model: {world / 'model'}\ndata: {world / 'pairs.jsonl'}\noutput: {tmp_path / 'run'}\nobjective: dpo\n"
        "max_steps: 2\ndtype: float32\nlora: {r: 4, target_modules: all-linear}\n"
    )
    done = CliRunner().invoke(app, ["train", "--json", str(file), "--trainer", "hf", "dpo.beta=0.2"])
    assert done.exit_code == 0, done.output
    adapter = json.loads(done.stdout)["adapter"]
    assert adapter == str(tmp_path / "run" / "adapter")
    done = CliRunner().invoke(app, ["generate", "--json", "colour 1?", "--adapter", adapter, "--max-new-tokens", "2"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["answers"][0]["tokens"] > 0
