"""The loop on a tiny model: packing, accumulation, checkpointing and resuming change nothing that they should not."""

from __future__ import annotations

import copy
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_tools import interrupted
from fastpeft.apps.training import checkpoints, run
from fastpeft.apps.training.config import TrainConfig, from_dict
from fastpeft.apps.training.data import Example
from fastpeft.apps.training.errors import UserError
from fastpeft.apps.training.forward import CompletionLoss
from fastpeft.apps.training.loop import Trainer
from fastpeft.apps.training.memory import enable_checkpoints
from fastpeft.apps.training.metrics import Silent, read_metrics
from fastpeft.apps.training.optim import learning_rate
from fastpeft.apps.training.packing import collate
from fastpeft.apps.training.testing import make_tiny_run
from fastpeft.apps.training.track import Track
from forms import matrix
from torch import Tensor

from peft_kernels.testing import assert_no_worse, assert_same_bits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("world"), 40)


def config(world: Path, output: Path, **changes: Any) -> TrainConfig:
    values = {
        "model": str(world / "model"), "data": str(world / "data.jsonl"), "output": str(output), "eval_fraction": 0.2,
        "max_length": 64, "batch_size": 2, "dtype": "float32", "max_steps": 10, "learning_rate": 1e-2,
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"},
    }  # fmt: skip
    return from_dict({**values, **changes})


def trainer(settings: TrainConfig, change: Callable[[Any], Any] = lambda model: model) -> Trainer:
    prepared = run.prepare(settings)
    model = change(run.adapted_model(prepared))
    pad = prepared.tokenizer.pad_token_id
    track = Track("default", settings, prepared.train.examples, prepared.held_out.examples, pad)
    return Trainer(settings, model, [track], pad, CPU, Silent())


def adapter_gradients(t: Trainer, batches: list[list[list[Example]]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(summed loss, all adapter gradients in one vector) over batches of rows of examples, in ``dtype``."""
    model = copy.deepcopy(t.model).to(dtype).eval()
    for p in model.parameters():
        if p.requires_grad and not p.any():  # B starts at zero, which would hide A's gradient
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    loss = CompletionLoss(model, 64, 32)
    total = torch.stack([loss(collate(rows, t.pad_id)) for rows in batches]).sum()
    total.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert len(gradients) == sum(p.requires_grad for p in model.parameters())
    return total.detach(), torch.cat(gradients)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_packed_equals_unpacked(world: Path, tmp_path: Path, quantize: str) -> None:
    """One row of three examples gives the loss and the gradients of three rows, and of three separate batches."""
    t = trainer(config(world, tmp_path, quantize=quantize))
    three = list(t.tracks[0].examples[:3])
    assert len({len(e) for e in three}) > 1
    layouts = {"packed": [[three]], "padded": [[[e] for e in three]], "alone": [[[e]] for e in three]}
    exact = adapter_gradients(t, layouts["alone"], torch.float64)
    eager = adapter_gradients(t, layouts["alone"], torch.float32)
    scale = exact[1].abs().max().expand_as(exact[1])
    for name in ("packed", "padded"):
        for dtype, best in ((torch.float64, exact), (torch.float32, eager)):
            loss, gradients = adapter_gradients(t, layouts[name], dtype)
            assert_no_worse(loss, best[0], exact[0], exact[0] * 10)
            assert_no_worse(gradients, best[1], exact[1], scale * 10)


def test_self_check_finds_attention_across_examples(world: Path, tmp_path: Path) -> None:
    t = trainer(config(world, tmp_path))
    t.loss.self_check(t.tracks[0].examples, True, t.pad_id, CPU)
    backbone = t.loss.backbone

    def crossing(**inputs: Any) -> Any:  # a model that ignores where examples begin
        positions = torch.arange(inputs["input_ids"].shape[1])[None].expand_as(inputs["input_ids"])
        return backbone(**{**inputs, "position_ids": positions})

    t.loss.backbone = crossing
    with pytest.raises(UserError, match="attention of this model crosses examples; set packing=false"):
        t.loss.self_check(t.tracks[0].examples, True, t.pad_id, CPU)
    t.loss.self_check(t.tracks[0].examples, False, t.pad_id, CPU)


def test_self_check_finds_logits_that_are_changed(world: Path, tmp_path: Path) -> None:
    t = trainer(config(world, tmp_path))
    t.loss.scale = 0.5
    with pytest.raises(UserError, match="over the model's logits"):
        t.loss.self_check(t.tracks[0].examples, False, t.pad_id, CPU)


def first_step(t: Trainer) -> tuple[dict[str, Any], list[Tensor]]:
    """The first step's line, and the gradients that the optimizer was given."""
    (track,) = t.tracks
    track.start(t.model)
    seen: list[Tensor] = []
    track.optimizer.register_step_pre_hook(
        lambda o, *_: seen.extend(p.grad.clone() for g in o.param_groups for p in g["params"] if p.grad is not None)
    )
    t.model.train()
    torch.manual_seed(5)
    return t._step(0, [track])[0], seen


def test_accumulation_weights_by_tokens(world: Path, tmp_path: Path) -> None:
    """Six passes of one row give the gradient of one pass of six rows, though their lengths differ."""
    common = {
        "packing": False,
        "quantize": "none",
        "lora": {"r": 4, "target_modules": "all-linear"},
        "max_grad_norm": 0.0,
    }
    together = trainer(config(world, tmp_path, batch_size=6, **common))
    apart = trainer(config(world, tmp_path, batch_size=1, gradient_accumulation=6, **common))
    rows = [row for rows in together.tracks[0].plan.step(0)[1] for row in rows]
    assert rows == [row for rows in apart.tracks[0].plan.step(0)[1] for row in rows]
    assert len({apart.tracks[0].examples[row[0]].learned for row in rows}) > 1
    one, six = first_step(together), first_step(apart)
    assert one[0]["learned_tokens"] == six[0]["learned_tokens"]
    exact = first_step(trainer(config(world, tmp_path, batch_size=6, **common), lambda m: m.to(torch.float64)))
    assert_no_worse(torch.tensor(six[0]["loss"]), torch.tensor(one[0]["loss"]), torch.tensor(exact[0]["loss"]))
    for a, b, best in zip(six[1], one[1], exact[1], strict=True):
        assert_no_worse(a, b, best, best.abs().max().expand_as(best) * 10)


def test_gradient_checkpointing_changes_no_bit(world: Path, tmp_path: Path) -> None:
    """With dropout: the recomputation drops the same elements; of all layers, and of one of two."""
    plain = trainer(config(world, tmp_path / "a", max_steps=3))
    plain.run()
    for keeps, checkpointed in ((0.0, [True, True]), (0.5, [True, False])):
        where = tmp_path / str(keeps)
        saving = trainer(config(world, where, max_steps=3, gradient_checkpointing=True, checkpointing_keeps=keeps))
        saving.run()
        layers = saving.loss.base.model.layers
        assert sorted((layer.gradient_checkpointing for layer in layers), reverse=True) == checkpointed
        assert losses(tmp_path / "a") == losses(where)
        for a, b in zip(plain.model.parameters(), saving.model.parameters(), strict=True):
            assert_same_bits(a, b)


def test_shares_of_layers_that_are_none_are_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpointing_keeps: expected a share .* below 1, got 36"):
        config(world, tmp_path, gradient_checkpointing=True, checkpointing_keeps=36)
    with pytest.raises(UserError, match=r"checkpointing_keeps=0\.36 without gradient_checkpointing"):
        config(world, tmp_path, checkpointing_keeps=0.36)
    some = config(world, tmp_path, gradient_checkpointing=True, checkpointing_keeps=0.36)
    nothing = dict.fromkeys(("gradient_checkpointing_enable", "disable_input_require_grads"), lambda **_: None)
    base = types.SimpleNamespace(**nothing, modules=list)
    with pytest.raises(UserError, match=r"checkpointing_keeps: .* has no layers that checkpoint themselves"):
        enable_checkpoints(some, base)


def losses(folder: Path) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "held_out_loss", "lr", "grad_norm", "tokens", "learned_tokens")
    return [tuple(line.get(k) for k in keys) for line in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
def test_resuming_continues_bit_for_bit(world: Path, tmp_path: Path, optimizer: str) -> None:
    """Ten steps at once, and ten interrupted in the eighth after checkpoints at 3 and 6: the same lines and bits."""
    settings = {"optimizer": optimizer, "save_every": 3, "eval_every": 4}
    whole = trainer(config(world, tmp_path / "whole", **settings))
    whole.run()
    interrupted(trainer(config(world, tmp_path / "broken", **settings)), 8)
    assert [p.name for p in checkpoints.numbered(tmp_path / "broken")] == ["checkpoint-3", "checkpoint-6"]
    torch.manual_seed(99)  # whatever the state is, the checkpoint's counts
    resumed = trainer(config(world, tmp_path / "broken", **settings))
    result = resumed.run(resume=True)["default"]
    assert result.resumed_from == 6
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 11
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert_same_bits(a, b)


def test_resuming_passes_over_a_damaged_checkpoint(world: Path, tmp_path: Path) -> None:
    settings = config(world, tmp_path, save_every=3, max_steps=6)
    trainer(settings).run()
    weights = tmp_path / "checkpoint-6" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    before = losses(tmp_path)
    assert trainer(settings).run(resume=True)["default"].resumed_from == 3
    assert losses(tmp_path) == before


def test_resuming_refuses_other_data_and_optimizers_and_takes_other_settings(world: Path, tmp_path: Path) -> None:
    trainer(config(world, tmp_path, max_steps=2)).run()
    with pytest.raises(UserError, match="was written with other data or another layout"):
        trainer(config(world, tmp_path, max_steps=4, seed=1)).run(resume=True)
    with pytest.raises(UserError, match="holds the checkpoints of an earlier run"):
        trainer(config(world, tmp_path, max_steps=4)).run()
    with pytest.raises(UserError, match="was written with another optimizer"):
        trainer(config(world, tmp_path, max_steps=4, optimizer="sgd")).run(resume=True)
    other = trainer(config(world, tmp_path, max_steps=3, weight_decay=0.25))
    other.run(resume=True)
    assert {group["weight_decay"] for group in other.tracks[0].optimizer.param_groups} == {0.25}


def test_resuming_a_finished_run_trains_nothing(world: Path, tmp_path: Path) -> None:
    trainer(config(world, tmp_path, max_steps=2)).run()
    before = losses(tmp_path)
    again = trainer(config(world, tmp_path, max_steps=2)).run(resume=True)["default"]
    assert again.tokens == 0
    assert f"{again.held_out_before:.6g}" == f"{before[0][2]:.6g}"
    assert f"{again.held_out_after:.6g}" == f"{before[-1][2]:.6g}" != f"{again.held_out_before:.6g}"
    assert losses(tmp_path) == before


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "rmsprop", "adafactor"])
def test_every_optimizer_learns(world: Path, tmp_path: Path, optimizer: str) -> None:
    rate = {"sgd": 10.0, "adafactor": 0.5, "rmsprop": 1e-3}.get(optimizer, 1e-2)
    result = trainer(config(world, tmp_path, optimizer=optimizer, learning_rate=rate, quantize="none")).run()["default"]
    assert result.held_out_after is not None
    assert result.held_out_before is not None
    assert result.held_out_after < 0.985 * result.held_out_before


@pytest.mark.parametrize("optimizer", matrix(["adamw_8bit", "lion_8bit"], short=("adamw_8bit",)))
def test_eight_bit_optimizers_resume_exactly(world: Path, tmp_path: Path, optimizer: str) -> None:
    """With states of 8 bits: what has at least 4096 elements."""
    pytest.importorskip("bitsandbytes")
    given: dict[str, Any] = {"optimizer": optimizer, "learning_rate": 1e-3, "lora": {"r": 64}, "save_every": 2}
    whole = trainer(config(world, tmp_path / "whole", max_steps=4, **given))
    whole.run()
    states = whole.tracks[0].optimizer.state.values()
    assert any(state["state1"].dtype is torch.uint8 for state in states)
    interrupted(trainer(config(world, tmp_path / "parts", max_steps=4, **given)), at=3)
    trainer(config(world, tmp_path / "parts", max_steps=4, **given)).run(resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_paged_optimizer_is_for_a_gpu(world: Path, tmp_path: Path) -> None:
    t = trainer(config(world, tmp_path, optimizer="paged_adamw_8bit"))
    with pytest.raises(UserError, match="memory, and the model is in the host's; use optimizer=adamw_8bit"):
        t.run()


def test_learning_rate_of_b_can_differ(world: Path, tmp_path: Path) -> None:
    t = trainer(config(world, tmp_path, lora_plus_ratio=16.0))
    t.tracks[0].start(t.model)
    groups = {group["scale"]: len(group["params"]) for group in t.tracks[0].optimizer.param_groups}
    assert groups == {1.0: 14, 16.0: 14}


def test_a_trained_head_takes_the_wrapped_path(world: Path, tmp_path: Path) -> None:
    """LoRA on lm_head: its loss is that over the model's own logits (self_check), and its tensors get gradients."""
    lora = {"r": 2, "target_modules": ["q_proj", "lm_head"]}
    t = trainer(config(world, tmp_path, lora=lora, max_steps=2, quantize="none"))
    assert type(t.loss.head) is not torch.nn.Linear
    t.run()
    moved = [n for n, p in t.model.named_parameters() if "lm_head" in n and "lora_B" in n and p.any()]
    assert len(moved) == 1


def test_divergence_is_one_clear_line(world: Path, tmp_path: Path) -> None:
    t = trainer(config(world, tmp_path))
    with torch.no_grad():
        next(p for p in t.model.parameters() if p.requires_grad).fill_(float("nan"))
    t.loss.self_check = lambda *_: None  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"step 1: the loss is nan .* training diverged"):
        t.run()


def test_metrics_have_a_line_a_step(world: Path, tmp_path: Path) -> None:
    trainer(config(world, tmp_path, max_steps=4, eval_every=2)).run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 2, 4]
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "peak_memory_mb"} <= set(lines[1])


def test_schedules() -> None:
    def rates(**settings: Any) -> list[float]:
        made = TrainConfig(model="m", data="d", learning_rate=1.0, **settings)
        return [learning_rate(made, step, 20) for step in range(20)]

    assert rates(schedule="constant", warmup=0.0) == [1.0] * 20
    warm = rates(schedule="constant", warmup=4)
    assert warm[:4] == [0.2, 0.4, 0.6, 0.8]
    assert set(warm[4:]) == {1.0}
    assert rates(schedule="constant", warmup=0.2) == warm
    for schedule in ("linear", "cosine", "inverse_sqrt"):
        falling = rates(schedule=schedule, warmup=0.1, min_lr_ratio=0.05)
        assert max(falling) == 1.0
        assert falling[2:] == sorted(falling[2:], reverse=True)
        assert min(falling[2:]) >= 0.05
    stable = rates(schedule="wsd", warmup=0.0, decay=0.25)
    assert stable[:16] == [1.0] * 16
    assert stable[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2])
