"""The loss by chunks of every described causal family: as good as the model's own, and no tensor of all logits."""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import fastpeft
from fastpeft.apps.training.data import Example
from fastpeft.apps.training.forward import CompletionLoss
from fastpeft.recipes import chunked_loss
from forms import matrix

from peft_kernels.testing import assert_no_worse

_tools = runpy.run_path(str(Path(__file__).with_name("families_tools.py")))
FAMILIES, V, exactly, tiny = (_tools[name] for name in ("FAMILIES", "VOCABULARY", "exactly", "tiny"))
Wide = runpy.run_path(str(Path(__file__).with_name("loss_tools.py")))["Wide"]
F32, BF16 = torch.float32, torch.bfloat16
ROWS, TOKENS = 3, 19
# What makes logits of the head's output, where a random model of the family would leave them as they are.
FACTORS: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 2.0}, "gemma3": {"final_logit_softcapping": 2.0},
    "gemma4": {"final_logit_softcapping": 2.0}, "cohere": {"logit_scale": 0.3}, "cohere2": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 2.5}, "falcon_h1": {"lm_head_multiplier": 0.4},
}  # fmt: skip
for _name, _factors in FACTORS.items():
    FAMILIES[_name][1].update(_factors)
SHORT = {("gemma2", BF16), ("mixtral", F32)}  # a cap; losses of routers


def step(model: Any) -> list[Tensor]:
    """The loss, with that of routers where there is one, and the gradients of embeddings and head."""
    ids = torch.randint(3, V, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :6] = -100
    router = {"output_router_logits": True} if hasattr(model, "router_aux_loss_coef") else {}
    model.zero_grad()
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, **router)
    assert bool(router) == (getattr(output, "aux_loss", None) is not None)
    output.loss.backward()
    return [output.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("name", "dtype"), matrix(
    itertools.product(FAMILIES, (F32, BF16)), lambda name, dtype: (name, dtype) in SHORT
))  # fmt: skip
def test_loss_and_gradients(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By chunks beside the model's own loss, over its own layers and over quicker ones."""
    for chunk, size in (("CHUNK_VOCAB", 16), ("CHUNK_TOKENS", 16), ("WHOLE_TOKENS", 2)):
        monkeypatch.setattr(chunked_loss, chunk, size)
    torch.manual_seed(0)
    model = tiny(name, dtype).train()
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.requires_grad_()
    with exactly(model) as exact_model:
        exact = step(exact_model)
    for layers in (False, True):
        if layers:
            fastpeft.accelerate(model)
        whole = step(model)
        report = fastpeft.accelerate(model, layers=False, loss=True)
        with Wide(V, ROWS * TOKENS) as wide:
            by_chunks = step(model)
        assert wide.seen == set()
        assert report.chunked == 1
        assert not report.whole
        for ours, theirs, right in zip(by_chunks, whole, exact, strict=True):
            worst = [(t.double() - right).abs().max().reshape(1) for t in (ours, theirs)]
            zero = torch.zeros(1, dtype=torch.float64)
            assert_no_worse(worst[0].to(dtype), worst[1].to(dtype), zero, right.abs().max().reshape(1))
        report.remove()
        assert type(model(input_ids=torch.ones(1, 2, dtype=torch.long)).logits) is Tensor


@pytest.mark.parametrize("name", matrix(FAMILIES, ("falcon_h1",)))
def test_training_finds_backbone_head_and_factors(name: str) -> None:
    """`fastpeft train` refuses a model whose logits are others than it computes."""
    torch.manual_seed(0)
    examples = [Example(torch.randint(3, V, (n,)).tolist(), [True] * n) for n in (9, 14)]
    CompletionLoss(tiny(name)).self_check(examples, False, 0, torch.device("cpu"))


def test_factors_are_at_work() -> None:
    """Each of them changes the loss of its family's model."""
    for name, factors in FACTORS.items():
        torch.manual_seed(0)
        model = tiny(name)
        before = step(model.requires_grad_())[0]
        for option in factors:
            setattr(model.config, option, 1.0)
            for module in model.modules():
                if option in module.__dict__:
                    setattr(module, option, 1.0)
        assert not torch.equal(step(model)[0], before), name
