"""Shadow beside PEFT's, and where it goes further."""

from __future__ import annotations

import copy
import gc
import pickle
import runpy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from fastpeft.apps.training.config import TrainConfig
from fastpeft.apps.training.data import Example
from fastpeft.apps.training.forward import CompletionLoss
from fastpeft.apps.training.packing import collate
from fastpeft.apps.training.run import adapter_config
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from peft_kernels.testing import assert_same_bits

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
tools = runpy.run_path(str(Path(__file__).with_name("whole_tools.py")))
IDS = tools["IDS"]
PADDED = tools["PADDED"]
SIZES = tools["SIZES"]
HEADS = tools["HEADS"]
SHADOW = tools["SHADOW"]
CAUSAL = tools["CAUSAL"]
base = tools["base"]
put = tools["put"]
scattered = tools["scattered"]
close = tools["close"]
ROUNDING = tools["ROUNDING"]
beside = tools["beside"]
both_ways = tools["both_ways"]


@pytest.mark.parametrize(("kind", "options"), [
    ("llama", {"shadow_num_hidden_layers": 2, "shadow_alpha": 0.7}),
    ("llama", {"shadow_hidden_size": 8, "update_hidden_size": 5, "shadow_intermediate_size": 6, "target_modules":
               r".*layers\.[12]$"}),
    ("gpt2", {"auxiliary_loss_weight": 0.5, "shadow_num_attention_heads": 2}),
    ("opt", {"share_embeddings": False}),
])  # fmt: skip
def test_shadows_are_pefts(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = beside("ShadowConfig", {**SHADOW, **options, **CAUSAL}, kind)
    both_ways(ours, theirs, tmp_path, kind)
    options = {"attention_mask": PADDED, "max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    for use_cache in (True, False):
        assert torch.equal(*(m.generate(IDS, use_cache=use_cache, **options) for m in (ours, theirs)))
    alone = [m.base_model.unload_shadow(copy=True)(IDS, labels=IDS) for m in (ours, theirs)]
    close(alone[0].logits, alone[1].logits)
    close(alone[0].loss, alone[1].loss)


def test_shadows_classify_as_pefts(tmp_path: Path) -> None:
    options = {**SHADOW, "task_type": "SEQ_CLS", "auxiliary_loss_weight": 0.5}
    which = ("llama", "ForSequenceClassification")
    ours, theirs = beside("ShadowConfig", options, *which, labels=torch.tensor([2, 0]))
    both_ways(ours, theirs, tmp_path, *which)
    for task in ("SEQ_CLS", "CAUSAL_LM"):
        with pytest.raises(ValueError, match="does not support multiple adapters"):
            ours.add_adapter("other", fastpeft.ShadowConfig(**{**options, "task_type": task}))
    assert list(ours.peft_config) == list(ours.base_model.shadow_head) == ["default"]


def test_a_checkpoint_is_a_backbone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    transformers.LlamaModel(transformers.LlamaConfig(**{**SIZES, "hidden_size": 8, "num_hidden_layers": 1}, **HEADS)
                            ).save_pretrained(tmp_path / "small")  # fmt: skip
    options = {**SHADOW, **CAUSAL, "shadow_model": str(tmp_path / "small")}
    ours, theirs = beside("ShadowConfig", options)
    both_ways(ours, theirs, tmp_path)
    assert not ours.base_model.shadow_backbone["default"].embed_tokens.weight.requires_grad


def shadow(**options: Any) -> Any:
    return scattered(put(fastpeft, "ShadowConfig", {**SHADOW, **CAUSAL, **options}), fastpeft)


def checkpointed(model: Any, how: CheckpointImpl) -> None:
    layers = model.get_base_model().model.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer, how)


def test_blocks_that_run_again_get_the_states_of_their_own_forward() -> None:
    """PEFT's get those of the last one."""

    def run(change: Callable[[Any], None], library: Any = fastpeft) -> dict[str, Tensor]:
        model = scattered(put(library, "ShadowConfig", {**SHADOW, **CAUSAL}), library).train()
        model.get_base_model().config.use_cache = False
        change(model)
        one, two = (model(ids, labels=ids).loss for ids in (IDS, IDS.flip(0, 1)))
        (one - 2 * two).backward()
        named = ((name.replace("_checkpoint_wrapped_module.", ""), p.grad) for name, p in model.named_parameters())
        return {name: grad for name, grad in named if grad is not None}

    def no_reentrant(model: Any) -> None:
        checkpointed(model, CheckpointImpl.NO_REENTRANT)

    expected = run(lambda model: None)
    close(run(no_reentrant), expected)
    plain, again = run(lambda model: None, peft), run(no_reentrant, peft)
    assert plain.keys() == again.keys()
    assert not all(torch.allclose(again[key], grad, rtol=ROUNDING, atol=ROUNDING) for key, grad in plain.items())
    for reentrant in (True, False):
        options = {"use_reentrant": reentrant}
        close(run(lambda m, o=options: m.get_base_model().gradient_checkpointing_enable(o)), expected)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        run(lambda m: (m.enable_input_require_grads(), checkpointed(m, CheckpointImpl.REENTRANT)))


def test_a_forward_leaves_nothing_behind() -> None:
    """No graph is kept alive by what blocks note down, also without a backward; a forward that failed is over."""
    model = shadow()
    model(IDS)
    seen: list[Any] = []
    layer = model.get_base_model().model.layers[1]
    handle = layer.register_forward_hook(lambda m, a, out: seen.append(weakref.ref(out)))
    model(IDS, use_cache=False)
    handle.remove()
    model.base_model.disable_adapter_layers()
    model(IDS)
    gc.collect()
    assert [ref() for ref in seen] == [None]
    model.base_model.enable_adapter_layers()
    expected = model(IDS).logits
    with pytest.raises(ValueError, match="has to be what this model"):
        model(IDS[:, :1], past_key_values=base()(IDS).past_key_values)
    assert_same_bits(model(IDS).logits, expected)


def test_two_shadows_cannot_both_act() -> None:
    model = shadow().eval()
    model.add_adapter("other", fastpeft.ShadowConfig(**SHADOW, **CAUSAL))
    expected = model(IDS).logits
    with pytest.raises(ValueError, match=r"SHADOW requires exactly one active adapter.*\['default', 'other'\]"):
        model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default"]
    assert_same_bits(model(IDS).logits, expected)


def test_what_the_model_gives_besides() -> None:
    model = shadow().eval()
    out = model(IDS, output_hidden_states=True)
    assert [type(state) for state in out.hidden_states] == [Tensor] * 4
    assert len(model.get_base_model().model(IDS)) == 2  # without the head, shadows act too
    close(model.get_base_model().model(IDS).last_hidden_state, out.hidden_states[-1])
    static = model.generate(IDS, max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert torch.equal(static, model.generate(IDS, max_new_tokens=4, do_sample=False))
    with pytest.raises(ValueError, match="rows cannot have adapters of their own"):
        model(IDS, adapter_names=["default", "__base__"])
    with model.disable_adapter():
        without = model(IDS).logits
    for name, expected in (("default", out.logits), ("__base__", without)):
        assert_same_bits(model(IDS, adapter_names=[name] * 2).logits, expected)
    assert "shadow.ShadowLayer" in repr(model)
    layer = model.get_base_model().model.layers[0]
    assert isinstance(layer, peft.tuners.shadow.ShadowLayer)
    assert isinstance(layer, fastpeft.tuners.shadow.ShadowLayer)


def copied(model: Any) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copies", [copied, pickled])
def test_copies_have_shadows_of_their_own(copies: Callable[[Any], Any]) -> None:
    model = shadow().eval()
    expected = model(IDS).logits.detach()
    other = copies(model)
    scattered(model, fastpeft, 7)
    assert_same_bits(other(IDS).logits, expected)
    other.delete_adapter("default")
    assert_same_bits(other(IDS).logits, base()(IDS).logits)
    assert not other.get_base_model()._forward_hooks
    assert not other.get_base_model().model._forward_pre_hooks
    assert not torch.equal(model(IDS).logits, expected)


def test_an_injected_shadow_needs_no_tuner() -> None:
    model = shadow().eval()
    torch.manual_seed(1)
    bare = fastpeft.inject_adapter_in_model(fastpeft.ShadowConfig(**SHADOW, **CAUSAL), base())
    state = fastpeft.get_peft_model_state_dict(model)
    state = {key.removeprefix("base_model.model.").removeprefix("base_model."): value for key, value in state.items()}
    assert fastpeft.get_peft_model_state_dict(bare).keys() == state.keys()
    fastpeft.set_peft_model_state_dict(bare, state)
    close(bare(IDS, labels=IDS).loss, model(IDS, labels=IDS).loss)


def test_fastpeft_train_adds_the_loss_of_the_shadow_alone() -> None:
    model = shadow(auxiliary_loss_weight=0.5).train()
    model.get_base_model().config.use_cache = False
    batch = collate([[Example(IDS[0].tolist(), [False] + [True] * 4)]], 0)
    loss = CompletionLoss(model)(batch) / len(batch.targets)
    close(loss, model(IDS[:1], labels=IDS[:1]).loss)
    model.eval()  # what is evaluated is the model
    model.active_peft_config.auxiliary_loss_weight = 0.0
    close(CompletionLoss(model)(batch) / len(batch.targets), model(IDS[:1], labels=IDS[:1]).loss)
    assert model.base_model.last_shadow_loss > 0


@pytest.mark.parametrize(("method", "options"), [
    ("shadow", {}), ("adaption_prompt", {"adapter_len": 2, "adapter_layers": 1}),
])  # fmt: skip
def test_fastpeft_train_takes_the_modules_of_the_method(method: str, options: dict[str, Any]) -> None:
    made = adapter_config(TrainConfig(model="m", data="d", method=method, adapter=options))
    assert made.target_modules is None
    assert fastpeft.get_peft_model(base(), made).targeted_module_names
    made.target_modules = "all-linear"
    with pytest.raises(ValueError, match="acts on whole modules"):
        fastpeft.get_peft_model(base(), made)


@pytest.mark.parametrize(("options", "told"), [
    ({"r": 0}, "`r` should be a positive integer"),
    ({"shadow_hidden_size": 0}, "`shadow_hidden_size` should be a positive integer of at most"),
    ({"shadow_num_hidden_layers": 10**5}, "`shadow_num_hidden_layers` should be a positive integer of at most 1024"),
    ({"auxiliary_loss_weight": -1.0}, "`auxiliary_loss_weight` should be 0 or more"),
    ({"shadow_dropout": 1.5}, "`shadow_dropout` should be in"),
    ({"layers_to_transform": [0, 3]}, r"layers_to_transform has \[3\], the model has 3 blocks"),
])  # fmt: skip
def test_shadows_that_make_no_sense_are_refused(options: dict[str, Any], told: str) -> None:
    model = base()
    before = str(model)
    with pytest.raises(ValueError, match=told):
        fastpeft.get_peft_model(model, fastpeft.ShadowConfig(**options))
    assert str(model) == before
    assert not model._forward_hooks


def test_shadows_act_one_at_a_time() -> None:
    model = shadow()
    model.add_adapter("other", fastpeft.ShadowConfig(**SHADOW, **CAUSAL))
    with pytest.raises(ValueError, match=r"exactly one active adapter, but got 2 adapters: \[.default., .other.\]"):
        model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default"]


def test_the_blocks_of_layers_to_transform_are_chosen(tmp_path: Path) -> None:
    """PEFT takes all, as it looks for a number with a dot after it."""
    options = {**SHADOW, **CAUSAL, "layers_to_transform": [1]}
    ours, theirs = (put(library, "ShadowConfig", options) for library in (fastpeft, peft))
    assert ours.active_peft_config.target_modules == {"model.layers.1"}
    assert len(theirs.active_peft_config.target_modules) == 3
    for model, reader in ((ours, peft), (theirs, fastpeft)):
        model.save_pretrained(tmp_path / reader.__name__)
        read = reader.PeftModel.from_pretrained(base(), tmp_path / reader.__name__).eval()
        close(read(IDS).logits, model.eval()(IDS).logits)


# Transformers of diffusers

FLUX = {
    "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 8, "timestep_guidance_channels": 8, "mlp_ratio": 2.0,
    "axes_dims_rope": (2, 2, 2, 2), "guidance_embeds": False,
}  # fmt: skip


@pytest.mark.parametrize("options", [
    {}, {"shadow_hidden_size": 8, "shadow_intermediate_size": 12, "share_embeddings": False},
])  # fmt: skip
def test_shadows_of_flux_are_pefts(options: dict[str, Any], tmp_path: Path) -> None:
    flux = pytest.importorskip("diffusers").Flux2Transformer2DModel
    inputs = {
        "hidden_states": torch.randn(1, 4, 4), "encoder_hidden_states": torch.randn(1, 3, 8),
        "timestep": torch.tensor([0.5]), "img_ids": torch.zeros(1, 4, 4), "txt_ids": torch.zeros(1, 3, 4),
        "guidance": None, "return_dict": False,
    }  # fmt: skip
    options = {**SHADOW, "target_modules": r"single_transformer_blocks\.\d+$", **options}

    def made() -> Any:
        torch.manual_seed(0)
        return flux(**FLUX)

    models, seen = [], []
    for library in (fastpeft, peft):
        model = made()
        torch.manual_seed(1)
        models.append(library.get_peft_model(model, library.ShadowConfig(**options)))
        seen.append(library.get_peft_model_state_dict(models[-1]))
    assert seen[0].keys() == seen[1].keys()
    for key, value in seen[0].items():
        if not key.endswith("linear_in.weight"):
            assert_same_bits(value, seen[1][key])
    # Of a gated layer's two halves PEFT means to take the first rows of each, but looks for ".ff" in "ff.linear_in".
    inner = options.get("shadow_intermediate_size", 32)
    base_in = made().transformer_blocks[-1].ff.linear_in.weight.unflatten(0, (2, 32))
    backbone = models[0].base_model.shadow_backbone["default"].model
    width = backbone.transformer_blocks[0].ff.linear_in.in_features
    assert_same_bits(backbone.transformer_blocks[0].ff.linear_in.weight, base_in[:, :inner, :width].flatten(0, 1))
    for model, library, reader in ((models[0], fastpeft, peft), (models[1], peft, fastpeft)):
        scattered(model, library)
        model.save_pretrained(tmp_path / library.__name__)
        read = reader.PeftModel.from_pretrained(made(), tmp_path / library.__name__).eval()
        close(read(**inputs)[0], models[0](**inputs)[0])
