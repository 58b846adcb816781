"""A program that somebody wrote for PEFT: it knows of nothing else. `python peft_program.py FOLDER CASE...` prints each
case's numbers as a line of JSON. Small models with random weights, nothing downloaded.
"""

from __future__ import annotations

import copy
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
COMMON = {
    "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "optim": "sgd",
    "logging_steps": 1, "lr_scheduler_type": "constant", "learning_rate": 1.0, "save_strategy": "no",
}  # fmt: skip
CASES: dict[str, Callable[[Path], Any]] = {}


def case(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    CASES[function.__name__] = function
    return function


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def tokenizer() -> Any:
    """A letter is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, **{c: i + 2 for i, c in enumerate(LETTERS)}}, "<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>")


def filled(model: nn.Module) -> nn.Module:
    """The same values in every adapter, whoever made it: a small wave by the position in the tensor."""
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.requires_grad and ("lora_" in name or "modules_to_save" in name or "trainable_tokens" in name):
                p.copy_(0.05 * torch.sin(torch.arange(p.numel()) + len(name)).view_as(p))
    return model


def adapted(**options: Any) -> Any:
    return filled(peft.get_peft_model(llama(), peft.LoraConfig(**{**LORA, "task_type": "CAUSAL_LM", **options})))


def numbers(model: Any) -> list[float]:
    """A few of its logits."""
    with torch.no_grad():
        y: Tensor = model.eval()(input_ids=torch.arange(2, 20).view(2, 9)).logits
    return [float(v) for v in y[0, -1, :8]]


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def arguments(cls: Any, folder: Path, **options: Any) -> Any:
    return cls(str(folder), **{"max_steps": 3, **COMMON, **options})


def rows() -> list[dict[str, Any]]:
    ids = [[2 + (i + j) % 26 for j in range(6)] for i in range(8)]
    return [{"input_ids": one, "attention_mask": [1] * 6, "labels": one} for one in ids]


def dataset(**columns: list[Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(columns or {"text": [LETTERS[i : i + 6] for i in range(8)]})


@case
def adapters_of_transformers(folder: Path) -> Any:
    """add_adapter, set_adapter, disable and enable, save, load, delete."""
    model = llama()
    found = [numbers(model)]
    model.add_adapter(peft.LoraConfig(**LORA), "one")
    filled(model)
    found.append(numbers(model))
    model.add_adapter(peft.LoraConfig(**{**LORA, "r": 2}), "two")
    model.set_adapter("one")
    assert model.active_adapters() == ["one"]
    model.disable_adapters()
    found.append(numbers(model))
    model.enable_adapters()
    found.append(numbers(model))
    model.delete_adapter("two")
    assert list(model.peft_config) == ["one"]
    model.save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").exists()
    again = llama()
    report = again.load_adapter(str(folder), adapter_name="again")
    assert not report.missing_keys
    assert not report.unexpected_keys
    found.append(numbers(again))
    again.load_adapter(adapter_state_dict=model.get_adapter_state_dict("one"), peft_config=peft.LoraConfig(**LORA))
    again.set_adapter("default")
    found.append(numbers(again))
    return found


@case
def files_with_more_than_an_adapter(folder: Path) -> Any:
    """DoRA, modules_to_save and trained rows through transformers' load_adapter."""
    found = []
    for i, options in enumerate(({"use_dora": True}, {"modules_to_save": ["lm_head"]},
                                 {"trainable_token_indices": {"embed_tokens": [3, 5]}})):  # fmt: skip
        model = adapted(**options)
        model.save_pretrained(folder / str(i))
        plain = llama()
        report = plain.load_adapter(str(folder / str(i)))
        assert not report.missing_keys, report.missing_keys
        assert not report.unexpected_keys, report.unexpected_keys
        found += [numbers(model), numbers(plain)]
    return found


@case
def tensors_that_layers_share(folder: Path) -> Any:
    """VB-LoRA, UniLoRA, TinyLoRA and VeRA through transformers' load_adapter."""
    found = []
    for name, options in (("VBLoRA", {"r": 2, "num_vectors": 8, "vector_length": 16}), ("UniLora", {}),
                          ("TinyLora", {}), ("Vera", {})):  # fmt: skip
        config = getattr(peft, f"{name}Config")(target_modules=["q_proj", "v_proj"], **options)
        model = peft.get_peft_model(llama(), config)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.sin(torch.arange(p.numel())).view_as(p))
        model.save_pretrained(folder / name)
        plain = llama()
        report = plain.load_adapter(str(folder / name))
        assert not report.missing_keys, report.missing_keys
        assert not report.unexpected_keys, report.unexpected_keys
        found += [numbers(model), numbers(plain)]
    return found


@case
def hotswap(folder: Path) -> Any:
    first, second = adapted(), adapted()
    with torch.no_grad():
        for p in second.parameters():
            p.mul_(2.0 if p.requires_grad else 1.0)
    first.save_pretrained(folder / "one")
    second.save_pretrained(folder / "two")
    model = llama()
    model.load_adapter(str(folder / "one"))
    found = [numbers(model)]
    model.load_adapter(str(folder / "two"), adapter_name="default", hotswap=True)
    return [*found, numbers(model), numbers(second)]


@case
def pipeline(folder: Path) -> Any:
    """From a folder that holds an adapter alone, and names its base."""
    base = llama()
    base.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder / "base"),
                                peft.LoraConfig(**LORA, task_type="CAUSAL_LM"))  # fmt: skip
    filled(model).save_pretrained(folder / "adapter")
    tokenizer().save_pretrained(folder / "adapter")
    pipe = transformers.pipeline("text-generation", str(folder / "adapter"), device="cpu")
    text = pipe("abc", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "adapter")
    return [numbers(model), numbers(loaded), numbers(pipe.model), [float(ord(c)) for c in text]]


@case
def trainer(folder: Path) -> Any:
    """It trains, resumes, takes the best model, and saves an adapter only."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
               "load_best_model_at_end": True, "label_smoothing_factor": 0.1}  # fmt: skip
    def make(where: str, **more: Any) -> Any:
        settings = arguments(transformers.TrainingArguments, folder / where, **{**options, **more})
        return transformers.Trainer(adapted(), settings, train_dataset=rows(), eval_dataset=rows())

    first = make("first")
    found = [losses(first), numbers(first.model)]
    files = {p.name for p in (folder / "first" / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    second = make("second", load_best_model_at_end=False)
    second.train(resume_from_checkpoint=str(folder / "first" / "checkpoint-2"))
    return [*found, numbers(second.model)]


@case
def copies(folder: Path) -> Any:
    model = adapted()
    return [numbers(model), numbers(copy.deepcopy(model)), numbers(pickle.loads(pickle.dumps(model)))]


@case
def accelerate_knows_it(folder: Path) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import is_peft_model

    model = Accelerator(cpu=True).prepare(adapted())
    assert is_peft_model(model)
    assert not is_peft_model(llama())
    return numbers(model)


@case
def sft(folder: Path) -> Any:
    import trl

    made = trl.SFTTrainer(
        llama(), arguments(trl.SFTConfig, folder, bf16=False), train_dataset=dataset(), processing_class=tokenizer(),
        peft_config=peft.LoraConfig(**LORA, task_type="CAUSAL_LM"),
    )  # fmt: skip
    filled(made.model)
    found = losses(made)
    made.save_model(str(folder / "adapter"))
    loaded = peft.PeftModel.from_pretrained(llama(), str(folder / "adapter"))
    own = trl.SFTTrainer(
        adapted(), arguments(trl.SFTConfig, folder, bf16=False), train_dataset=dataset(), processing_class=tokenizer()
    )
    return [found, numbers(made.model), numbers(loaded), losses(own)]


@case
def preferences(folder: Path) -> Any:
    """DPO: the reference is the model without its adapter."""
    import trl

    pairs = dataset(prompt=["ab"] * 4, chosen=["cd"] * 4, rejected=["ef"] * 4)
    options = arguments(trl.DPOConfig, folder, bf16=False)
    made = trl.DPOTrainer(adapted(), args=options, train_dataset=pairs, processing_class=tokenizer())
    return [losses(made), numbers(made.model)]


@case
def grpo(folder: Path) -> Any:
    """It imports, and trains a step; its samples are random, so there is no number to compare."""
    import trl

    options = arguments(trl.GRPOConfig, folder, bf16=False, max_steps=1, num_generations=2, max_completion_length=4,
                        learning_rate=0.01)  # fmt: skip
    made = trl.GRPOTrainer(
        llama(), reward_funcs=lambda completions, **_: [float(len(set(c))) for c in completions], args=options,
        train_dataset=dataset(prompt=["ab", "cd"] * 2), processing_class=tokenizer(),
        peft_config=peft.LoraConfig(**LORA, task_type="CAUSAL_LM"),
    )  # fmt: skip
    made.train()
    assert isinstance(made.model, peft.PeftModel)
    return []


@case
def diffusers(folder: Path) -> Any:
    from diffusers import UNet2DConditionModel

    def unet() -> Any:
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=4,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip

    def picture(model: Any) -> list[float]:
        torch.manual_seed(2)
        with torch.no_grad():
            y = model(torch.randn(1, 4, 8, 8), 5, encoder_hidden_states=torch.randn(1, 3, 16)).sample
        return [float(v) for v in y.flatten()[:8]]

    model = unet()
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "conv1", "proj_in"]), "one")
    found = [picture(filled(model))]
    model.set_adapters(["one"], [0.5])
    found.append(picture(model))
    model.disable_adapters()
    found.append(picture(model))
    model.enable_adapters()
    model.fuse_lora()
    found.append(picture(model))
    model.unfuse_lora()
    model.save_lora_adapter(folder, "one")
    again = unet()
    name = "pytorch_lora_weights.safetensors"
    again.load_lora_adapter(str(folder), prefix=None, adapter_name="again", weight_name=name)
    found.append(picture(again))
    again.delete_adapters("again")
    return [*found, picture(again)]


def main() -> None:
    folder, *wanted = sys.argv[1:]
    for name in wanted:
        try:
            told = {"found": CASES[name](Path(folder) / name)}
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"case": name, "transformers": transformers.__version__, **told}), flush=True)


if __name__ == "__main__":
    main()
