"""Sequence classification: LoRA in a sentence encoder, its new head trained in full and saved with the adapter.

    python examples/classify.py --output runs/classify

MiniLM learns to tell questions about cooking from questions about computers, and is tried on dishes and devices that it
has not seen. The accuracy goes from chance to 1. The adapter folder holds LoRA and head, and loads onto the bare model.
"""

import argparse

import fastpeft as peft  # was: import peft
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="a folder, or a name on the Hub")
parser.add_argument("--output", default="runs/classify")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

KITCHEN = ["bread", "a soup", "rice", "an omelette", "noodles", "a cake", "fried fish", "a salad"]
OFFICE = ["a laptop", "a router", "my printer", "a server", "the keyboard", "a hard disk", "my phone", "a browser"]
ASKED = ["How do I make {}?", "Why does {} take so long?", "What goes wrong with {}?"]


def rows(first: int, last: int) -> tuple[list[str], torch.Tensor]:
    """Questions about some of the things, and 1 for those about computers."""
    things = [(thing, label) for label, some in enumerate((KITCHEN, OFFICE)) for thing in some[first:last]]
    texts = [ask.format(thing) for thing, _ in things for ask in ASKED]
    return texts, torch.tensor([label for _, label in things for _ in ASKED])


def accuracy(model: torch.nn.Module) -> float:
    texts, labels = rows(5, 8)
    with torch.no_grad():
        logits = model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    return float((logits.argmax(-1) == labels).float().mean())


torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(args.model)
bare = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
model = peft.get_peft_model(bare, peft.LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS"))
print(f"accuracy before: {accuracy(model):.2f}")
texts, labels = rows(0, 5)
batch = tokenizer(texts, padding=True, return_tensors="pt")
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
model.train()
for _ in range(args.steps):
    model(**batch, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"accuracy after: {accuracy(model):.2f}")
model.save_pretrained(args.output)
bare = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
print(f"accuracy when loaded: {accuracy(peft.PeftModel.from_pretrained(bare, args.output)):.2f}")
