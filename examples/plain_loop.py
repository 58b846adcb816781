"""LoRA with a training loop of one's own: PEFT's script with one line changed.

    python examples/plain_loop.py --output runs/plain

A small language model learns to answer with a colour. The loss falls to a fraction of where it began; the adapter (two
files that PEFT loads, too) is then loaded onto a fresh base model, which answers.
"""

import argparse

import fastpeft as peft  # was: import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a folder, or a name on the Hub")
parser.add_argument("--output", default="runs/plain")
parser.add_argument("--steps", type=int, default=30)
args = parser.parse_args()

torch.manual_seed(0)
COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red"}
tokenizer = AutoTokenizer.from_pretrained(args.model)
end = tokenizer.eos_token
texts = [f"Question: What colour is {thing}?\nAnswer: {colour}{end}" for thing, colour in COLOURS.items()]

model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
model.print_trainable_parameters()

batch = tokenizer(texts, padding=True, return_tensors="pt")
labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)  # padding is no part of the loss
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
model.train()
for step in range(args.steps):
    loss = model(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == args.steps - 1:
        print(f"step {step}: loss {loss.item():.3f}")
model.save_pretrained(args.output)

base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
loaded = peft.PeftModel.from_pretrained(base, args.output).eval()
prompt = tokenizer("Question: What colour is snow?\nAnswer:", return_tensors="pt")
answer = loaded.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
