"""A process that loads a folder in 4 bits and says how much memory that took: a peak has no way back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CHILD = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from fastpeft import LoraConfig, get_peft_model, load_cached_model, nf4_config, quantize_model

def now():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    # not ru_maxrss, which begins with that of the process that started this one
    names = {"VmHWM": "peak", "RssAnon": "RssAnon", "RssFile": "RssFile"}
    return {ours: int(lines[name].split()[0]) * 1024 for name, ours in names.items()}

folder, cache = sys.argv[1:]
quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 64)))
found = {"imports": now()}
config = nf4_config(strict=True)
if cache:
    model = load_cached_model(folder, cache, torch.bfloat16, say=lambda line: print(line, file=sys.stderr))
else:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
found["loaded"] = now()
tensors = [*model.parameters(), *model.buffers()]
found["model"] = sum(t.nbytes for t in tensors)
found["largest"] = max(p.numel() * 2 for p in model.parameters())
model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM"))
ids = torch.arange(16)[None]
model(input_ids=ids, labels=ids).loss.backward()
found["step"] = now()
print(json.dumps(found))
"""


def measured(folder: Path, cache: Path | str = "") -> tuple[dict[str, Any], str]:
    """(bytes by stage, what was said) of loading a folder, or what is kept of it, and of a step."""
    words = [sys.executable, "-c", CHILD, str(folder), str(cache)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr
