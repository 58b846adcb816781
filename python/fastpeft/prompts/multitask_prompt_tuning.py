"""Multitask prompt tuning: a prompt that tasks share, times a low-rank matrix for each task (arXiv 2303.02861)."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import bins
from ..files.checks import AdapterFileError
from ..files.safetensors import check_finite, read_header, read_tensors
from .encoder import PROMPT
from .prompt_tuning import PromptEmbedding, PromptTuning, PromptTuningConfig


class MultitaskPromptTuningInit(str, enum.Enum):
    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


_FROM_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig, own_type="MULTITASK_PROMPT_TUNING"):
    """prompt_tuning_init: as prompt tuning, or from a prompt of other tasks: the mean of their matrices
    (AVERAGE_SOURCE_TASKS), those of one of them, `prompt_tuning_init_task` (EXACT_SOURCE_TASK), or its shared part
    alone (ONLY_SOURCE_SHARED). prompt_tuning_init_state_dict_path: that prompt's adapter_model.safetensors.
    num_ranks, num_tasks: of the matrices.
    """

    prompt_tuning_init: MultitaskPromptTuningInit | str = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1


class MultitaskPromptEmbedding(PromptEmbedding):
    """The shared prompt [tokens, token_dim], and columns [tasks, tokens, ranks] and rows [tasks, ranks, token_dim]."""

    def __init__(self, config: Any, word_embeddings: Any) -> None:
        super().__init__(config, word_embeddings)
        tokens, width = self.embedding.weight.shape
        self.num_tasks, self.num_ranks = config.num_tasks, config.num_ranks
        self.prefix_task_cols = nn.Parameter(torch.normal(0.0, 0.02, (self.num_tasks, tokens, self.num_ranks)))
        self.prefix_task_rows = nn.Parameter(torch.normal(0.0, 0.02, (self.num_tasks, self.num_ranks, width)))
        if config.prompt_tuning_init in _FROM_SOURCE and not (config.inference_mode or self.embedding.weight.is_meta):
            self._start(config)

    def _start(self, config: Any) -> None:
        found = _source(config)
        names = {PROMPT: self.embedding.weight}
        if config.prompt_tuning_init != "ONLY_SOURCE_SHARED":
            names |= {"prefix_task_cols": self.prefix_task_cols, "prefix_task_rows": self.prefix_task_rows}
        for name, target in names.items():
            if (value := found.get(name)) is None:
                raise ValueError(f"{config.prompt_tuning_init_state_dict_path} has no {name!r}")
            if name != PROMPT:
                task = config.prompt_tuning_init_task
                if config.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
                    value = value.mean(0, keepdim=True)
                elif not 0 <= task < len(value):
                    raise ValueError(f"`prompt_tuning_init_task` should be below {len(value)}, got {task}")
                else:
                    value = value[task : task + 1]
            if value.shape != target.shape:
                raise ValueError(
                    f"{config.prompt_tuning_init_state_dict_path}: {name} is {tuple(value.shape)}, the adapter needs "
                    f"{tuple(target.shape)}"
                )
            with torch.no_grad():
                target.copy_(value)

    def forward(self, indices: Tensor, task_ids: Tensor | None) -> Tensor:  # type: ignore[override]
        """The prompts of tasks [rows, tokens, token_dim]. Raises ValueError without `task_ids` [rows], or one of an
        unknown task."""
        if task_ids is None:
            raise ValueError("task_ids cannot be None")
        ids = torch.as_tensor(task_ids, device=self.prefix_task_cols.device).reshape(-1)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_tasks:
            raise ValueError(f"`task_ids` should be from 0 to {self.num_tasks - 1}, got {ids.tolist()}")
        return self.embedding(indices) * (self.prefix_task_cols[ids] @ self.prefix_task_rows[ids])  # type: ignore[no-any-return]

    def prompt(self, task_ids: Tensor | None = None) -> Tensor:
        return self(torch.arange(self.embedding.num_embeddings, device=self.embedding.weight.device), task_ids)  # type: ignore[no-any-return]


def _source(config: Any) -> Mapping[str, Tensor]:
    path = config.prompt_tuning_init_state_dict_path
    if not path.endswith(".safetensors") and not bins.allowed():
        raise AdapterFileError(
            f"prompt_tuning_init_state_dict_path {path!r}: a .safetensors file was expected. A pickle can run code "
            "when it is loaded; `fastpeft convert-bin FOLDER` makes a safetensors file of one, and with "
            f"{bins.ALLOW_ENV}=1 another process reads it, as tensors only, under a memory limit."
        )
    found = read_tensors(read_header(path)) if path.endswith(".safetensors") else bins.read_bin(Path(path))
    check_finite(found, path)
    return found


class MultitaskPromptTuning(PromptTuning, config=MultitaskPromptTuningConfig):
    encoder_class = MultitaskPromptEmbedding
    starts = MultitaskPromptTuningInit
    takes_tasks = True
    counts = ("num_ranks", "num_tasks")

    def check_config(self, config: Any, loading: bool = False) -> None:
        super().check_config(config, loading)
        start = getattr(config.prompt_tuning_init, "value", config.prompt_tuning_init)
        if start in _FROM_SOURCE and config.prompt_tuning_init_state_dict_path is None and not loading:
            raise ValueError(f"prompt_tuning_init_state_dict_path needs to be specified with {start} init method")

    def to_file(self, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {PROMPT if name == "embedding.weight" else name: t for name, t in tensors.items()}
