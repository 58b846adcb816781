"""Data-parallel LoRA with accelerate: each process takes its share of every batch, and all hold the same adapter.

    torchrun --nproc_per_node 2 examples/two_processes.py --output runs/two

On two GPUs, or on a CPU. Each process prints how many rows it trained on; the first one prints the mean loss, and that
all adapters are equal. `python examples/two_processes.py` runs it as one process.
"""

import argparse

import fastpeft as peft  # was: import peft
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a folder, or a name on the Hub")
parser.add_argument("--output", default="runs/two")
parser.add_argument("--epochs", type=int, default=2)
args = parser.parse_args()

accelerator = Accelerator(cpu=not torch.cuda.is_available())  # without being told it takes a CPU for one process
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
texts = [f"Question: What is {a} plus {b}?\nAnswer: {a + b}" for a in range(4) for b in range(4)]
tokens = tokenizer(texts, padding=True, return_tensors="pt")
data = TensorDataset(tokens["input_ids"], tokens["attention_mask"])
loader = DataLoader(data, batch_size=4, shuffle=True)  # four rows for each process
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

rows = 0
for epoch in range(args.epochs):
    for ids, mask in loader:
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        rows += len(ids)
    accelerator.print(f"epoch {epoch}: loss {accelerator.gather(loss.detach()).mean().item():.3f}")
print(f"process {accelerator.process_index} of {accelerator.num_processes}: {rows} rows")

own = accelerator.unwrap_model(model)
sums = accelerator.gather(sum(p.detach().double().sum() for p in own.parameters() if p.requires_grad).reshape(1))
accelerator.print(f"equal adapters: {bool((sums == sums[0]).all())}")
own.save_pretrained(args.output, is_main_process=accelerator.is_main_process)
