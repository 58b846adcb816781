"""Adapters on weights that a module reads for itself: attention projections, experts, parameters by name."""

from __future__ import annotations

import copy
import pickle
import runpy
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft.layer.layer import AdapterLayer
from torch import Tensor, nn

from peft_kernels.testing import assert_same_bits

close = runpy.run_path(str(Path(__file__).with_name("peft_tools.py")))["close"]


class Experts(nn.Module):
    """A mixture of three experts whose weights are stacks; transposed: [E, in, out], else [E, out, in]."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        shapes = ((3, 8, 12), (3, 12, 6)) if transposed else ((3, 12, 8), (3, 6, 12))
        self.gate_up, self.down = (nn.Parameter(torch.randn(s) * 0.3) for s in shapes)

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w if self.is_transposed else w.transpose(1, 2) for w in (self.gate_up, self.down))
        return ((x @ up).tanh() @ down).sum(0)


class Model(nn.Module):
    def __init__(self, transposed: bool = False, batch_first: bool = True) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"experts": Experts(transposed)})
        self.mid = nn.Linear(6, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(self.mlp["experts"](x))[None]
        return self.attn(h, h, h, need_weights=False)[0]


PARAMETERS = ["experts.gate_up", "experts.down", "mid.weight"]
CASES: list[dict[str, Any]] = [
    {"r": 2, "target_parameters": PARAMETERS},
    {"r": 3, "target_parameters": PARAMETERS[:1], "use_rslora": True, "target_modules": ["mid"]},
    {"r": 2, "target_parameters": PARAMETERS[1:], "rank_pattern": {"mid.weight": 4}, "alpha_pattern": {"down": 3}},
    {"r": 4, "lora_alpha": 6, "target_modules": ["attn"]},
    {"r": 2, "target_modules": ["attn", "mid"], "target_parameters": PARAMETERS[:2], "init_lora_weights": "gaussian"},
]


def pair(options: dict[str, Any], transposed: bool = False) -> tuple[Any, Any, Tensor]:
    """(our model, PEFT's, x) with the same random adapters."""
    torch.manual_seed(0)
    base = Model(transposed)
    with torch.no_grad():
        base.attn.in_proj_bias.normal_()
    x = torch.randn(5, 8)
    torch.manual_seed(1)
    ours = fastpeft.get_peft_model(copy.deepcopy(base), fastpeft.LoraConfig(**options))
    torch.manual_seed(1)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
    for (a, p), (b, q) in zip(named(ours), named(theirs), strict=True):
        assert a == b
        with torch.no_grad():
            p.add_(torch.randn_like(p) * 0.2)
            q.copy_(p)
    return ours, theirs, x


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("options", CASES)
def test_outputs_gradients_merges_and_keys_are_pefts(options: dict[str, Any], transposed: bool) -> None:
    ours, theirs, x = pair(options, transposed)
    ours, theirs, x = ours.double(), theirs.double(), x.double()  # so that only a wrong formula can fail
    y, z = ours(x), theirs(x)
    close(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    grads = {n: p.grad for n, p in named(ours)}
    for n, q in named(theirs):
        # PEFT adds the update of an attention's out_proj twice, the second time out of sight of autograd.
        close(grads[n] / (2 if "out_proj" in n else 1), q.grad)
        assert grads[n].abs().max() > 0
    assert fastpeft.get_peft_model_state_dict(ours).keys() == peft.get_peft_model_state_dict(theirs).keys()
    before = {n: p.clone() for n, p in ours.named_parameters()}
    ours.merge_adapter(safe_merge=True)
    close(ours(x), y)
    ours.unmerge_adapter()
    for n, p in ours.named_parameters():
        assert_same_bits(p, before[n])
    with ours.disable_adapter():
        close(ours(x), _base(ours)(x))
    merged = ours.merge_and_unload()
    assert not any(isinstance(m, AdapterLayer) for m in merged.modules())
    close(merged(x), y)


def _base(model: Any) -> nn.Module:
    return copy.deepcopy(model).unload()


@pytest.mark.parametrize("options", CASES)
def test_files_go_both_ways(options: dict[str, Any], tmp_path: Any) -> None:
    ours, theirs, x = pair(options)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    y = ours(x).detach()
    base = _base(ours)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    close(again(x), y)
    for low in (False, True):
        here = fastpeft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", low_cpu_mem_usage=low)
        close(here(x), y)


def test_two_adapters_compose_and_come_and_go() -> None:
    ours, _, x = pair(CASES[4])
    one = ours(x).detach()
    torch.manual_seed(5)
    ours.add_adapter("second", fastpeft.LoraConfig(**{**CASES[4], "r": 3, "init_lora_weights": False}))
    assert_same_bits(ours(x), one)
    ours.base_model.set_adapter(["default", "second"])
    both = ours(x).detach()
    assert not torch.equal(both, one)
    ours.merge_adapter()
    close(ours(x), both)
    ours.unmerge_adapter()
    ours.delete_adapter("second")
    assert_same_bits(ours(x), one)
    clone = pickle.loads(pickle.dumps(ours))
    assert_same_bits(clone(x), one)


def test_rows_of_a_mixed_batch_share_one_adapter_there() -> None:
    """Whatever is first in the module's input: experts see tokens."""

    class Flat(Model):
        def forward(self, x: Tensor) -> Tensor:
            return self.mid(self.mlp["experts"](x.flatten(0, 1)).view(*x.shape[:2], 6))

    model = fastpeft.get_peft_model(Flat(), fastpeft.LoraConfig(target_modules=["mid"], init_lora_weights=False), "mid")
    options = {"target_parameters": PARAMETERS[:2], "init_lora_weights": False}
    model.add_adapter("experts", fastpeft.LoraConfig(**options))
    model.eval()
    x = torch.randn(3, 5, 8)
    with model.disable_adapter():
        base = model(x)
    alone = {}
    for name in ("mid", "experts"):
        model.set_adapter(name)
        alone[name] = model(x)
    mixed = model(x, adapter_names=["mid", "__base__", "mid"])
    for i, expected in enumerate((alone["mid"], base, alone["mid"])):
        close(mixed[i], expected[i])
    close(model(x, adapter_names=["experts"] * 3), alone["experts"])
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        model(x, adapter_names=["mid", "experts", "mid"])


def test_an_encoder_layer_does_not_pass_the_adapter_over_in_eval() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    config = fastpeft.LoraConfig(r=2, target_modules=["self_attn"], init_lora_weights=False)
    model = fastpeft.get_peft_model(nn.Sequential(layer), config).eval()
    with torch.no_grad():
        fast = model(x)
    close(fast, model(x).detach())
    assert not torch.equal(fast, _base(model)(x))


def test_checkpointing_and_half_precision() -> None:
    from torch.utils.checkpoint import checkpoint

    ours, _, x = pair(CASES[4])
    x.requires_grad_()
    plain = torch.autograd.grad(ours(x).sum(), [p for _, p in named(ours)])
    again = torch.autograd.grad(checkpoint(ours, x, use_reentrant=False).sum(), [p for _, p in named(ours)])
    for a, b in zip(plain, again, strict=True):
        assert_same_bits(a, b)
    half = fastpeft.get_peft_model(Model().bfloat16(), fastpeft.LoraConfig(**CASES[4]))
    assert {p.dtype for _, p in named(half)} == {torch.float32}
    assert half(x.detach().bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": ["experts.nothing"]}, "no parameter"),
        ({"target_parameters": ["mid.bias"]}, "1 dimensions"),
        ({"target_parameters": ["mid.weight"], "target_modules": ["mid"]}, "leave one of the two out"),
        ({"target_parameters": ["mid.weight"], "lora_dropout": 0.1}, "lora_dropout=0.1 cannot act"),
        ({"target_parameters": ["experts.down"], "lora_bias": True}, "lora_bias"),
        ({"target_modules": ["attn.out_proj"]}, "target the attention itself"),
        ({"target_modules": ["attn"], "lora_dropout": 0.1}, "lora_dropout=0.1 cannot act"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = Model()
    before = [(n, id(m)) for n, m in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        fastpeft.get_peft_model(model, fastpeft.LoraConfig(**options))
    assert [(n, id(m)) for n, m in model.named_modules()] == before


def test_other_parameters_for_a_second_adapter_are_refused() -> None:
    ours, _, x = pair(CASES[0])
    y = ours(x)
    with pytest.raises(ValueError, match="same parameters"):
        ours.add_adapter("b", fastpeft.LoraConfig(target_parameters=["experts.down"]))
    assert_same_bits(ours(x), y)


@pytest.mark.parametrize("options", CASES[2:], ids=str)
def test_merged_adapters_that_are_off_leave_the_base(options: dict[str, Any]) -> None:
    ours, _, x = pair(options)
    found = []
    for _ in range(2):
        with ours.disable_adapter():
            found.append(ours(x))
        ours.merge_adapter()
    assert_same_bits(*found)


def test_attention_with_other_key_widths_is_refused() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=6))
    with pytest.raises(ValueError, match="kdim"):
        fastpeft.get_peft_model(model, fastpeft.LoraConfig(target_modules=["0"]))
