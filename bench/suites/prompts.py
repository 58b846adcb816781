"""Prompts at PEFT's defaults before a small Llama: a training step beside PEFT's, and beside one of the frozen model
whose input is longer by as many real tokens, with gradients of that input.

Eight layers of SmolLM2-135M's sizes with random weights, 4 x 128 tokens and 32 virtual ones, float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..measure import Candidate
from ..results import Claim, Row

ROWS, LENGTH, VIRTUAL, VOCABULARY = 4, 128, 32, 8192
LIMIT = 1 / 1.1  # a step may cost 1.1 times that of as many real tokens
# What a configuration needs beside the number of virtual tokens, which CPT counts itself.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": {}, "P_TUNING": {}, "PREFIX_TUNING": {}, "CARTRIDGE": {},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 2},
    "CPT": {"cpt_token_ids": [*range(5, 5 + VIRTUAL)], "cpt_tokens_type_mask": [1, 2, 3, 4] * (VIRTUAL // 4)},
}  # fmt: skip


def base() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=9,
        num_key_value_heads=3, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def prompted(package: Any, name: str) -> Any:
    """The model with a prompt in training, by `package` (fastpeft or peft)."""
    length = {} if name == "CPT" else {"num_virtual_tokens": VIRTUAL}
    config = package.PEFT_TYPE_TO_CONFIG_MAPPING[name](task_type="CAUSAL_LM", **length, **ARGUMENTS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return package.get_peft_model(base(), config).train()


def step(model: Any, **given: Tensor) -> Callable[[], object]:
    wanted = [p for p in model.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(model(**given).loss, wanted)


def frozen_step(tokens: Tensor) -> Callable[[], object]:
    """A step of the frozen model, with gradients of the vectors of its tokens."""
    model = base().train().requires_grad_(False)
    embed = model.get_input_embeddings()

    def run() -> object:
        words = embed(tokens).requires_grad_()
        return torch.autograd.grad(model(inputs_embeds=words, labels=tokens).loss, [words])

    return run


def rows(names: list[str]) -> Iterator[Row]:
    """A row for each of these types of prompts."""
    import fastpeft
    import peft

    longer = torch.randint(5, VOCABULARY, (ROWS, LENGTH + VIRTUAL))
    ids = longer[:, :LENGTH].contiguous()
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    for name in names:
        more = {"task_ids": torch.zeros(ROWS, dtype=torch.long)} if name == "MULTITASK_PROMPT_TUNING" else {}
        more |= {"input_type_mask": torch.full_like(ids, 4)} if name == "CPT" else {}
        candidates = [Candidate("as many real tokens", [frozen_step(longer)])]
        candidates += [
            Candidate(who, [step(prompted(package, name), **given, **more)])
            for who, package in (("ours", fastpeft), ("PEFT", peft))
        ]
        claims = [Claim("PEFT", ["ours"], ["PEFT"], 1.0), Claim("tokens", ["ours"], ["as many real tokens"], LIMIT)]
        case = {"suite": "methods", "method": name, "tokens": LENGTH, "virtual": VIRTUAL}
        yield Row(f"{name} step, {ROWS} x ({VIRTUAL} + {LENGTH})", case, {}, claims, candidates=candidates)
