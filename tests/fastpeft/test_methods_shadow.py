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
from torch import Tensor, nn
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
grads = tools["grads"]
close = tools["close"]
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
    ours.add_adapter("other", fastpeft.ShadowConfig(**options))  # PEFT refuses a second one
    assert isinstance(ours.base_model.shadow_head["other"], nn.Linear)


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

    def run(change: Callable[[Any], None]) -> dict[str, Tensor]:
        model = shadow().train()
        model.get_base_model().config.use_cache = False
        change(model)
        one, two = (model(ids, labels=ids).loss for ids in (IDS, IDS.flip(0, 1)))
        (one - 2 * two).backward()
        return grads(model, fastpeft)

    expected = run(lambda model: None)
    close(run(lambda model: checkpointed(model, CheckpointImpl.NO_REENTRANT)), expected)
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


@pytest.mark.parametrize(("options", "told"), [
    ({"r": 0}, "`r` should be a positive integer"),
    ({"shadow_hidden_size": 0}, "`shadow_hidden_size` should be a positive integer or None"),
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
