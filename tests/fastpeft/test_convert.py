"""convert_to_lora and save_as_lora: every method with a merged form as a LoRA, here and in PEFT."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft.config.types import PeftWarning
from fastpeft.methods.method import Method
from fastpeft.methods.registry import registry
from fastpeft.model.merge_math import svd_of_product
from torch import Tensor, nn

tools = runpy.run_path(str(Path(__file__).with_name("init_tools.py")))
assert_near = tools["assert_near"]
X = torch.arange(12).view(3, 4)

pytestmark = pytest.mark.filterwarnings("ignore::fastpeft.config.types.PeftWarning", "ignore::UserWarning")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(31, 24)
        self.lin = nn.Linear(24, 20)
        self.sub = nn.ModuleDict({"lin": nn.Linear(20, 24, bias=False)})
        self.conv = nn.Conv1d(24, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.sub["lin"](torch.tanh(self.lin(self.emb(ids))))
        return self.head(torch.tanh(self.conv(h.transpose(-1, -2)).transpose(-1, -2)))


def net() -> Net:
    """In float64, so that what is compared agrees to float32's resolution if it is the same."""
    torch.manual_seed(0)
    return Net().double().eval()


def adapted(config: Any, library: Any = fastpeft, scale: float = 0.3) -> Any:
    model = library.get_peft_model(net(), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            parameter.copy_(torch.randn(parameter.shape) * scale)
    return model


def test_rows_that_train_beside_a_lora_stay_rows(tmp_path: Path) -> None:
    options = {"target_modules": ["lin"], "r": 3, "trainable_token_indices": {"emb": [7, 2]}}
    model = adapted(fastpeft.LoraConfig(**options))
    config, state = fastpeft.convert_to_lora(model, 3)
    other = fastpeft.get_peft_model(net(), config).eval()
    assert not fastpeft.set_peft_model_state_dict(other, state).unexpected_keys
    assert_near(other(X), model(X))
    fastpeft.save_as_lora(tmp_path, model, 3)
    assert_near(reloaded(tmp_path, peft)(X), model(X))
    assert fastpeft.get_base_model_state_dict(model).keys() == net().state_dict().keys()


def loha(library: Any = fastpeft, **options: Any) -> Any:
    return library.LoHaConfig(**{"target_modules": ["lin"], "r": 3, **options})


def reloaded(folder: Path, library: Any = fastpeft) -> Any:
    return library.PeftModel.from_pretrained(net(), folder).eval()


LINEAR = [m for m in registry().values() if m.mergeable and "linear" in m.kinds]


@pytest.mark.parametrize("method", LINEAR, ids=lambda m: type(m).__name__)
def test_every_linear_method_at_full_rank(method: Method, tmp_path: Path) -> None:
    model = _with(method)
    fastpeft.save_as_lora(tmp_path, model, rank=20)
    expected = model(X)
    assert not torch.equal(expected, net()(X))
    for library in (fastpeft, peft):
        assert_near(reloaded(tmp_path, library)(X), expected)


def _with(method: Method) -> Any:
    # As an expression for the whole name: BEFT needs the bias that `sub.lin` lacks.
    targets = "lin" if type(method).__name__ == "Beft" else ["lin"]
    for example in method.examples:
        options = {"target_modules": targets, "bias": "none", **example}
        if not hasattr(method.config_class, "bias"):
            options.pop("bias")
        try:
            return adapted(method.config_class(**options))
        except ValueError as error:  # an example for other sizes or kinds of layer
            reason = error
    pytest.skip(f"no example fits: {reason}")


@pytest.mark.parametrize("rank", [2, 5, 0.5, 0.9, 1.0])
def test_ranks_and_values_as_peft(rank: float) -> None:
    ours, theirs = adapted(loha()), adapted(loha(peft), peft)
    ours.load_state_dict(theirs.state_dict())
    config, state = fastpeft.convert_to_lora(ours, rank)
    their_config, expected = peft.tuners.lora.conversion.convert_to_lora(theirs, rank)
    assert state.keys() == expected.keys()
    for key in [k for k in expected if "lora_A" in k]:
        back = key.replace("lora_A", "lora_B")
        assert state[key].shape == expected[key].shape
        assert_near(state[back] @ state[key], expected[back] @ expected[key], growth=8)  # theirs is made in float32
    ranks = {k.removesuffix(".lora_A.weight"): len(v) for k, v in state.items() if "lora_A" in k}
    for name, r in ranks.items():
        short = name.removeprefix("base_model.model.")
        values = list(config.rank_pattern.values()) if config.rank_pattern else []
        assert r == config.r or r in values, short
    assert config.lora_alpha == config.r
    assert isinstance(their_config, peft.LoraConfig)


def test_a_smaller_rank_is_the_best_of_its_size() -> None:
    model = adapted(loha())
    delta = model.base_model.model.lin.get_delta_weight("default")
    _, state = fastpeft.convert_to_lora(model, 3)
    a, b = (state[f"base_model.model.lin.lora_{n}.weight"] for n in "AB")
    values = torch.linalg.svdvals(delta)
    assert_near((delta - b @ a).norm()[None], values[3:].norm()[None])


@pytest.mark.parametrize("rank", [8, 1.0])
def test_known_factors_are_exact_at_their_own_rank(rank: float, tmp_path: Path) -> None:
    model = adapted(fastpeft.DeloraConfig(target_modules=["lin"], r=2))
    config, state = fastpeft.convert_to_lora(model, rank)
    assert {len(v) for k, v in state.items() if "lora_A" in k} == {2}
    fastpeft.save_as_lora(tmp_path, model, rank)
    assert_near(reloaded(tmp_path, peft)(X), model(X))
    assert config.lora_alpha == config.r


def test_factors_without_the_weights_size() -> None:
    a, b = torch.randn(3, 40, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    u, s, v = svd_of_product(a, b)
    assert_near(u * s @ v, b @ a)
    assert_near(s, torch.linalg.svdvals(b @ a)[:3])


def test_biases_become_loras_bias(tmp_path: Path) -> None:
    model = adapted(fastpeft.GloraConfig(target_modules=["lin"], r=2))
    config, _ = fastpeft.convert_to_lora(model, 20)
    assert config.lora_bias
    fastpeft.save_as_lora(tmp_path, model, 20)
    assert_near(reloaded(tmp_path, peft)(X), model(X))


def test_convolutions_and_embeddings(tmp_path: Path) -> None:
    model = adapted(fastpeft.HiraConfig(target_modules=["emb", "conv", "lin"], r=2))
    fastpeft.save_as_lora(tmp_path, model, 1.0)
    for library in (fastpeft, peft):
        assert_near(reloaded(tmp_path, library)(X), model(X))


def test_selections_and_saved_modules_go_along(tmp_path: Path) -> None:
    model = adapted(loha(target_modules=r".*lin", exclude_modules=["sub.lin"], modules_to_save=["head"]))
    fastpeft.save_as_lora(tmp_path, model, 0.8)
    for library in (fastpeft, peft):
        again = reloaded(tmp_path, library)
        assert not hasattr(again.base_model.model.sub["lin"], "lora_A")
        saved = again.base_model.model.head.modules_to_save["default"].weight
        assert torch.equal(saved, model.base_model.model.head.modules_to_save["default"].weight)


def test_names_that_are_the_end_of_others(tmp_path: Path) -> None:
    """`lin` and `sub.lin` get ranks of their own, and a pattern `lin` would match both."""
    model = adapted(loha())
    with torch.no_grad():
        model.base_model.model.lin.hada_w1_a["default"][:, 1:] = 0
        model.base_model.model.lin.hada_w2_a["default"][:, 1:] = 0
    config, state = fastpeft.convert_to_lora(model, 0.999)
    ranks = [len(v) for k, v in sorted(state.items()) if "lora_A" in k]
    assert ranks[0] == 1 != ranks[1]
    fastpeft.save_as_lora(tmp_path, model, 0.999)
    for library in (fastpeft, peft):
        again = reloaded(tmp_path, library)
        layers = (again.base_model.model.lin, again.base_model.model.sub["lin"])
        assert [len(layer.lora_A["default"].weight) for layer in layers] == ranks
    assert config.r == config.lora_alpha


def test_injected_models_without_a_configuration() -> None:
    model = fastpeft.inject_adapter_in_model(loha(), net())
    expected = model(X)
    del model.peft_config
    config, state = fastpeft.convert_to_lora(model, 20)
    again = fastpeft.inject_adapter_in_model(config, net())
    fastpeft.set_peft_model_state_dict(again, state)
    assert_near(again(X), expected)
    assert config.lora_alpha == config.r == 20  # PEFT leaves alpha at 8 here


def test_merged_adapters_and_changed_base_weights(tmp_path: Path) -> None:
    model = adapted(loha())
    expected = model(X)
    model.merge_adapter()
    fastpeft.save_as_lora(tmp_path, model, 20)
    assert_near(reloaded(tmp_path)(X), expected)
    model = adapted(fastpeft.LoraConfig(target_modules=["lin"], r=3, init_lora_weights="pissa"))
    with pytest.warns(PeftWarning, match="is already a LoRA adapter"):
        fastpeft.save_as_lora(tmp_path, model, 20)
    assert_near(reloaded(tmp_path, peft)(X), model(X))


def test_compiled_and_with_a_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    model = adapted(loha())
    _, expected = fastpeft.convert_to_lora(model, 3)
    _, state = fastpeft.convert_to_lora(model, 3, progressbar=True, compile_kwargs={"backend": "eager"})
    assert "Converting to LoRA" in capfd.readouterr().err
    for key, value in expected.items():
        assert_near(state[key], value)


def test_an_adapter_of_several_and_half_precision() -> None:
    model = adapted(loha())
    model.add_adapter("other", loha(r=2, init_weights=False))
    name = "base_model.model.lin.lora_{}.weight"
    _, exact = fastpeft.convert_to_lora(model, 4, adapter_name="other")
    assert_near(exact[name.format("B")] @ exact[name.format("A")], model.base_model.model.lin.get_delta_weight("other"))
    _, state = fastpeft.convert_to_lora(model.float().bfloat16(), 4, adapter_name="other")
    assert {v.dtype for v in state.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("rank", "error", "match"),
    [(0, ValueError, "doesn't make sense"), (-1, ValueError, "doesn't make sense"), (0.0, ValueError, "threshold"),
     (1.5, ValueError, "threshold"), (21, ValueError, "larger than the weight shape")],
)  # fmt: skip
def test_ranks_that_make_no_sense(rank: float, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        fastpeft.convert_to_lora(adapted(loha()), rank)


def test_what_has_no_lora_is_refused() -> None:
    with pytest.raises(TypeError, match="Could not detect any layer"):
        fastpeft.convert_to_lora(net(), 2)
    with pytest.raises(TypeError, match="Could not detect any layer"):
        fastpeft.convert_to_lora(adapted(loha()), 2, adapter_name="nobody")
    lily = registry().get(fastpeft.PeftType.LILY)
    if lily is not None:
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            fastpeft.convert_to_lora(adapted(lily.config_class(target_modules=["lin"], r=3)), 2)
    with pytest.raises(ValueError, match="bias=all"):
        fastpeft.convert_to_lora(adapted(fastpeft.DeloraConfig(target_modules=["lin"], bias="all")), 2)


def test_signatures_are_pefts() -> None:
    import inspect

    from peft.tuners.lora import conversion

    for name in ("convert_to_lora", "save_as_lora"):
        mine, theirs = (inspect.signature(getattr(m, name)).parameters for m in (fastpeft, conversion))
        assert {n: p.default for n, p in mine.items()} == {n: p.default for n, p in theirs.items()}
