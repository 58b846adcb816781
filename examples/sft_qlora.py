"""QLoRA with TRL's SFTTrainer, bitsandbytes' 4 bits and real PEFT, on fastpeft's kernels by one line.

    python examples/sft_qlora.py --output runs/sft

`fastpeft.patch()` may stand anywhere before the adapter is made; everything else is what TRL's documentation shows. The
report says which layers run on which kernel. Take the line out to compare: the losses are the same.
"""

import argparse

import fastpeft
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

fastpeft.patch()

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a folder, or a name on the Hub")
parser.add_argument("--output", default="runs/sft")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red"}
chats = [
    [{"role": "user", "content": f"What colour is {thing}?"}, {"role": "assistant", "content": f"{colour.title()}."}]
    for thing, colour in COLOURS.items()
]
four_bits = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
)
model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=four_bits, dtype=torch.bfloat16)
trainer = SFTTrainer(
    model,
    args=SFTConfig(
        args.output, max_steps=args.steps, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1,
        bf16=torch.cuda.is_available(), report_to=[],
    ),
    train_dataset=Dataset.from_dict({"messages": chats}),
    peft_config=LoraConfig(r=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"),
)  # fmt: skip
print(fastpeft.patch(trainer.model))  # the report; the layers are on our kernels already
trainer.train()
trainer.save_model(f"{args.output}/adapter")
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
