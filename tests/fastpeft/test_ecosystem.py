"""fastpeft inside of what others train and draw with: transformers' Trainer, TRL, diffusers, datasets.

Small models with random weights, nothing downloaded. `make test-ecosystem` runs it. Beside PEFT where both work; what
only PEFT can is marked xfail, strictly, so that the mark goes when it works.
"""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from peft_kernels.testing import assert_same_bits

pytestmark = pytest.mark.ecosystem
peft_tools = runpy.run_path(str(Path(__file__).with_name("peft_tools.py")))
assert_as_good, assert_same_start, randomise = (
    peft_tools[n] for n in ("assert_as_good", "assert_same_start", "randomise")
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NOT_PEFTS = "transformers, TRL and diffusers ask with isinstance for PEFT's own classes, which fastpeft's are not yet"


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def tokenizer() -> Any:
    """A letter is a token."""
    from tokenizers import Tokenizer as Tokens
    from tokenizers import models, pre_tokenizers

    tokens = Tokens(models.WordLevel({"<pad>": 0, "<eos>": 1, **{c: i + 2 for i, c in enumerate(LETTERS)}}, "<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>")


def texts(**columns: list[str]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(columns or {"text": [LETTERS[i : i + 6] for i in range(8)]})


def rows() -> Any:
    """Token ids with labels, as a dataset of the package datasets."""
    from datasets import Dataset

    ids = [[2 + (i + j) % 26 for j in range(6)] for i in range(8)]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 6] * 8, "labels": ids})


def lora(library: Any, **options: Any) -> Any:
    return library.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], **options)


def adapted(library: Any) -> Any:
    base = llama()
    torch.manual_seed(1)
    return library.get_peft_model(base, lora(library, task_type="CAUSAL_LM"))


COMMON = {
    "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True, "optim": "sgd",
    "logging_steps": 1, "lr_scheduler_type": "constant", "learning_rate": 1.0,
}  # fmt: skip


def trainer(model: Any, folder: Path, steps: int = 3, **options: Any) -> Any:
    """transformers' Trainer; it must be told to keep the columns, since a fastpeft model's forward names none."""
    options = {"remove_unused_columns": False, "save_strategy": "no", **options}
    arguments = transformers.TrainingArguments(str(folder), max_steps=steps, **COMMON, **options)
    return transformers.Trainer(model, arguments, train_dataset=rows())


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in sorted(model.named_parameters()) if p.requires_grad}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(2, 20).view(2, 9)).logits


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
    model = adapted(fastpeft)
    trainer(model, tmp_path).train()
    model.save_pretrained(tmp_path / "adapter")
    plain = llama()
    plain.load_adapter(str(tmp_path / "adapter"))
    assert_as_good([logits(model)], [logits(plain)], [logits(plain.double())])


def sft(model: Any, folder: Path, **options: Any) -> Any:
    import trl

    arguments = trl.SFTConfig(str(folder), max_steps=2, bf16=False, save_strategy="no", **COMMON)
    return trl.SFTTrainer(model, args=arguments, train_dataset=texts(), processing_class=tokenizer(), **options)


def test_what_trl_trained_loads_here(tmp_path: Path) -> None:
    made = sft(llama(), tmp_path, peft_config=lora(peft, task_type="CAUSAL_LM"))
    made.train()
    made.save_model(str(tmp_path / "adapter"))
    loaded = fastpeft.PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    theirs = made.model.float()
    assert not torch.equal(logits(loaded), logits(llama()))
    assert_as_good([logits(loaded)], [logits(theirs)], [logits(copy.deepcopy(theirs).double())])


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


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


# ---- what PEFT can and fastpeft cannot yet -----------------------------------------------------------------------


def the_trainer_finds_the_columns(folder: Path) -> None:
    trainer(adapted(fastpeft), folder, remove_unused_columns=True).train()


def the_trainer_saves_an_adapter(folder: Path) -> None:
    made = trainer(adapted(fastpeft), folder)
    made.save_model(str(folder / "saved"))
    assert (folder / "saved" / "adapter_model.safetensors").exists()


def trl_takes_a_configuration(folder: Path) -> None:
    sft(llama(), folder, peft_config=lora(fastpeft, task_type="CAUSAL_LM")).train()


def trl_takes_an_adapted_model(folder: Path) -> None:
    sft(adapted(fastpeft), folder).train()


def trl_prefers_without_a_second_model(folder: Path) -> None:
    import trl

    pairs = texts(prompt=["ab"] * 4, chosen=["cd"] * 4, rejected=["ef"] * 4)
    arguments = trl.DPOConfig(str(folder), max_steps=1, bf16=False, save_strategy="no", **COMMON)
    trl.DPOTrainer(adapted(fastpeft), args=arguments, train_dataset=pairs, processing_class=tokenizer()).train()


def transformers_adds_an_adapter(folder: Path) -> None:
    llama().add_adapter(lora(fastpeft))


def diffusers_adds_an_adapter(folder: Path) -> None:
    unet().add_adapter(fastpeft.LoraConfig(r=4, target_modules=["to_q"]))


@pytest.mark.parametrize("what", [
    pytest.param(what, id=what.__name__, marks=pytest.mark.xfail(strict=True, raises=error, reason=reason))
    for what, error, reason in (
        (the_trainer_finds_the_columns, ValueError, "the columns are found by the names of forward's arguments"),
        (the_trainer_saves_an_adapter, AssertionError, NOT_PEFTS),
        (trl_takes_a_configuration, TypeError, NOT_PEFTS),
        (trl_takes_an_adapted_model, AttributeError, NOT_PEFTS),
        (trl_prefers_without_a_second_model, OSError, NOT_PEFTS),
        (transformers_adds_an_adapter, TypeError, NOT_PEFTS),
        (diffusers_adds_an_adapter, ValueError, NOT_PEFTS),
    )
])  # fmt: skip
def test_not_yet(what: Callable[[Path], None], tmp_path: Path) -> None:
    what(tmp_path)
