"""fastpeft inside of what others train and draw with: transformers' Trainer, TRL, diffusers, datasets.

Small models with random weights, nothing downloaded. `make test-ecosystem` runs it. Beside PEFT where both work; what
only PEFT can is marked xfail, strictly, so that the mark goes when it works.
"""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
import transformers
from peft_versions import needs_peft
from torch import Tensor, nn

from peft_kernels.testing import assert_same_bits

pytestmark = pytest.mark.ecosystem
NO_CONVERSION = "transformers' load_adapter imports peft.utils.transformers_weight_conversion"
peft_tools = runpy.run_path(str(Path(__file__).with_name("peft_tools.py")))
assert_as_good, assert_same_start, randomise = (
    peft_tools[n] for n in ("assert_as_good", "assert_same_start", "randomise")
)
tools = runpy.run_path(str(Path(__file__).with_name("ecosystem_tools.py")))
COMMON, adapted, llama, logits, lora, sft, texts, tokenizer, trained, trainer, unet = (
    tools[n]
    for n in ("COMMON", "adapted", "llama", "logits", "lora", "sft", "texts", "tokenizer", "trained", "trainer",
              "unet")
)
IDS = torch.arange(2, 20).view(2, 9)


def test_trainer_trains_as_it_trains_pefts(tmp_path: Path) -> None:
    ours, theirs = adapted(fastpeft), adapted(peft)
    assert_same_start(ours, theirs)
    exact, before = copy.deepcopy(theirs).double(), trained(ours)
    for model in (ours, theirs, exact):
        trainer(model, tmp_path).train()
    found = [trained(model) for model in (ours, theirs, exact)]
    assert found[0].keys() == found[1].keys()
    assert all(not torch.equal(found[0][name], before[name]) for name in before)
    assert_as_good(*[list(tensors.values()) for tensors in found])


def test_trainer_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    whole = adapted(fastpeft)
    trainer(whole, tmp_path / "whole", steps=4).train()
    first = trainer(adapted(fastpeft), tmp_path / "parts", steps=4, save_strategy="steps", save_steps=2)
    first.train()
    resumed = adapted(fastpeft)
    trainer(resumed, tmp_path / "again", steps=4).train(resume_from_checkpoint=str(tmp_path / "parts/checkpoint-2"))
    expected = trained(whole)
    for name, value in trained(resumed).items():
        assert_same_bits(value, expected[name])


def test_what_trainer_trained_loads_into_a_plain_transformers_model(tmp_path: Path) -> None:
    """Through transformers' own `load_adapter`, which is PEFT's."""
    needs_peft(">=0.19", NO_CONVERSION)
    model = adapted(fastpeft)
    trainer(model, tmp_path).train()
    model.save_pretrained(tmp_path / "adapter")
    plain = llama()
    plain.load_adapter(str(tmp_path / "adapter"))
    assert_as_good([logits(model)], [logits(plain)], [logits(plain.double())])


def test_what_trl_trained_loads_here(tmp_path: Path) -> None:
    made = sft(llama(), tmp_path, peft_config=lora(peft, task_type="CAUSAL_LM"))
    made.train()
    made.save_model(str(tmp_path / "adapter"))
    loaded = fastpeft.PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    theirs = made.model.float()
    assert not torch.equal(logits(loaded), logits(llama()))
    assert_as_good([logits(loaded)], [logits(theirs)], [logits(copy.deepcopy(theirs).double())])


def adapted_unet(library: Any, base: nn.Module, **options: Any) -> Any:
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]  # linear and convolutions
    torch.manual_seed(1)
    return library.get_peft_model(base, library.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options))


def noise(model: Any) -> list[Tensor]:
    """The output of a step of diffusion and the adapter's gradients."""
    dtype = next(model.parameters()).dtype
    torch.manual_seed(2)
    x, context, dy = (torch.randn(shape).to(dtype) for shape in ((2, 4, 8, 8), (2, 3, 16), (2, 4, 8, 8)))
    y = model(x, 5, encoder_hidden_states=context).sample
    y.backward(dy)
    return [y.detach(), *(p.grad for _, p in sorted(model.named_parameters()) if p.requires_grad)]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_unet_is_adapted_as_pefts_is(options: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = (adapted_unet(library, unet(), **options) for library in (fastpeft, peft))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    randomise(ours, theirs)
    results = [noise(model) for model in (ours, theirs, copy.deepcopy(theirs).double())]
    largest = [exact.abs().max() for exact in results[2]]
    # Errors come in from every layer, so PEFT's own are taken over the whole model: all tensors, each by its largest.
    whole = [[torch.cat([(t / by).flatten() for t, by in zip(r, largest, strict=True)])] for r in results]
    assert_as_good(*whole)
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(unet(), tmp_path)
    for key, value in theirs.state_dict().items():
        assert_same_bits(loaded.state_dict()[key], value)


# ---- what others ask with isinstance of PEFT's classes ------------------------------------------------------------


def test_the_trainer_finds_the_columns_and_saves_an_adapter(tmp_path: Path) -> None:
    made = trainer(adapted(fastpeft), tmp_path)
    columns = made._remove_unused_columns(made.train_dataset).column_names
    assert set(columns) == {"input_ids", "attention_mask", "labels"}
    made.train()
    made.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "saved" / "model.safetensors").exists()


def test_trl_takes_our_configuration(tmp_path: Path) -> None:
    """PEFT's own `get_peft_model`, which TRL holds, makes PEFT's model of it, as of PEFT's configuration."""
    made = [sft(llama(), tmp_path, peft_config=lora(library, task_type="CAUSAL_LM")) for library in (fastpeft, peft)]
    assert [type(m.model) for m in made] == [peft.PeftModelForCausalLM] * 2


def test_transformers_takes_our_configuration(tmp_path: Path) -> None:
    from packaging.version import Version
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):  # then transformers refuses PEFT's configuration as well
        for library in (fastpeft, peft):
            with pytest.raises(ValueError, match="version of PEFT you are using is not compatible"):
                llama().add_adapter(lora(library))
        return
    models = [llama(), llama()]
    for model, library in zip(models, (fastpeft, peft), strict=True):
        torch.manual_seed(1)
        model.add_adapter(lora(library, init_lora_weights=False))
    assert_same_bits(logits(models[0]), logits(models[1]))
    models[0].save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    for config in (None, fastpeft.PeftConfig.from_pretrained(tmp_path / "adapter")):
        loaded = llama()
        loaded.load_adapter(str(tmp_path / "adapter"), peft_config=config)
        assert_same_bits(logits(loaded), logits(models[0]))


def test_pipelines_take_our_models_and_their_folders(tmp_path: Path) -> None:
    needs_peft(">=0.19", NO_CONVERSION)
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = fastpeft.get_peft_model(base, lora(fastpeft, task_type="CAUSAL_LM")).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer().save_pretrained(tmp_path / "adapter")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_tensors": True}
    made = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer())
    texts = [made("abc", **options)]
    # A folder with an adapter is read by PEFT, which transformers asks for its layers.
    for source in (str(tmp_path / "adapter"), peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter")):
        other = transformers.pipeline("text-generation", model=source, tokenizer=tokenizer())
        texts.append(other("abc", **options))
    assert texts[0] == texts[1] == texts[2]
    assert texts[0] != transformers.pipeline("text-generation", model=llama(), tokenizer=tokenizer())("abc", **options)


def test_pefts_helpers_take_our_models(tmp_path: Path) -> None:
    from peft import helpers
    from peft.utils import hotswap

    ours, theirs = (adapted(library, init_lora_weights=False) for library in (fastpeft, peft))
    exact = copy.deepcopy(theirs).double()
    halved = []
    for model in (ours, theirs, exact):
        with helpers.rescale_adapter_scale(model, 0.5):
            halved.append([logits(model)])
    assert_as_good(*halved)
    theirs.save_pretrained(tmp_path)
    swapped = adapted(fastpeft)
    hotswap.hotswap_adapter(swapped, str(tmp_path), "default", torch_device="cpu")
    assert_as_good([logits(swapped)], [logits(theirs)], [logits(exact)])
    with torch.no_grad():
        assert_as_good([torch.compile(ours)(input_ids=IDS).logits], [logits(theirs)], [logits(exact)])


def test_fsdps_plugin_is_told_what_to_wrap() -> None:
    from types import SimpleNamespace

    from transformers.distributed.fsdp import update_fsdp_plugin_peft

    plugin = SimpleNamespace(auto_wrap_policy=None)
    update_fsdp_plugin_peft(adapted(fastpeft), SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    assert plugin.auto_wrap_policy(module=nn.Linear(2, 2, bias=False), recurse=False, nonwrapped_numel=4)


def test_accelerate_knows_our_models(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.utils import fsdp_utils, is_peft_model

    model = adapted(fastpeft)
    assert is_peft_model(model)
    found = fsdp_utils._get_model_state_dict(model, adapter_only=True)
    expected = fastpeft.get_peft_model_state_dict(model)
    assert found.keys() == expected.keys()
    wanted = {key: torch.randn_like(value) for key, value in found.items()}
    fsdp_utils._set_model_state_dict(model, wanted, adapter_only=True)
    for key, value in fastpeft.get_peft_model_state_dict(model).items():
        assert_same_bits(value, wanted[key])
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    assert isinstance(accelerator.unwrap_model(prepared), peft.PeftModel)
    accelerator.save_state(str(tmp_path))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    accelerator.load_state(str(tmp_path))
    for key, value in fastpeft.get_peft_model_state_dict(model).items():
        assert_same_bits(value, wanted[key])
