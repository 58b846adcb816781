"""Memory of a training process beside its model: Python, torch, transformers, a tokenizer, threads.

`python -m fastpeft.apps.estimate.process` takes a step of a very small model and prints the peak of its process.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any


@cache
def process_bytes() -> int:
    """The peak of a process that imports what training does and takes a step of next to nothing, in bytes."""
    done = subprocess.run([sys.executable, "-m", __name__], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def _step() -> None:
    import dataclasses

    import torch
    import transformers

    from ... import LoraConfig, get_peft_model, quantize_model
    from ..training import checkpoints, loop, run  # noqa: F401  # what a run has in memory
    from ..training.config import TrainConfig
    from ..training.forward import CompletionLoss
    from ..training.metrics import peak_memory_mb
    from ..training.models import speed_up
    from ..training.optim import make_optimizer
    from ..training.packing import Batch

    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    base: Any = transformers.AutoModelForCausalLM.from_config(config)
    model = get_peft_model(quantize_model(base.requires_grad_(False)), LoraConfig(r=4, target_modules="all-linear"))
    speed_up(model)
    optimizer = make_optimizer(model.named_parameters(), TrainConfig("-", "-"))
    ids = torch.zeros(1, 64, dtype=torch.long)
    batch = Batch(ids, torch.arange(64)[None], torch.arange(63), ids[0, 1:], 64)
    assert dataclasses.is_dataclass(batch)
    CompletionLoss(model.train())(batch).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    print(_peak() or round(1e6 * peak_memory_mb(torch.device("cpu"))))


def _peak() -> int:
    """This process's peak where Linux says it: that of getrusage begins with the memory of the process that started it.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


if __name__ == "__main__":
    _step()
