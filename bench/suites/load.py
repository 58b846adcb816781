"""Memory and time of `fastpeft` on random Llamas that are quantised while they are read: ru_maxrss of whole processes.

A model is written shard by shard (its values repeat: nothing here depends on them) and removed in the end. By name
alone: llama-7b, in Llama-2-7B's shape, which takes 14 GB of the temporary folder (TMPDIR).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..machine import ROOT
from ..measure import Stats
from ..results import Limit, Row

SHARD_BYTES = 500_000_000
_BLOCK = 1 << 21  # values that are drawn; weights repeat them


@dataclass(frozen=True)
class Run:
    """One process. words: of its command; most: GB that its peak may have."""

    name: str
    words: tuple[str, ...]
    most: float


@dataclass(frozen=True)
class Shape:
    """A Llama and what is run on it."""

    hidden: int
    layers: int
    wide: int
    heads: int
    groups: int
    vocabulary: int
    tied: bool
    runs: tuple[Run, ...]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of its files."""
        h, kv = self.hidden, self.hidden // self.heads * self.groups
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, h)}
        for i in range(self.layers):
            sizes = {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h)}
            at = f"model.layers.{i}."
            found |= {f"{at}self_attn.{name}_proj.weight": size for name, size in sizes.items()}
            found |= {f"{at}mlp.{name}_proj.weight": (self.wide, h) for name in ("gate", "up")}
            found[f"{at}mlp.down_proj.weight"] = (h, self.wide)
            found |= {f"{at}{name}_layernorm.weight": (h,) for name in ("input", "post_attention")}
        found["model.norm.weight"] = (h,)
        return found if self.tied else found | {"lm_head.weight": (self.vocabulary, h)}


def _train(*words: str) -> tuple[str, ...]:
    return ("train", "--restart", "model={model}", "data={data}", "output={output}", "max_steps=1", *words)


_STEP = _train("max_length=128")
_GENERATE = ("generate", "What is 1?", "--model", "{model}", "--quantize", "nf4", "--max-new-tokens", "8")
SHAPES = {
    "llama-1b": Shape(2048, 16, 8192, 32, 8, 49152, True, (
        Run("a step", _STEP, 1.75), Run("a step, and kept", (*_STEP, "cache_quantized=true"), 1.75),
        Run("a step of what was kept", (*_STEP, "cache_quantized=true"), 1.75),
    )),
    "llama-1b-head": Shape(2048, 16, 8192, 32, 8, 49152, False, (Run("a step", _STEP, 1.95),)),
    "llama-7b": Shape(4096, 32, 11008, 32, 32, 32000, False, (
        Run("a step of 1 x 512, checkpointed", _train("max_length=512", "gradient_checkpointing=true"), 6.5),
        Run("generate", _GENERATE, 5.3),
    )),
}  # fmt: skip
NAMED = ("llama-7b",)


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for name, shape in SHAPES.items():
        if name in args.only or (name not in NAMED and not set(SHAPES) & set(args.only)):
            yield row(name, shape)


def row(name: str, shape: Shape) -> Row:
    """A model's processes, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        count = written(Path(folder) / "model", name)
        write_data(Path(folder) / "data.jsonl")
        found = Row(f"{name}, {count / 1e9:.2f} billion parameters", {"suite": "load", "model": name}, in_order=True)
        peaks: dict[str, Any] = {}
        for run in shape.runs:
            places = {"model": f"{folder}/model", "data": f"{folder}/data.jsonl", "output": f"{folder}/out"}
            seconds, peak = measured([word.format(**places) for word in run.words], Path(folder))
            found.stats[run.name], peaks[run.name] = Stats([seconds]), peak / 2**20
            found.limits.append(Limit(f"{run.name}: peak in GB", run.name, peak / 1e9, run.most))
        found.extra["peak_mib"] = peaks
    found.missed = not all(limit.met for limit in found.limits)
    return found


def written(folder: Path, name: str) -> int:
    """`write_model` in a process of its own: Linux counts the peak of who starts a process as that process's."""
    code = "import sys; from bench.suites.load import SHAPES, write_model, Path; "
    code += "print(write_model(Path(sys.argv[1]), SHAPES[sys.argv[2]]))"
    done = subprocess.run([sys.executable, "-c", code, str(folder), name], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return int(done.stdout.split()[-1])


def measured(words: Sequence[str], folder: Path) -> tuple[float, int]:
    """(seconds, bytes at the peak) of a `fastpeft` process. Raises RuntimeError where it fails."""
    env = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    begin = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, "-m", "fastpeft", *words], cwd=ROOT, env=env, stdout=said,
                                   stderr=subprocess.STDOUT)  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        seconds, process.returncode = time.monotonic() - begin, os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"fastpeft {' '.join(words)}: {said.read().decode(errors='replace')[-2000:]}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_model(folder: Path, shape: Shape) -> int:
    """A folder with a random model in bfloat16 and a tokenizer of bytes; how many parameters it has."""
    import torch
    import transformers
    from fastpeft.apps.training.testing import make_byte_tokenizer
    from safetensors.torch import save_file

    tokenizer = make_byte_tokenizer(chat=False)
    folder.mkdir(parents=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size, total = 0, 0
    for key, sizes in shape.tensors().items():
        count = torch.Size(sizes).numel()
        if shards[-1] and size + 2 * count > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = sizes
        size, total = size + 2 * count, total + count
    if 2.2 * total > shutil.disk_usage(folder).free:
        raise SystemExit(f"error: {folder} has no room for {2.2 * total / 1e9:.1f} GB; set TMPDIR")
    block = (torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    index: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: _values(block, sizes) for key, sizes in shard.items()}
        save_file(tensors, str(folder / name), metadata={"format": "pt"})
        index |= dict.fromkeys(shard, name)
    text = json.dumps({"metadata": {"total_size": 2 * total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.wide,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.groups,
        tie_word_embeddings=shape.tied, dtype="bfloat16", max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"], bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return total


def _values(block: Any, sizes: tuple[int, ...]) -> Any:
    if len(sizes) == 1:
        return block.new_ones(sizes)
    count = sizes[0] * sizes[1]
    return block.repeat(-(-count // len(block)))[:count].view(sizes).clone()


def write_data(file: Path) -> None:
    lines = ({"prompt": f"What is {i}?", "completion": "x" * 600 + f" {i}"} for i in range(8))
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
