"""One variant of one and the same Trainer script in a process of its own, driven over pipes by dropin.py.

`Trainer.train` runs once; before each step it waits for its turn. Protocol: a JSON object a line each way.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
import warnings
from typing import Any

from .worker import TARGETS, memory_mib, reset_peak


def adapted(variant: str, folder: str, dropout: float) -> Any:
    """SmolLM2 in bitsandbytes' NF4, bfloat16, with float32 adapters on all linear layers, as a variant has it."""
    import fastpeft
    import peft
    import torch
    import transformers

    from ..bnb import use_kernel

    use_kernel()
    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cpu", quantization_config=quantised
    )
    package: Any = fastpeft if variant == "ours" else peft
    torch.manual_seed(0)
    model = package.get_peft_model(base, package.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=dropout, target_modules=TARGETS, task_type="CAUSAL_LM"
    ))  # fmt: skip
    if variant == "patch":
        fastpeft.patch(model)
    elif variant == "patch, layers, loss":
        fastpeft.patch(model, layers=True, loss=True)
    elif variant in ("PEFT, layers, loss", "ours"):
        fastpeft.accelerate(model, loss=True)
    elif variant != "PEFT":
        raise ValueError(f"no variant {variant!r}")
    return model


def train(model: Any, rows: int, length: int, answers: Any) -> None:
    """The script: Trainer over random tokens, each of which is learned, until the other end has had enough."""
    import torch
    import transformers

    ids = torch.randint(0, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(5))
    data = [{"input_ids": row, "labels": row} for row in ids] * 1000
    losses: list[float] = []

    class Turns(transformers.TrainerCallback):
        start = cpu = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step and sys.stdin.readline().strip() in ("end", ""):
                raise KeyboardInterrupt
            self.start, self.cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            took = {"s": time.perf_counter() - self.start, "cpu_s": time.process_time() - self.cpu}
            reply = {**took, "loss": losses[-1], "peak_mib": memory_mib("VmHWM")}
            print(json.dumps(reply if state.global_step > 1 else {"ready": True}), file=answers, flush=True)

    class Script(transformers.Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses[:] = [float(loss)]
            return loss

    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            folder, per_device_train_batch_size=rows, max_steps=len(data) // rows, learning_rate=1e-4, use_cpu=True,
            lr_scheduler_type="constant", logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
            optim="adamw_torch_fused", dataloader_pin_memory=False, seed=0,
        )  # fmt: skip
        trainer = Script(model=model, args=options, train_dataset=data, callbacks=[Turns()])
        reset_peak()
        trainer.train()


def main() -> None:
    warnings.simplefilter("ignore")
    task = json.loads(sys.stdin.readline())
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries that print must not break the protocol
    import bitsandbytes
    import fastpeft
    import peft
    import torch
    import transformers

    names = (transformers.Trainer, transformers.AutoModelForCausalLM, peft.LoraConfig, fastpeft.LoraConfig)
    assert all(names)
    assert bitsandbytes.nn.Linear4bit is not None
    torch.set_num_threads(task["threads"])
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    reset_peak()
    print(json.dumps({"imported_mib": memory_mib("VmRSS")}), file=answers, flush=True)
    model = adapted(task["variant"], task["folder"], task["dropout"])
    with contextlib.suppress(KeyboardInterrupt):
        train(model, task["rows"], task["length"], answers)


if __name__ == "__main__":
    main()
