"""Tools of the tests inside of other libraries: small models with random weights, data, trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from peft_program import LETTERS, llama, tokenizer
from torch import Tensor, nn


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


def adapted(library: Any, **options: Any) -> Any:
    base = llama()
    torch.manual_seed(1)
    return library.get_peft_model(base, lora(library, task_type="CAUSAL_LM", **options))


COMMON = {
    "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True, "optim": "sgd",
    "logging_steps": 1, "lr_scheduler_type": "constant", "learning_rate": 1.0,
}  # fmt: skip


def trainer(model: Any, folder: Path, steps: int = 3, **options: Any) -> Any:
    """transformers' Trainer, options: of its arguments, and two of its own."""
    options = {"save_strategy": "no", **COMMON, **options}
    own = {name: options.pop(name) for name in ("eval_dataset", "compute_metrics") if name in options}
    arguments = transformers.TrainingArguments(str(folder), max_steps=steps, **options)
    return transformers.Trainer(model, arguments, train_dataset=rows(), **own)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in sorted(model.named_parameters()) if p.requires_grad}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(2, 20).view(2, 9)).logits


def trl_trainer(
    kind: str, model: Any, folder: Path, data: Any, steps: int = 3, given: dict[str, Any] | None = None, **options: Any
) -> Any:  # fmt: skip
    """TRL's trainer of a kind ("SFT"). options: of its arguments; given: of itself."""
    import trl

    options = {"max_steps": steps, "bf16": False, "save_strategy": "no", **COMMON, **options}
    arguments = getattr(trl, f"{kind}Config")(str(folder), **options)
    made = getattr(trl, f"{kind}Trainer")
    return made(model, args=arguments, train_dataset=data, processing_class=tokenizer(), **(given or {}))


def sft(model: Any, folder: Path, steps: int = 2, **given: Any) -> Any:
    return trl_trainer("SFT", model, folder, texts(), steps, given)


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def losses(made: Any, key: str = "loss") -> list[float]:
    """The losses that a trainer logged."""
    return [entry[key] for entry in made.state.log_history if key in entry]
