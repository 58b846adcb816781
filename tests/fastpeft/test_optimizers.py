"""LoRA+, LoRA-FA and Riemannian preconditioning: the steps that PEFT's make."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import fastpeft
import fastpeft.recipes.optimizers
import peft
import peft.optimizers
import peft.optimizers.lorafa
import pytest
import torch
from torch import nn

tools = runpy.run_path(str(Path(__file__).with_name("init_tools.py")))
X, model, wrap, tensors = (tools[name] for name in ("X", "model", "wrap", "tensors"))
assert_near = tools["assert_near"]
LIBRARIES = (fastpeft, peft)
STEPS = 4


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 24)
        self.norm = nn.LayerNorm(24)
        self.body = model()

    def forward(self, ids: Any) -> Any:
        return self.body(self.norm(self.words(ids)))


IDS = torch.arange(22).remainder(11).view(2, 11)


def words(library: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    adapted = wrap(library, Words(), target_modules=["words", "first", "second"], init_lora_weights=False, **options)
    adapted.base_model.model.norm.requires_grad_(True)
    return adapted


def steps(adapted: Any, optimizer: Any, x: Any = IDS, count: int = STEPS) -> dict[str, torch.Tensor]:
    for _ in range(count):
        optimizer.zero_grad()
        adapted(x).square().mean().backward()
        optimizer.step()
    return tensors(adapted)


def assert_same_steps(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], growth: float = STEPS) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert_near(ours[key], theirs[key], growth)


@pytest.mark.parametrize("options", [{}, {"loraplus_weight_decay": 0.3, "loraplus_lr_embedding": 1e-3, "eps": 1e-6}])
def test_lora_plus(options: dict[str, Any]) -> None:
    results, groups = [], []
    for lib in LIBRARIES:
        adapted = words(lib)
        optimizer = lib.optimizers.create_loraplus_optimizer(
            adapted, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4.0, **options
        )
        groups.append([(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups])
        results.append(steps(adapted, optimizer))
    assert groups[0] == groups[1]
    assert_same_steps(*results)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 3}, {"rank_pattern": {"second": 2}}])
def test_lora_fa(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)
    results = []
    for lib in LIBRARIES:
        adapted = wrap(lib, model(), init_lora_weights=False, **options)
        before = adapted.base_model.model.first.lora_A["default"].weight.detach().clone()
        optimizer = lib.optimizers.create_lorafa_optimizer(adapted, r=4, lora_alpha=8, lr=1e-2, weight_decay=0.1)
        results.append(steps(adapted, optimizer, X))
        assert torch.equal(adapted.base_model.model.first.lora_A["default"].weight, before)
    assert_same_steps(*results)
    assert any(
        (results[0][key] != value).any()
        for key, value in tensors(wrap(fastpeft, model(), init_lora_weights=False, **options)).items()
    )


def test_lora_fa_rounds_less_than_peft() -> None:
    """PEFT projects in bfloat16 whatever the adapter's dtype; the directions agree to that precision."""
    results = []
    for lib in LIBRARIES:
        adapted = wrap(lib, model(), init_lora_weights=False)
        optimizer = lib.optimizers.create_lorafa_optimizer(adapted, 4, 4, lr=1e-3)
        results.append(steps(adapted, optimizer, X, 1))
    assert_same_steps(*results, torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps)


def test_lora_fa_leaves_nothing_out() -> None:
    """DoRA's magnitude, embeddings and what else is trained get plain steps; PEFT pairs them wrongly."""
    adapted = words(fastpeft, use_dora=True)
    before = tensors(adapted)
    optimizer = fastpeft.recipes.optimizers.create_lorafa_optimizer(adapted, 4, 4, lr=1e-2)
    after = steps(adapted, optimizer)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("magnitude" in key for key in changed)
    assert not any("lora_A" in key for key in changed)


def test_lora_fa_resumes_from_its_state() -> None:
    made = []
    for resumed in (False, True):
        adapted = wrap(fastpeft, model(), init_lora_weights=False)
        optimizer = fastpeft.recipes.optimizers.create_lorafa_optimizer(adapted, 4, 4, lr=1e-2)
        steps(adapted, optimizer, X, 2)
        if resumed:
            state = optimizer.state_dict()
            optimizer = fastpeft.recipes.optimizers.create_lorafa_optimizer(adapted, 4, 4, lr=1.0)
            optimizer.load_state_dict(state)
        made.append(steps(adapted, optimizer, X, 2))
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])


def test_lora_fa_s_use_rslora_is_what_the_configuration_says() -> None:
    adapted = wrap(fastpeft, model(), use_rslora=True)
    with pytest.raises(ValueError, match="say otherwise"):
        fastpeft.recipes.optimizers.create_lorafa_optimizer(adapted, 4, 4, lr=1e-2, use_rslora=False)
    with pytest.warns(FutureWarning):
        fastpeft.recipes.optimizers.create_lorafa_optimizer(adapted, 4, 4, lr=1e-2, use_rslora=True)


@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("reg", [1e-2, 1.0])
def test_riemannian(optimizer_cls: Any, reg: float) -> None:
    results = []
    for lib in LIBRARIES:
        adapted = words(lib)
        optimizer = lib.optimizers.create_riemannian_optimizer(adapted, optimizer_cls, lr=1e-2, reg=reg)
        assert isinstance(optimizer, optimizer_cls)
        results.append(steps(adapted, optimizer))
    assert_same_steps(*results)


def test_riemannian_refuses_what_it_cannot_do() -> None:
    adapted = wrap(fastpeft, model())
    create = fastpeft.recipes.optimizers.create_riemannian_optimizer
    with pytest.raises(ValueError, match="closures"):
        create(adapted, torch.optim.SGD, lr=1e-2).step(lambda: 0.0)
    with pytest.raises(ValueError, match="inside its step"):
        create(adapted, torch.optim.LBFGS, lr=1e-2)
    with pytest.raises(TypeError, match="subclass"):
        create(adapted, dict, lr=1e-2)
    with pytest.raises(ValueError, match="no trainable pair"):
        create(model(), torch.optim.SGD, lr=1e-2)


@pytest.mark.parametrize(("name", "options"), [
    ("lr", {"lr": -1.0}), ("beta", {"betas": (1.0, 0.9)}), ("epsilon", {"eps": -1.0}),
])  # fmt: skip
def test_lora_fa_s_own_arguments(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Invalid"):
        fastpeft.recipes.optimizers.LoraFAOptimizer([nn.Parameter(torch.ones(1))], **options)
