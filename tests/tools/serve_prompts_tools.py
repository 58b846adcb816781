"""Prompt adapters for the tests of pool and server: folders that real PEFT wrote, and its answers with each alone."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

PROMPTS: dict[str, Any] = {
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=5),
    "single": lambda: peft.PromptTuningConfig(num_virtual_tokens=1),
    "mlp": lambda: peft.PromptEncoderConfig(num_virtual_tokens=20, encoder_hidden_size=16),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=16),  # a whole page of the cache
    "projected": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8),
    "cartridge": lambda: peft.CartridgeConfig(num_virtual_tokens=35, num_frozen_tokens=2),
    "task": lambda: peft.MultitaskPromptTuningConfig(num_virtual_tokens=6, num_tasks=1, num_ranks=2),
    "cpt": lambda: peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[9, 8, 7], cpt_tokens_type_mask=[1, 2, 3]),
}


def write_prompt(model: Any, name: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A prompt of real PEFT's for a model, with random values."""
    torch.manual_seed(seed)
    config = PROMPTS[name]()
    config.task_type = "CAUSAL_LM"
    for field, value in changes.items():
        setattr(config, field, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model, config)
        if name == "task":  # it starts near the prompt's zeros
            made.prompt_encoder["default"].prefix_task_cols.data.normal_()
            made.prompt_encoder["default"].prefix_task_rows.data.normal_()
        made.save_pretrained(folder)
    return folder


def read_base(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


class PromptAlone:
    """Each prompt's answers when it is alone, by real PEFT's `generate`."""

    def __init__(self, root: Path) -> None:
        self.root, self.tokenizer = root, transformers.AutoTokenizer.from_pretrained(root / "model")
        self.model = functools.cache(self._model)

    def _model(self, name: str) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.PeftModel.from_pretrained(read_base(self.root / "model"), self.root / "adapters" / name).eval()

    def given(self, name: str) -> dict[str, Any]:
        return {"task_ids": torch.tensor([0])} if name.startswith("task") else {}

    def ids(self, name: str, prompt: str, tokens: int, model: Any = None) -> list[int]:
        """The tokens that real PEFT's model makes, or that of the same interface which is given."""
        inputs = self.tokenizer(prompt, return_tensors="pt")
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = (self.model(name) if model is None else model).generate(
                **inputs, max_new_tokens=tokens, do_sample=False, **self.given(name)
            )
        return found[0].tolist()[inputs["input_ids"].shape[1] :]

    def logprobs(self, name: str, prompt: str, ids: list[int], dtype: torch.dtype) -> torch.Tensor:
        """The logarithms of the tokens' probabilities, by real PEFT's forward."""
        model = self.model(name).to(dtype)
        sequence = torch.tensor([self.tokenizer(prompt)["input_ids"] + ids])
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits = model(input_ids=sequence, **self.given(name)).logits[0, -len(ids) - 1 : -1]
        self.model(name).float()
        return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
