"""LoRA with transformers' Trainer: evaluation, checkpoints that hold the adapter alone, and resuming from one.

    python examples/trainer.py --output runs/trainer

It trains for half of the steps, as if it had been stopped, goes on from that checkpoint in a new model, and prints the
evaluation loss. `runs/trainer/checkpoint-*` and `runs/trainer/adapter` hold adapters, with a model card each.
"""

import argparse
from typing import Any

import fastpeft as peft  # was: import peft
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a folder, or a name on the Hub")
parser.add_argument("--output", default="runs/trainer")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
rows = [tokenizer(f"Question: What is {a} plus {b}?\nAnswer: {a + b}") for a in range(10) for b in range(10)]
held_out, train = rows[::10], [row for i, row in enumerate(rows) if i % 10]


def trainer(steps: int) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    config = peft.LoraConfig(r=8, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        args.output, max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3, logging_steps=5,
        lr_scheduler_type="constant", eval_strategy="steps", eval_steps=args.steps // 2, save_steps=args.steps // 2,
        report_to=[],
    )  # fmt: skip
    return Trainer(
        peft.get_peft_model(model, config), arguments, train_dataset=train, eval_dataset=held_out,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip


half = args.steps // 2
trainer(half).train()
resumed = trainer(args.steps)
resumed.train(resume_from_checkpoint=f"{args.output}/checkpoint-{half}")
print(f"evaluation loss: {resumed.evaluate()['eval_loss']:.3f}")
resumed.save_model(f"{args.output}/adapter")
