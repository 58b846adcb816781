"""AdapterPool under load: 2,000 adapters on disk, 32 resident, 200 requests whose adapters follow Zipf's law.

SmolLM2 in NF4 (float32 arithmetic), adapters on q_proj and v_proj, r = 4, bfloat16, written to a temporary folder.
Requests are answered eight at a time (greedy decoding), while the next eight's adapters are read ahead. Two
hundred more requests, twice, show whether memory grows. The answers to the first ones are compared with those of each
adapter alone, loaded by PeftModel into a second copy of the model.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..measure import Stats
from ..results import Row
from .whole import model_folder
from .worker import memory_mib

TARGETS = ("q_proj", "v_proj")
RANK, ALPHA = 4, 16
BATCH, PROMPT, TOKENS = 8, 16, 8


@dataclass
class Answer:
    """A request: its adapter, its prompt [PROMPT], the tokens that followed and some of the logits before the first."""

    name: str
    prompt: Tensor
    tokens: Tensor
    logits: Tensor


@dataclass
class Round:
    answers: list[Answer] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)  # seconds from wanting a batch's adapters to having them all
    seconds: list[float] = field(default_factory=list)  # of a batch
    errors: list[str] = field(default_factory=list)


def load_model(args: argparse.Namespace) -> Any:
    import transformers
    from fastpeft import quantize_model

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder(args), dtype=torch.float32)
    return quantize_model(model.eval(), skip=["lm_head"]).to(args.device)


def write_adapters(model: nn.Module, root: Path, count: int, strength: float = 0.05) -> int:
    """Random adapters `a0` ... in PEFT's format; returns their bytes. strength: the size of B's values."""
    from rich.progress import track
    from safetensors.torch import save_file

    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if name.endswith(TARGETS)
    }
    config = json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS)})
    size = 0
    for i in track(range(count), description=f"writing {count:,} adapters"):
        g = torch.Generator().manual_seed(i)
        tensors = {}
        for name, (n, k) in shapes.items():
            key = f"base_model.model.{name}.lora_"
            tensors[key + "A.weight"] = (torch.randn(RANK, k, generator=g) / k**0.5).bfloat16()
            tensors[key + "B.weight"] = (torch.randn(n, RANK, generator=g) * strength).bfloat16()
        folder = root / f"a{i}"
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(config)
        size += sum(t.nbytes for t in tensors.values())
    return size


def zipf(count: int, requests: int, seed: int) -> list[str]:
    """The adapters of the requests: the i-th most popular of them is asked for in proportion to 1 / i."""
    chances = 1 / torch.arange(1, count + 1)
    g = torch.Generator().manual_seed(seed)
    return [f"a{int(i)}" for i in torch.multinomial(chances, requests, replacement=True, generator=g)]


def decode(model: Any, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens [B, TOKENS], every 500th of the logits before the first: all of them would be the growth of memory)."""
    with torch.no_grad():
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=TOKENS, min_new_tokens=TOKENS,
            do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    return out.sequences[:, prompts.shape[1] :], out.logits[0][:, ::500].clone()


def serve(pool: Any, names: list[str], prompts: Tensor) -> Round:
    done = Round()
    for i in range(0, len(names), BATCH):
        batch, ids = names[i : i + BATCH], prompts[i : i + BATCH]
        begin = time.perf_counter()
        try:
            with pool.using(batch):
                done.waits.append(time.perf_counter() - begin)
                for name in names[i + BATCH : i + 2 * BATCH]:
                    pool.prefetch(name)
                tokens, logits = decode(pool.model, ids)
        except RuntimeError as error:
            done.errors += [str(error)] * len(batch)
            continue
        done.seconds.append(time.perf_counter() - begin)
        done.answers += [Answer(n, p, t, z) for n, p, t, z in zip(batch, ids, tokens, logits, strict=True)]
    return done


def base_alone(pool: Any, prompts: Tensor) -> tuple[list[float], list[Tensor]]:
    """The same batches without adapters: seconds of each, and the tokens."""
    seconds, tokens = [], []
    for i in range(0, len(prompts), BATCH):
        begin = time.perf_counter()
        tokens += list(decode(pool.model, prompts[i : i + BATCH])[0])
        seconds.append(time.perf_counter() - begin)
    return seconds, tokens


def compare(model: Any, root: Path, answers: list[Answer]) -> tuple[int, float]:
    """(answers whose tokens are not those of the adapter alone, largest difference of logits, in their largest)."""
    from fastpeft import PeftModel
    from rich.progress import track

    by_name: dict[str, list[Answer]] = {}
    for answer in answers:
        by_name.setdefault(answer.name, []).append(answer)
    alone: Any = None
    differ, worst = 0, 0.0
    for name, own in track(by_name.items(), description=f"{len(by_name)} adapters alone"):
        if alone is None:
            alone = PeftModel.from_pretrained(model, root / name, name)
        else:
            alone.load_adapter(root / name, name)
            alone.set_adapter(name)
        for other in [n for n in alone.peft_config if n != name]:
            alone.delete_adapter(other)
        for i in range(0, len(own), BATCH):
            part = own[i : i + BATCH]
            tokens, logits = decode(alone, torch.stack([a.prompt for a in part]))
            for answer, t, z in zip(part, tokens, logits, strict=True):
                differ += not torch.equal(answer.tokens, t)
                worst = max(worst, float((answer.logits - z).abs().max() / z.abs().max()))
    return differ, worst


def rows(args: argparse.Namespace) -> Iterator[Row]:
    from fastpeft import AdapterPool

    count, requests, resident, rounds = (200, 64, 16, 2) if args.quick else (2000, 200, 32, 3)
    torch.set_num_threads(args.threads)
    model = load_model(args)
    plain = copy.deepcopy(model)
    with tempfile.TemporaryDirectory(prefix="fastpeft-pool-") as name:
        root = Path(name)
        on_disk = write_adapters(model, root, count)
        begin = time.perf_counter()
        pool = AdapterPool(model, root, max_resident=resident)
        made = time.perf_counter() - begin
        asked = zipf(count, requests * rounds, 0)
        g = torch.Generator().manual_seed(1)
        prompts = torch.randint(5, model.config.vocab_size, (len(asked), PROMPT), generator=g).to(args.device)
        base_seconds, base_tokens = base_alone(pool, prompts[:requests])
        served: list[Round] = []
        memory: list[float] = []
        read: list[int] = []
        for r in range(rounds):
            part = slice(r * requests, (r + 1) * requests)
            served.append(serve(pool, asked[part], prompts[part]))
            gc.collect()
            memory.append(memory_mib("VmRSS") or 0.0)
            read.append(pool.stats().loads)
        stats = pool.stats()
        pool.close()
        answers = served[0].answers
        differ, worst = compare(plain, root, answers)
    title = f"{requests} requests, {count:,} adapters, {resident} resident"
    row = Row(title, {"suite": "pool", "adapters": count, "requests": requests, "resident": resident, "rounds": rounds})
    row.stats = {
        "batch of 8": Stats([s for one in served for s in one.seconds]),
        "batch of 8, base alone": Stats(base_seconds),
        "its wait for adapters": Stats([s for one in served for s in one.waits]),
    }
    errors = [e for one in served for e in one.errors]
    growth = memory[-1] - memory[0]
    # A leak grows with what is read: less than a tenth of it since the first round is none.
    read_mib = (read[-1] - read[0]) * on_disk / count / 2**20
    share = stats.hits / max(1, stats.hits + stats.misses)
    changed = sum(not torch.equal(a.tokens, t) for a, t in zip(served[0].answers, base_tokens, strict=False))
    values = {"hits": f"{share:.0%}", "MiB growth": round(growth, 1), "failed": len(errors), "differ": differ}
    row.extra = {key: {"batch of 8": value} for key, value in values.items()}
    verdict = {False: "met", True: "MISSED"}
    row.notes += [f"failed: {error}" for error in dict.fromkeys(errors)]
    row.notes += [
        f"{on_disk / 2**20:.0f} MiB of adapters; the pool was made in {made:.2f} s, its stacks take "
        f"{stats.nbytes / 2**20:.1f} MiB ({stats.rows} rows of {stats.row_bytes / 1024:.1f} KiB)",
        f"{stats.hits} hits, {stats.misses} misses ({share:.0%}), {stats.evictions} evictions, {stats.loads} files "
        f"read in {1e3 * stats.load_seconds / max(1, stats.loads):.1f} ms each, beside the computing",
        f"{len(errors)} of {requests * rounds} requests failed: {verdict[bool(errors) or bool(stats.failures)]}",
        f"resident memory after each {requests} requests: {', '.join(f'{m:.0f}' for m in memory)} MiB, growth "
        f"{growth:+.1f} MiB while {read_mib:.0f} MiB were read: {verdict[growth > read_mib / 10]}",
        f"{differ} of {len(answers)} answers ({TOKENS} tokens) differ from the adapter's alone: {verdict[differ > 0]}; "
        f"logits by at most {worst:.1e} of the largest; {changed} of the first {requests} differ from the base's",
    ]
    yield row
