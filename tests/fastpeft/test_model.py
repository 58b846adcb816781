"""The life of adapters on a model: PeftModel against PEFT's, step by step."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from peft_kernels.testing import assert_no_worse, assert_same_bits

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
X = torch.arange(12).view(3, 4)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1, **options)).eval()


def config(**options: Any) -> dict[str, Any]:
    return {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM",
            **options}  # fmt: skip


def pair(make: Any = llama, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    ours = get_peft_model(make(), LoraConfig(**config(**options)))
    torch.manual_seed(1)
    return ours.eval(), peft.get_peft_model(make(), peft.LoraConfig(**config(**options))).eval()


def add_both(ours: Any, theirs: Any, name: str, **options: Any) -> None:
    torch.manual_seed(2)
    ours.add_adapter(name, LoraConfig(**config(**options)))
    torch.manual_seed(2)
    theirs.add_adapter(name, peft.LoraConfig(**config(**options)))


def assert_same_outputs(ours: Any, theirs: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        a, b = ours(X, **kwargs).logits, theirs(X, **kwargs).logits
        exact = copy.deepcopy(theirs).double()(X, **kwargs).logits
    # What rounding does in one layer goes through all that follow.
    assert_no_worse(a, b, exact, 8 * (exact.abs() + exact.abs().mean()))
    return a


def assert_same_state(ours: Any, theirs: Any) -> None:
    for mine, other in zip(ours.get_layer_status(), theirs.get_layer_status(), strict=True):
        a, b = vars(mine), vars(other)
        # PEFT lists a wrapped head's status by another class name and leaves out buffers' devices.
        assert a == b
    assert vars(ours.get_model_status()) == vars(theirs.get_model_status())
    assert ours.active_adapters == theirs.active_adapters
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    trainable = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert trainable[0] == trainable[1]


def test_the_life_of_adapters_is_pefts(capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = pair()
    outputs = [assert_same_outputs(ours, theirs)]
    assert_same_state(ours, theirs)
    ours.print_trainable_parameters()
    first = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert first == capsys.readouterr().out

    add_both(ours, theirs, "other", r=2, target_modules=["q_proj", "v_proj"])
    assert_same_state(ours, theirs)
    assert_same_outputs(ours, theirs)
    for model in (ours, theirs):
        model.set_adapter("other")
    assert_same_state(ours, theirs)
    outputs.append(assert_same_outputs(ours, theirs))
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "other"])
    outputs.append(assert_same_outputs(ours, theirs))
    assert_same_state(ours, theirs)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert_same_state(ours, theirs)
        outputs.append(assert_same_outputs(ours, theirs))
        with torch.no_grad():
            assert torch.equal(outputs[-1], llama()(X).logits)
    assert_same_state(ours, theirs)
    for model in (ours, theirs):
        model.set_requires_grad("other", False)
    assert_same_state(ours, theirs)
    for model in (ours, theirs):
        model.set_adapter("other")
        model.delete_adapter("other")
    # Every layer has the same active adapters here; PEFT's layers without adapters then have none, which its own
    # get_model_status calls irregular.
    assert ours.get_model_status().active_adapters == ours.active_adapters == ["default"]
    assert theirs.get_model_status().active_adapters == "irregular"
    outputs.append(assert_same_outputs(ours, theirs))
    assert torch.equal(outputs[0], outputs[-1])
    assert len({tuple(o.flatten().tolist()) for o in outputs}) == 4, "steps that change nothing test nothing"


@pytest.mark.parametrize("names", [None, ["default"], ["default", "other"], ["other", "default"]])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_pefts_and_unmerging_gives_the_bytes_back(names: list[str] | None, safe: bool) -> None:
    ours, theirs = pair()
    add_both(ours, theirs, "other", r=2, target_modules=["q_proj", "v_proj"])
    base = {k: v.clone() for k, v in ours.state_dict().items() if "lora_" not in k}
    for model in (ours, theirs):
        model.merge_adapter(names, safe_merge=safe)
    assert_same_outputs(ours, theirs)
    assert_same_state(ours, theirs)
    changed = {k for k, v in base.items() if not torch.equal(ours.state_dict()[k], v)}
    assert any("q_proj" in k for k in changed)
    ours.unmerge_adapter()
    theirs.unmerge_adapter()
    assert all(torch.equal(ours.state_dict()[k], v) for k, v in base.items())
    assert_same_state(ours, theirs)
    merged, other = ours.merge_and_unload(safe_merge=safe, adapter_names=names), None
    other = theirs.merge_and_unload(safe_merge=safe, adapter_names=names)
    assert type(merged) is LlamaForCausalLM
    assert set(merged.state_dict()) == set(other.state_dict()) == set(llama().state_dict())
    assert not hasattr(merged, "peft_config")
    assert_same_outputs(merged, other)


def test_a_second_merge_goes_on_top_of_the_first() -> None:
    ours, _ = pair()
    ours.add_adapter("other", LoraConfig(**config(r=2)))
    ours.base_model.set_adapter(["default", "other"])
    together = ours(X).logits
    base = ours.model.model.layers[0].self_attn.q_proj.weight.clone()
    ours.merge_adapter(["default"])
    ours.merge_adapter(["other"])
    twice = {k: v.clone() for k, v in ours.state_dict().items()}
    assert ours.get_model_status().merged_adapters == ["default", "other"]
    assert_no_worse(ours(X).logits, together, copy.deepcopy(ours).double()(X).logits, together.abs() + 1)
    ours.unmerge_adapter()
    assert torch.equal(ours.model.model.layers[0].self_attn.q_proj.weight, base)
    ours.merge_adapter()
    assert all(torch.equal(twice[k], v) for k, v in ours.state_dict().items())


def test_unload_and_switching_while_merged() -> None:
    ours, theirs = pair()
    add_both(ours, theirs, "other")
    for model in (ours, theirs):
        model.merge_adapter()
        model.set_adapter("other")  # unmerges first
    assert not ours.model.model.layers[0].self_attn.q_proj.merged
    assert_same_outputs(ours, theirs)
    ours.merge_adapter()
    with pytest.raises(ValueError, match="while it is merged"):
        ours.delete_adapter("other")
    with ours.disable_adapter(), torch.no_grad():
        assert torch.equal(ours(X).logits, llama()(X).logits)
    with torch.no_grad():
        assert torch.equal(ours.unload()(X).logits, llama()(X).logits)


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_a_safe_merge_that_fails_leaves_every_weight(how: str, bad: float) -> None:
    ours, _ = pair()
    last = ours.model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        last.lora_A["default"].weight.fill_(bad)
        last.lora_B["default"].weight.fill_(bad)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with pytest.raises(ValueError, match=r"NaNs detected.*layers\.1\.mlp\.down_proj.*default"):
        getattr(ours, how)(safe_merge=True)
    after = ours.state_dict()
    assert list(after) == list(before)
    for key in before:
        assert_same_bits(after[key], before[key])
    assert ours.get_model_status().merged_adapters == []


def test_a_bias_that_cannot_be_merged_is_said_before_anything_is_written() -> None:
    ours, _ = pair(lora_bias=True)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    for merge in (ours.merge_adapter, ours.merge_and_unload):
        with pytest.raises(ValueError, match="the base layer has none"):
            merge()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), ours.state_dict().values(), strict=True))


def test_merging_into_tied_embeddings_changes_one_of_them() -> None:
    model = get_peft_model(
        llama(tie_word_embeddings=True), LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False)
    )
    with torch.no_grad():
        y = model(X).logits
        merged = model.merge_and_unload()
        assert merged.config.tie_word_embeddings is False
        exact = copy.deepcopy(merged).double()(X).logits
        assert_no_worse(merged(X).logits, y, exact, exact.abs() + 1)
        assert torch.equal(merged.lm_head.weight, llama(tie_word_embeddings=True).lm_head.weight)


def test_a_mixed_batch_gives_each_row_its_adapter() -> None:
    ours, theirs = pair()
    add_both(ours, theirs, "other", r=2, target_modules=["q_proj", "v_proj"])
    names = ["other", "__base__", "default"]
    mixed = assert_same_outputs(ours, theirs, adapter_names=names)
    with torch.no_grad():
        for i, name in enumerate(names):
            if name == "__base__":
                with ours.disable_adapter():
                    alone = ours(X[i : i + 1]).logits
            else:
                ours.set_adapter(name)
                alone = ours(X[i : i + 1]).logits
            wide = llama().double() if name == "__base__" else copy.deepcopy(ours).double()
            assert_no_worse(mixed[i : i + 1], alone, wide(X[i : i + 1]).logits, alone.abs() + 1)
    generated = ours.generate(X, adapter_names=names, max_new_tokens=3, do_sample=False, num_beams=2, pad_token_id=0)
    assert torch.equal(generated, theirs.generate(
        X, adapter_names=names, max_new_tokens=3, do_sample=False, num_beams=2, pad_token_id=0))  # fmt: skip
    with pytest.raises(ValueError, match="non-existing adapter"):
        ours(X, adapter_names=["typo", "other", "other"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        ours(X, adapter_names=["other"])
    with pytest.raises(ValueError, match="training mode"):
        ours.train()(X, adapter_names=names)
    ours.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        ours(X, adapter_names=names)


class Classes:
    """Models with a head, and the options that make it new."""

    @staticmethod
    def sequence() -> nn.Module:
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)).eval()

    @staticmethod
    def token() -> nn.Module:
        torch.manual_seed(0)
        return BertForTokenClassification(BertConfig(**SMALL, num_labels=3)).eval()


@pytest.mark.parametrize(
    ("make", "task", "cls"),
    [
        (Classes.sequence, "SEQ_CLS", "PeftModelForSequenceClassification"),
        (Classes.token, "TOKEN_CLS", "PeftModelForTokenClassification"),
        (llama, "CAUSAL_LM", "PeftModelForCausalLM"),
        (llama, "FEATURE_EXTRACTION", "PeftModelForFeatureExtraction"),
        (llama, None, "PeftModel"),
    ],
)
def test_tasks_and_files_both_ways(make: Any, task: str | None, cls: str, tmp_path: Any) -> None:
    targets = ["q_proj", "down_proj"] if make is llama else ["query", "dense"]
    ours, theirs = pair(make, task_type=task, target_modules=targets)
    assert type(ours).__name__ == type(theirs).__name__ == cls
    add_both(ours, theirs, "other", task_type=task, target_modules=targets)
    assert_same_state(ours, theirs)
    for model in (ours, theirs):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "modules_to_save" in name:
                    p.add_(0.5)
    assert_same_outputs(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    for name in ("default", "other"):
        folder = "." if name == "default" else name
        a = PeftModel.from_pretrained(make(), tmp_path / "theirs" / folder, adapter_name=name).eval()
        b = peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours" / folder), adapter_name=name).eval()
        assert type(a).__name__ == type(b).__name__ == cls
        for model in (ours, theirs):
            model.set_adapter(name)
        assert torch.equal(assert_same_outputs(a, b), assert_same_outputs(ours, theirs))
        assert_same_state(a, b)
        assert not any(p.requires_grad for p in a.parameters())
    # Beside another adapter, and trainable.
    a.load_adapter(tmp_path / "ours", "second", is_trainable=True)
    b.load_adapter(str(tmp_path / "ours"), "second", is_trainable=True)
    assert_same_state(a, b)
    state, theirs_state = get_peft_model_state_dict(a, adapter_name="second"), get_peft_model_state_dict(ours)
    assert set(state) == set(theirs_state)
    assert all(torch.equal(state[k], theirs_state[k]) for k in state)


def test_loading_a_file_that_does_not_fit_changes_nothing(tmp_path: Any) -> None:
    pair()[0].save_pretrained(tmp_path)
    wider = {**SMALL, "intermediate_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**wider, num_key_value_heads=1))
    before = {n: (type(m), m.training) for n, m in model.named_modules()}
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(model, tmp_path)
    assert {n: (type(m), m.training) for n, m in model.named_modules()} == before
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert not hasattr(model, "peft_config")
    ours, _ = pair()
    state = {k: v.clone() for k, v in ours.state_dict().items()}
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(ValueError, match="header"):
        ours.load_adapter(tmp_path, "other")
    assert list(ours.peft_config) == ["default"]
    assert list(ours.state_dict()) == list(state)


def test_a_load_that_fails_late_changes_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpeft import loading

    pair()[0].save_pretrained(tmp_path)

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise OSError("the disk is gone")

    monkeypatch.setattr(loading, "set_peft_model_state_dict", fails)
    model = llama()
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(OSError, match="the disk is gone"):
        PeftModel.from_pretrained(model, tmp_path)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert [n for n, _ in model.named_modules()] == names
    assert not hasattr(model, "peft_config")
    ours, _ = pair()
    state = list(ours.state_dict())
    with pytest.raises(OSError, match="the disk is gone"):
        ours.load_adapter(tmp_path, "other")
    assert list(ours.peft_config) == ["default"]
    assert list(ours.state_dict()) == state


def test_a_model_that_was_loaded_half_precision_keeps_pefts_dtypes(tmp_path: Any) -> None:
    pair()[0].save_pretrained(tmp_path)
    for autocast in (True, False):
        a = PeftModel.from_pretrained(llama().bfloat16(), tmp_path, autocast_adapter_dtype=autocast)
        b = peft.PeftModel.from_pretrained(llama().bfloat16(), str(tmp_path), autocast_adapter_dtype=autocast)
        for name, p in b.named_parameters():
            assert dict(a.named_parameters())[name].dtype == p.dtype, (autocast, name)


def test_training_reaches_what_it_reaches_in_peft() -> None:
    ours, theirs = pair(modules_to_save=["lm_head"])
    losses: list[list[float]] = [[], []]
    for model, seen in zip((ours, theirs), losses, strict=True):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        model.train()
        for _ in range(5):
            loss = model(X, labels=X).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(float(loss.detach()))
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("checkpointing", [{}, {"use_reentrant": True}, {"use_reentrant": False}])
def test_preparing_a_quantised_model_and_training_it_with_checkpointing(checkpointing: dict[str, Any]) -> None:
    from fastpeft import NF4Linear, prepare_model_for_kbit_training, quantize_model

    model = llama().bfloat16()
    model.model.embed_tokens.weight.requires_grad_(True)
    model = quantize_model(model, "nf4", double_quant=True, skip=["lm_head"])
    packed = {n: b.clone() for n, b in model.named_buffers() if b.dtype == torch.uint8}
    prepared = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=checkpointing)
    assert prepared is model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    assert model.is_gradient_checkpointing
    peft_model = get_peft_model(model, LoraConfig(**config(init_lora_weights=True)))
    assert isinstance(peft_model.model.model.layers[0].self_attn.q_proj.base_layer, NF4Linear)
    assert peft_model.get_nb_trainable_parameters()[1] > sum(p.numel() for p in llama().parameters())
    peft_model.train()
    peft_model(X, labels=X).loss.backward()
    grads = {n: p.grad for n, p in peft_model.named_parameters() if p.requires_grad}
    assert grads
    assert all(g is not None and torch.isfinite(g).all() for g in grads.values())
    assert all(float(g.abs().sum()) > 0 for n, g in grads.items() if "lora_B" in n)
    assert all(torch.equal(b, packed[n.replace(".base_layer", "").removeprefix("base_model.model.")])
               for n, b in peft_model.named_buffers() if b.dtype == torch.uint8)  # fmt: skip


def test_an_adapter_on_the_meta_device_waits_for_its_values() -> None:
    ours, _ = pair()
    values = get_peft_model_state_dict(ours)
    empty = get_peft_model(llama(), LoraConfig(**config()), low_cpu_mem_usage=True).eval()
    assert {p.device.type for n, p in empty.named_parameters() if "lora_" in n} == {"meta"}
    result = fastpeft.set_peft_model_state_dict(empty, values, low_cpu_mem_usage=True)
    assert result.missing_keys == result.unexpected_keys == []
    assert_same_bits(empty(X).logits, ours(X).logits)


def test_a_merge_that_fails_halfway_takes_back_what_it_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair()
    ours.add_adapter("other", LoraConfig(**config()))
    ours.merge_adapter(["other"])  # what was merged before stays merged
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    last = ours.model.model.layers[1].mlp.down_proj

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(last, "merged_weight", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        ours.merge_adapter(["default"])
    for key, value in ours.state_dict().items():
        assert_same_bits(value, before[key])
    assert ours.get_model_status().merged_adapters == ["other"]


def test_mixed_precision_casts() -> None:
    ours, _ = pair()
    fastpeft.cast_mixed_precision_params(ours, torch.bfloat16)
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in ours.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_attributes_fall_through_and_copies_are_independent() -> None:
    ours, _ = pair()
    assert ours.config.hidden_size == 16
    assert ours.device == torch.device("cpu")
    assert ours.get_base_model() is ours.base_model.model
    assert type(ours.base_model).__name__ == "LoraModel"
    assert ours.base_model.prefix == "lora_"
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = ours.no_such_thing
    y = ours(X).logits
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(X).logits, y)
        twin.delete_adapter("default")
        assert torch.equal(ours(X).logits, y)
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    fresh, _ = pair()
    fresh.load_state_dict(torch.load(buffer, weights_only=True), assign=True)
    assert torch.equal(fresh(X).logits, y)


def test_a_compiled_model_computes_the_same() -> None:
    ours, _ = pair()
    with torch.no_grad():
        y = ours(X).logits
        compiled = torch.compile(ours, backend="eager")
        assert_no_worse(compiled(X).logits, y, copy.deepcopy(ours).double()(X).logits, y.abs() + 1)
        ours.set_adapter("default")
        with ours.disable_adapter():
            assert_no_worse(compiled(X).logits, ours(X).logits, llama().double()(X).logits, y.abs() + 1)


def test_the_whole_public_surface_of_this_version_can_be_imported() -> None:
    for name in fastpeft.__all__:
        assert getattr(fastpeft, name) is not None, name
    from fastpeft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    assert PEFT_TYPE_TO_CONFIG_MAPPING["LORA"] is LoraConfig
    assert isinstance(fastpeft.get_peft_config({"peft_type": "LORA", "r": 3}), LoraConfig)
    with pytest.raises(NotImplementedError, match="VERA is not there yet"):
        fastpeft.get_peft_config({"peft_type": "VERA"})
    assert issubclass(fastpeft.PeftMixedModel, PeftModel)


def test_names_are_found_where_scripts_look_for_them() -> None:
    from fastpeft.tuners.lora import LoraLayer, LoraModel
    from fastpeft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from fastpeft.utils import ModulesToSaveWrapper, get_peft_model_state_dict

    ours, _ = pair(modules_to_save=["lm_head"])
    layer = ours.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, BaseTunerLayer)
    assert isinstance(layer, LoraLayer)
    assert not isinstance(layer.base_layer, LoraLayer)
    assert isinstance(ours.base_model, LoraModel)
    assert issubclass(LoraModel, BaseTuner)
    assert isinstance(ours.model.lm_head, ModulesToSaveWrapper)
    assert get_peft_model_state_dict is fastpeft.get_peft_model_state_dict


def test_importing_is_cheap() -> None:
    code = (
        "import sys, time, fastpeft; "
        "assert 'torch' not in sys.modules; "
        "fastpeft.get_peft_model; fastpeft.LoraConfig; "
        "bad = {'transformers', 'bitsandbytes', 'peft', 'triton', 'accelerate', 'huggingface_hub'} & set(sys.modules); "
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
