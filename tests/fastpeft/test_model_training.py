"""Training, preparing, copying and compiling an adapted model; the public names."""

from __future__ import annotations

import copy
import io
import pickle
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from fastpeft import LoraConfig, PeftModel, get_peft_model

from peft_kernels.testing import assert_no_worse

tools = runpy.run_path(str(Path(__file__).with_name("model_tools.py")))
X, llama, config, pair = (
    tools[name] for name in ("X", "llama", "config", "pair")
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
    assert isinstance(fastpeft.get_peft_config({"peft_type": "CARTRIDGE"}), fastpeft.CartridgeConfig)
    assert issubclass(fastpeft.PeftMixedModel, PeftModel)


def test_names_are_found_where_scripts_look_for_them() -> None:
    from fastpeft.tuners import BOFTConfig
    from fastpeft.tuners.ia3 import IA3Config, IA3Layer
    from fastpeft.tuners.lora import Embedding, Linear, LoraLayer, LoraModel
    from fastpeft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from fastpeft.utils import (
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS,
    )
    from fastpeft.utils import ModulesToSaveWrapper, get_peft_model_state_dict

    ours, _ = pair(modules_to_save=["lm_head"])
    layer = ours.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, BaseTunerLayer)
    assert isinstance(layer, LoraLayer)
    assert isinstance(layer, Linear)
    assert not isinstance(layer, Embedding)
    assert not isinstance(layer, IA3Layer)
    assert not isinstance(layer.base_layer, LoraLayer)
    assert (IA3Config, BOFTConfig) == (fastpeft.IA3Config, fastpeft.BOFTConfig)
    assert LORA_TARGETS["llama"] == ["q_proj", "v_proj"]
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
