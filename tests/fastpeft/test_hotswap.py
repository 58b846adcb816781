"""`utils.hotswap`: one adapter's values in place of another's, against PEFT's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft.utils import hotswap
from peft.utils import hotswap as peft_hotswap
from torch import Tensor, nn

from peft_kernels.testing import assert_no_worse, assert_same_bits

TARGETS = ["one", "conv", "emb"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(9, 12)
        self.one = nn.Linear(12, 16)
        self.conv = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.two = nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.one(self.emb(ids))).unflatten(-1, (4, 2, 2))
        return self.two(self.conv(h.flatten(0, 1)).flatten(1))


IDS = torch.arange(8).view(2, 4)


def make(library: Any, seed: int, targets: list[str] | None = None, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = library.LoraConfig(target_modules=targets or TARGETS, init_lora_weights=False, **options)
    return library.get_peft_model(Net(), config).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """Folders of adapters, made with PEFT."""

    def save(name: str, seed: int, **options: Any) -> Path:
        make(peft, seed, **options).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def output(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS)  # type: ignore[no-any-return]


def assert_outputs(actual: Tensor, expected: Tensor) -> None:
    assert_no_worse(actual, expected, expected.double(), 8 * expected.abs().mean().expand(expected.shape))


OTHERS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 8},
    {"r": 4, "lora_alpha": 3},
    {"r": 2, "lora_alpha": 3},
    {"r": 6, "lora_alpha": 7},
    {"r": 4, "lora_alpha": 5, "rank_pattern": {"one": 2}},
    {"r": 4, "lora_alpha": 5, "targets": ["one", "emb"]},
]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_the_swapped_adapter_is_the_other_one(other: dict[str, Any], saved: Any) -> None:
    folder = saved("new", 2, **other)
    ours = make(fastpeft, 1, r=4, lora_alpha=8)
    output(ours)  # so that layers hold their plans
    tensors = {n: p for n, p in ours.named_parameters() if "lora_" in n}
    hotswap.hotswap_adapter(ours, folder, "default")
    assert_outputs(output(ours), output(fastpeft.PeftModel.from_pretrained(Net(), folder)))
    for name, parameter in ours.named_parameters():
        assert name not in tensors or tensors[name] is parameter


@pytest.mark.parametrize("other", OTHERS[:4], ids=str)  # PEFT passes over rank_pattern
def test_a_swap_gives_what_pefts_gives(other: dict[str, Any], saved: Any) -> None:
    targets = ["one", "conv"]  # PEFT cannot swap embeddings
    folder = saved("new", 2, targets=targets, **other)
    ours, theirs = (make(library, 1, targets=targets, r=4, lora_alpha=8) for library in (fastpeft, peft))
    hotswap.hotswap_adapter(ours, folder, "default")
    peft_hotswap.hotswap_adapter(theirs, str(folder), "default", torch_device="cpu")
    assert_outputs(output(ours), output(theirs))
    values = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_same_bits(parameter, values[name])


def test_a_swap_from_a_state_dict(saved: Any) -> None:
    new = make(fastpeft, 2, r=4, lora_alpha=2)
    state = {n: p.data.clone() for n, p in new.named_parameters() if "lora_" in n}
    ours = make(fastpeft, 1, r=4, lora_alpha=8)
    hotswap.hotswap_adapter_from_state_dict(ours, state, "default", new.peft_config["default"])
    assert_same_bits(output(ours), output(new))
    layer = ours.base_model.model.one
    layer.set_scale("default", 2.0)
    assert layer.scaling["default"] == 1.0  # twice what the new adapter's alpha gives
    injected = Net()
    fastpeft.inject_adapter_in_model(fastpeft.LoraConfig(r=4, target_modules=TARGETS), injected)
    bare = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    hotswap.hotswap_adapter_from_state_dict(injected, bare, "default", new.peft_config["default"])
    assert_same_bits(output(injected), output(new))


@pytest.mark.parametrize("rank", [4, 6])
def test_prepared_models_compute_the_same_and_keep_their_shapes(rank: int, saved: Any) -> None:
    models = [make(library, 1, r=4, lora_alpha=8) for library in (fastpeft, peft)]
    before = output(models[0])
    for model, module in zip(models, (hotswap, peft_hotswap), strict=True):
        module.prepare_model_for_compiled_hotswap(model, target_rank=rank, config=model.peft_config)
    ours, theirs = models
    assert_outputs(output(ours), before)
    assert ours.peft_config["default"].r == theirs.peft_config["default"].r == rank
    shapes = {n: p.shape for n, p in ours.named_parameters()}
    assert shapes["base_model.model.one.lora_A.default.weight"] == (rank, 12)
    assert shapes["base_model.model.emb.lora_embedding_A.default"] == (rank, 9)  # which PEFT leaves
    assert shapes["base_model.model.conv.lora_B.default.weight"] == (8, rank // 2, 1, 1)
    scaling = ours.base_model.model.one.scaling["default"]
    for folder in (saved("a", 2, r=2, lora_alpha=3), saved("b", 3, r=4, lora_alpha=9)):
        hotswap.hotswap_adapter(ours, folder, "default")
        assert_outputs(output(ours), output(fastpeft.PeftModel.from_pretrained(Net(), folder)))
        assert {n: p.shape for n, p in ours.named_parameters()} == shapes
        assert ours.base_model.model.one.scaling["default"] is scaling


def test_compiled_models_are_not_compiled_again(saved: Any) -> None:
    import torch._dynamo.testing

    ours = make(fastpeft, 1, targets=["one"], r=4, lora_alpha=8)
    hotswap.prepare_model_for_compiled_hotswap(ours, target_rank=6)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend=counter)
    output(compiled)
    compilations = counter.frame_count
    assert compilations
    for folder in (saved("a", 2, targets=["one"], r=2), saved("b", 3, targets=["one"], r=6, lora_alpha=3)):
        hotswap.hotswap_adapter(compiled, folder, "default")
        assert_outputs(output(compiled), output(fastpeft.PeftModel.from_pretrained(Net(), folder)))
    assert counter.frame_count == compilations
    with pytest.raises(ValueError, match="before"):
        hotswap.prepare_model_for_compiled_hotswap(compiled)
    with pytest.warns(UserWarning, match="already compiled"):
        hotswap.prepare_model_for_compiled_hotswap(compiled, check_compiled="warn")
    with pytest.raises(ValueError, match="check_compiled"):
        hotswap.prepare_model_for_compiled_hotswap(compiled, check_compiled="x")  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused_and_changes_nothing(saved: Any, tmp_path: Path) -> None:
    ours = make(fastpeft, 1, r=4, lora_alpha=8)
    before = output(ours)
    with pytest.raises(ValueError, match="for use_rslora, False != True"):
        hotswap.hotswap_adapter(ours, saved("a", 2, use_rslora=True, r=4), "default")
    with pytest.raises(RuntimeError, match=r"unexpected keys found: .*two"):
        hotswap.hotswap_adapter(ours, saved("b", 2, targets=["one", "two"], r=4), "default")
    with pytest.raises(ValueError, match="'other' not found"):
        hotswap.hotswap_adapter(ours, saved("c", 2, r=4), "other")
    ia3 = peft.get_peft_model(Net(), peft.IA3Config(target_modules=["one"], feedforward_modules=[]))
    ia3.save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LORA and IA3"):
        hotswap.hotswap_adapter(ours, tmp_path / "ia3", "default")
    config = fastpeft.IA3Config(target_modules=["one"], feedforward_modules=[])
    with pytest.raises(ValueError, match=r"only supports .* but IA3 was passed"):
        hotswap.check_hotswap_configs_compatible(config, config)
    key = "base_model.model.one.lora_A.default.weight"
    state = {key: torch.zeros(4, 13)}
    with pytest.raises(RuntimeError, match="Incompatible shapes"):
        hotswap.hotswap_adapter_from_state_dict(ours, state, "default", ours.peft_config["default"])
    assert_same_bits(output(ours), before)
    with pytest.raises(ValueError, match="original rank is larger"):
        hotswap.prepare_model_for_compiled_hotswap(ours, target_rank=2)
    with pytest.raises(ValueError, match="not divisible"):
        hotswap.prepare_model_for_compiled_hotswap(ours, target_rank=7)
    with pytest.raises(ValueError, match="No adapter layers found"):
        hotswap.prepare_model_for_compiled_hotswap(Net())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linear = make(fastpeft, 1, targets=["one"], r=4)
        linear.merge_adapter()
        with pytest.raises(ValueError, match="currently merged"):
            hotswap.hotswap_adapter(linear, saved("d", 2, targets=["one"], r=4), "default")
