"""Preferences with TRL's DPOTrainer: no second model, since the reference is the model with its adapter switched off.

    python examples/dpo.py --output runs/dpo

Of two answers the short one is preferred. `rewards/accuracies` goes up to 1: the share of pairs in which the model has
come to favour the preferred answer more than the base model does.
"""

import argparse

import fastpeft as peft  # was: import peft
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a folder, or a name on the Hub")
parser.add_argument("--output", default="runs/dpo")
parser.add_argument("--steps", type=int, default=10)
args = parser.parse_args()

CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Peru": "Lima", "Kenya": "Nairobi", "Norway": "Oslo", "Cuba": "Havana"}
pairs = Dataset.from_dict({
    "prompt": [f"What is the capital of {country}? " for country in CAPITALS],
    "chosen": [f"{city}." for city in CAPITALS.values()],
    "rejected": [f"That is a very good question, and the answer to it is {city}." for city in CAPITALS.values()],
})  # fmt: skip

torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
trainer = DPOTrainer(
    model,
    args=DPOConfig(
        args.output, max_steps=args.steps, per_device_train_batch_size=3, learning_rate=5e-4, logging_steps=1,
        beta=0.1, bf16=False, report_to=[],
    ),
    train_dataset=pairs,
    processing_class=AutoTokenizer.from_pretrained(args.model),
    peft_config=peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
)  # fmt: skip
trainer.train()
accuracies = [entry["rewards/accuracies"] for entry in trainer.state.log_history if "rewards/accuracies" in entry]
print(f"rewards/accuracies: {accuracies[0]:.2f} -> {accuracies[-1]:.2f}")
trainer.save_model(f"{args.output}/adapter")
