"""Methods that act on whole modules, beside PEFT's: Llama-Adapter on attentions, Shadow on a decoder's blocks."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
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

IDS = torch.tensor([[3, 5, 7, 9, 2], [1, 4, 6, 8, 11]])
PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
PROMPT = {"adapter_len": 3, "adapter_layers": 2}
SHADOW = {"r": 3, "shadow_dropout": 0.0, "init_weights": False}
ROUNDING = 2**9 * torch.finfo(torch.float32).eps
CAUSAL = {"task_type": "CAUSAL_LM"}


def base(kind: str = "llama", head: str = "ForCausalLM") -> Any:
    configs = {
        "llama": lambda: transformers.LlamaConfig(**SIZES, **HEADS),
        "mistral": lambda: transformers.MistralConfig(**SIZES, **HEADS, head_dim=6),  # 4 heads of 6 are no 16
        "gpt2": lambda: transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=4),
        "opt": lambda: transformers.OPTConfig(
            vocab_size=32, hidden_size=16, ffn_dim=24, num_hidden_layers=3, num_attention_heads=4,
            word_embed_proj_dim=16,
        ),
    }
    torch.manual_seed(0)
    config = configs[kind]()
    config.pad_token_id, config.num_labels = 0, 3
    names = {"llama": "Llama", "mistral": "Mistral", "gpt2": "GPT2", "opt": "OPT"}
    head = "LMHeadModel" if (kind, head) == ("gpt2", "ForCausalLM") else head
    return getattr(transformers, names[kind] + head)(config).eval()


def put(library: Any, name: str, options: dict[str, Any], *which: str) -> Any:
    torch.manual_seed(1)
    return library.get_peft_model(base(*which), getattr(library, name)(**options))


def scattered(model: Any, library: Any, seed: int = 2) -> Any:
    """The model with other values in its adapter, the same in either library, set to evaluate."""
    torch.manual_seed(seed)
    state = library.get_peft_model_state_dict(model)
    others = {key: torch.randn(state[key].shape).to(state[key].dtype) * 0.3 for key in sorted(state)}
    library.set_peft_model_state_dict(model, others)
    return model.eval()


def grads(model: Any, library: Any) -> dict[str, Tensor]:
    found = {p.data_ptr(): p.grad for p in model.parameters() if p.grad is not None and p.numel()}
    state = library.get_peft_model_state_dict(model)
    return {key: found[t.data_ptr()] for key, t in state.items() if t.data_ptr() in found}


def close(a: Any, b: Any) -> None:
    """Equal but for a few hundred roundings in float32."""
    torch.testing.assert_close(a, b, rtol=ROUNDING, atol=ROUNDING)


def outcome(model: Any, library: Any, **inputs: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach(), grads(model, library)


def beside(name: str, options: dict[str, Any], *which: str, labels: Tensor = IDS) -> tuple[Any, Any]:
    """Ours and PEFT's with the same values, after a look at what they compute."""
    ours, theirs = (put(library, name, options, *which) for library in (fastpeft, peft))
    made, known = fastpeft.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert made.keys() == known.keys()
    if name == "ShadowConfig":  # drawn in PEFT's order
        assert all(torch.equal(made[key], value) for key, value in known.items())
    scattered(ours, fastpeft), scattered(theirs, peft)
    both = [
        outcome(model, library, input_ids=IDS, attention_mask=PADDED, labels=labels)
        for model, library in ((ours, fastpeft), (theirs, peft))
    ]
    close(*both)
    assert both[0][2]
    return ours.eval(), theirs.eval()


def both_ways(ours: Any, theirs: Any, tmp_path: Path, *which: str) -> None:
    """Each library reads what the other wrote, and computes the same."""
    expected = ours(IDS, attention_mask=PADDED).logits
    for (writer, model), reader in (((fastpeft, ours), peft), ((peft, theirs), fastpeft), ((fastpeft, ours), fastpeft)):
        folder = tmp_path / f"{writer.__name__}-{reader.__name__}"
        model.save_pretrained(folder)
        read = reader.PeftModel.from_pretrained(base(*which), folder).eval()
        close(read(IDS, attention_mask=PADDED).logits, expected)
        assert not any(p.is_meta for p in (*read.parameters(), *read.buffers()))
    read.load_adapter(folder, "second")
    read.set_adapter("second")
    close(read(IDS, attention_mask=PADDED).logits, expected)


# Llama-Adapter


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adaption_prompts_are_pefts(kind: str, tmp_path: Path) -> None:
    ours, theirs = beside("AdaptionPromptConfig", {**PROMPT, **CAUSAL}, kind)
    both_ways(ours, theirs, tmp_path, kind)
    assert ours.active_peft_config.target_modules == theirs.active_peft_config.target_modules
    content = fastpeft.PeftConfig.from_json_file(tmp_path / "fastpeft-peft" / "adapter_config.json")
    assert content.keys() == theirs.active_peft_config.to_dict().keys()


def plain_prompt(model: Any, states: Tensor, angles: Any, layer: int) -> Tensor:
    """The share of a prompt, head by head."""
    attention = model.model.layers[layer].self_attn
    module, d = attention.base_layer, attention.base_layer.head_dim
    prompt, gate = attention.adaption_prompt["default"][0], attention.adaption_gate["default"]
    q = module.q_proj(states).unflatten(-1, (-1, d))
    k, v = (part(prompt).unflatten(-1, (-1, d)) for part in (module.k_proj, module.v_proj))
    cos, sin = (angle[:, :, None] for angle in angles)
    q = q * cos + torch.cat((-q[..., d // 2 :], q[..., : d // 2]), -1) * sin
    heads = [
        torch.softmax(q[:, :, h] @ k[:, h // (q.shape[2] // k.shape[1])].t() / d**0.5, -1)
        @ v[:, h // (q.shape[2] // v.shape[1])]
        for h in range(q.shape[2])
    ]
    return module.o_proj(gate * torch.cat(heads, -1))


def test_prompts_go_to_the_heads_that_read_them() -> None:
    """Also where heads times their size are not the width, for which PEFT makes shapes that do not fit."""
    model = scattered(put(fastpeft, "AdaptionPromptConfig", PROMPT, "mistral"), fastpeft)
    got, attention = {}, model.get_base_model().model.layers[2].self_attn
    attention.register_forward_hook(lambda m, a, k, out: got.update(k, whole=out[0]), with_kwargs=True)
    attention.base_layer.register_forward_hook(lambda m, a, k, out: got.update(inner=out[0]), with_kwargs=True)
    model(IDS)
    added = plain_prompt(model.get_base_model(), got["hidden_states"], got["position_embeddings"], 2)
    torch.testing.assert_close(got["whole"], got["inner"] + added)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        put(peft, "AdaptionPromptConfig", PROMPT, "mistral")(IDS)


def test_rows_have_prompts_of_their_own() -> None:
    model = scattered(put(fastpeft, "AdaptionPromptConfig", PROMPT), fastpeft)
    model.add_adapter("other", fastpeft.AdaptionPromptConfig(adapter_len=2, adapter_layers=3))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".other" in name:
                p.normal_(std=0.5)
    model.eval()
    rows = ["other", "default", "__base__", "other"]
    ids = IDS[[0, 1, 0, 1]]
    mixed = model(ids, adapter_names=rows).logits
    for i, name in enumerate(rows):
        if name != "__base__":
            model.set_adapter(name)
        with model.disable_adapter() if name == "__base__" else torch.no_grad():
            torch.testing.assert_close(mixed[i : i + 1], model(ids[i : i + 1]).logits)
    assert not torch.equal(mixed[0], mixed[2])
    model.base_model.set_adapter(["default", "other"])  # both act, one after the other
    assert not torch.equal(model(IDS).logits, mixed[:2])


@pytest.mark.parametrize("name", ["AdaptionPromptConfig", "ShadowConfig"])
def test_other_methods_have_a_place_in_the_same_model(name: str, tmp_path: Path) -> None:
    """A LoRA in the module, put in before and after; its file is that of a model without the other adapter."""
    options = PROMPT if name == "AdaptionPromptConfig" else {**SHADOW, "shadow_model": "mirror"}
    lora = {"r": 2, "target_modules": r"model\.layers\.\d\.self_attn\.(q|o)_proj", "init_lora_weights": False}
    torch.manual_seed(5)
    alone = fastpeft.get_peft_model(base(), fastpeft.LoraConfig(**lora))
    alone.save_pretrained(tmp_path / "lora")
    outer = scattered(put(fastpeft, name, options), fastpeft).eval()
    expected = outer(IDS).logits
    outer.save_pretrained(tmp_path / "outer")
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastpeft.PeftWarning)
        first, second = fastpeft.PeftModel.from_pretrained(base(), tmp_path / "lora", "lora"), outer
        first.load_adapter(tmp_path / "outer", "outer")
        second.load_adapter(tmp_path / "lora", "lora")
    seen = []
    for model, outer_name in ((first, "outer"), (second, "default")):
        model.eval().base_model.set_adapter([outer_name, "lora"])
        seen.append(model(IDS).logits)
        model.save_pretrained(tmp_path / "again", selected_adapters=["lora"])
        assert_same_state(tmp_path / "again" / "lora", tmp_path / "lora")
        model.set_adapter(outer_name)
        torch.testing.assert_close(model(IDS).logits, expected)
        model.set_adapter("lora")
        torch.testing.assert_close(model(IDS).logits, alone(IDS).logits)
    torch.testing.assert_close(*seen)
    assert not torch.equal(seen[0], expected)
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        second.base_model.merge_adapter(adapter_names=["default"])
    assert_same_bits(second.unload()(IDS).logits, base()(IDS).logits)
    assert second.get_base_model().state_dict().keys() == base().state_dict().keys()


def assert_same_state(a: Path, b: Path) -> None:
    one, other = (fastpeft.load_peft_weights(folder, device="cpu") for folder in (a, b))
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert_same_bits(value, other[key])


@pytest.mark.parametrize(("options", "which", "told"), [
    ({"adapter_len": 3, "adapter_layers": 4}, "llama", "more adapter layers '4' than the model has '3'"),
    ({"adapter_len": 3}, "llama", "`adapter_layers` should be a positive integer"),
    ({"adapter_layers": 1, "adapter_len": 0}, "llama", "`adapter_len` should be a positive integer"),
    (PROMPT, "opt", "Unsupported model type for adaption prompt: 'opt'"),
    ({**PROMPT, "target_modules": "mlp"}, "llama", "needs an attention, LlamaMLP has no q_proj"),
    ({**PROMPT, "target_modules": ["self_attn"]}, "llama", "the name of the attentions"),
])  # fmt: skip
def test_prompts_that_fit_nowhere_are_refused(options: dict[str, Any], which: str, told: str) -> None:
    model = base(which)
    before = str(model)
    with pytest.raises(ValueError, match=told):
        fastpeft.get_peft_model(model, fastpeft.AdaptionPromptConfig(**options))
    assert str(model) == before
    assert all(p.requires_grad for p in model.parameters())


# Shadow


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
    torch.testing.assert_close(run(lambda model: checkpointed(model, CheckpointImpl.NO_REENTRANT)), expected)
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
    torch.testing.assert_close(model.get_base_model().model(IDS).last_hidden_state, out.hidden_states[-1])
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
