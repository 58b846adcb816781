"""From a config to a trained adapter folder: load, prepare, plan, train, save."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import models
from .config import TrainConfig, nearest
from .data import Dataset, Encoder, Record, read_jsonl
from .errors import UserError
from .metrics import Progress

if TYPE_CHECKING:
    import torch

    from .loop import Result


@dataclass
class Prepared:
    """A run that is ready to start."""

    config: TrainConfig
    source: models.Source
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    train: Dataset
    held_out: Dataset


def prepare(
    config: TrainConfig,
    train: list[tuple[str, Record]] | None = None,
    held_out: list[tuple[str, Record]] | None = None,
) -> Prepared:
    """Resolve the model, load the tokenizer and encode the data (given records, or the config's files)."""
    if train is None:
        train = read_jsonl(config.data)  # before the model: a bad line is found in a moment
        if config.eval_data is not None:
            held_out = read_jsonl(config.eval_data)
        elif config.eval_fraction:
            train, held_out = split(train, config.eval_fraction)
    source = models.resolve(config.model)
    device = models.pick_device(config.device)
    dtype = models.pick_dtype(config.dtype, device)
    tokenizer = models.load_tokenizer(source)
    encoder = Encoder(tokenizer, config.template, config.max_length, config.truncate)
    held_out = list(held_out or [])
    if config.max_eval_examples:
        held_out = held_out[: config.max_eval_examples]
    return Prepared(
        config,
        source,
        tokenizer,
        device,
        dtype,
        encoder.dataset(train),
        encoder.dataset(held_out) if held_out else Dataset(),
    )


def split(
    records: list[tuple[str, Record]], fraction: float
) -> tuple[list[tuple[str, Record]], list[tuple[str, Record]]]:
    """Divide by a hash of each record's content, so that equal records fall on one side and files may be reordered."""
    train: list[tuple[str, Record]] = []
    held_out: list[tuple[str, Record]] = []
    for where, record in records:
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).digest()
        (held_out if int.from_bytes(digest[:8], "big") < fraction * 2**64 else train).append((where, record))
    if not train or not held_out:
        raise UserError(
            f"eval_fraction={fraction} of {len(records)} leaves {len(train)} to train, {len(held_out)} to hold out",
            "give more records or another fraction",
        )
    return train, held_out


def adapter_config(config: TrainConfig) -> Any:
    """The adapter configuration of the run; an unknown method or field is named with the nearest known one."""
    from fastpeft import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS
    from fastpeft import PeftType

    name = config.method.lower()
    where = "lora" if name in ("lora", "dora") else "adapter"
    if where == "lora" and config.adapter:
        raise UserError(f"adapter.* is for other methods, the method is {name}", "use lora.* instead")
    fields = config.lora | ({"use_dora": True} if name == "dora" else {}) if where == "lora" else config.adapter
    by_name = {kind.value.lower(): cls for kind, cls in CONFIGS.items()}
    config_class = by_name.get("lora" if where == "lora" else name)
    if config_class is None and name.upper() in PeftType.__members__:
        raise UserError(f"the method {name} is not there yet", "docs/methods.md lists those that are")
    if config_class is None:
        raise UserError(f"unknown method {config.method!r}", nearest(name, [*by_name, "dora"]))
    known = [f.name for f in dataclasses.fields(config_class)]
    for key in fields:
        if key not in known:
            raise UserError(f"unknown setting {where}.{key}", nearest(str(key), known))
    try:
        return config_class(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **fields})
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"{where}: {error}", f"correct the {where} settings") from error


def adapted_model(prepared: Prepared) -> Any:
    """The quantised base with a fresh adapter, seeded, so that a resumed run starts from the same tensors."""
    from fastpeft import get_peft_model

    from .loop import set_seed

    config = prepared.config
    adapter = adapter_config(config)
    model = models.load_model(prepared.source, prepared.dtype, prepared.device, config.attention)
    model = models.quantize(model, config.quantize, config.double_quant, config.quantize_skip)
    set_seed(config.seed)
    model = get_peft_model(model, adapter)
    if config.fast_layers:
        models.speed_up(model, prepared.device)
    return model


def train(prepared: Prepared, progress: Progress, resume: bool = False, model: Any = None) -> tuple[Result, Any]:
    """Train and save ``<output>/adapter``; returns the result and the trained model."""
    from .loop import Trainer

    config = prepared.config
    root = Path(config.output)
    if root.is_file():
        raise UserError(f"output: {root} is a file", "choose a folder")
    root.mkdir(parents=True, exist_ok=True)
    if model is None:
        model = adapted_model(prepared)
    trainer = Trainer(
        config, model, prepared.tokenizer.pad_token_id, prepared.train.examples, prepared.held_out.examples,
        prepared.device, progress,
    )  # fmt: skip
    result = trainer.run(resume)
    save_adapter(model, root / "adapter", prepared)
    if (root / "metrics.jsonl").stat().st_size:
        from .plot import plot_losses

        plot_losses(root / "metrics.jsonl", root / "loss.png")
    return result, model


def save_adapter(model: Any, folder: Path, prepared: Prepared) -> None:
    """The adapter with a note on the base it was trained on, so that `generate` and `merge` rebuild that base."""
    from fastpeft.atomic import atomic_directory

    config = prepared.config
    note = {
        "base": config.model,
        "quantize": config.quantize,
        "double_quant": config.double_quant,
        "quantize_skip": config.quantize_skip,
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "template": config.template,
    }
    with atomic_directory(folder) as temporary:
        model.save_pretrained(str(temporary))
        (Path(temporary) / models.NOTE_NAME).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def describe(prepared: Prepared) -> dict[str, Any]:
    """What a run would do: parameters, memory, steps. Builds the model without weights and trains nothing."""
    from fastpeft import get_peft_model

    from .loop import make_plan
    from .optim import warmup_steps

    config = prepared.config
    started = time.monotonic()
    plan = make_plan(config, prepared.train.examples)
    model = models.empty_model(prepared.source, prepared.dtype)
    base_bytes = _base_bytes(model, config)
    total = sum(p.numel() for p in model.parameters())
    adapted = get_peft_model(model, adapter_config(config))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    tokens = prepared.train.tokens
    first = [sum(len(prepared.train.examples[i]) for i in row) for rows in plan.steps[0][1] for row in rows]
    memory = {
        "base": base_bytes,
        "adapter": 4 * trainable,
        "gradients": 4 * trainable,
        "optimizer": round(_STATES_PER_PARAMETER[config.optimizer] * 4 * trainable),
        "activations": _activation_bytes(model.config.get_text_config(), prepared),
        "loss": 4 * config.loss_chunk_tokens * config.loss_chunk_vocab,
    }
    return {
        "model": prepared.source.note,
        "device": str(prepared.device),
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "quantize": config.quantize,
        "parameters": total,
        "trainable_parameters": trainable,
        "examples": len(prepared.train.examples),
        "held_out_examples": len(prepared.held_out.examples),
        "tokens_per_epoch": tokens,
        "learned_tokens_per_epoch": prepared.train.learned,
        "examples_cut": prepared.train.cut,
        "examples_dropped": prepared.train.dropped,
        "steps": len(plan),
        "warmup_steps": warmup_steps(config, len(plan)),
        "epochs": plan.steps[-1][0] + 1,
        "rows_per_step": len(first),
        "row_fill": sum(first) / (len(first) * (config.max_length if config.packing else max(first))),
        "memory_bytes": memory,
        "memory_total_bytes": sum(memory.values()),
        "seconds_to_plan": time.monotonic() - started,
        "config": config.to_dict(),
    }


_STATES_PER_PARAMETER = {
    "adamw": 2.0, "adam": 2.0, "sgd": 1.0, "rmsprop": 2.0, "adafactor": 0.1,
    "adamw_8bit": 0.5, "paged_adamw_8bit": 0.5, "lion_8bit": 0.25,
}  # fmt: skip


def _base_bytes(model: Any, config: TrainConfig) -> int:
    """Bytes of the frozen weights: 4 bits and the scales for what will be quantised, the dtype for the rest."""
    import torch

    scale_bits = (8 + 32 / 256) / 64 if config.double_quant else 32 / 64
    quantised = set()
    for name, module in model.named_modules():
        skipped = any(name == s or name.endswith("." + s) for s in config.quantize_skip)
        if config.quantize != "none" and type(module) is torch.nn.Linear and not skipped:
            quantised.add(id(module.weight))
    total = 0.0
    for parameter in model.parameters():
        small = id(parameter) in quantised
        total += parameter.numel() * ((4 + scale_bits) / 8 if small else parameter.element_size())
    return math.ceil(total)


def _activation_bytes(shape: Any, prepared: Prepared) -> int:
    """What one forward pass keeps for the backward: about 8 hidden and 4 intermediate vectors a token and layer."""
    config = prepared.config
    tokens = config.batch_size * (config.max_length if config.packing else max(len(e) for e in prepared.train.examples))
    hidden = int(shape.hidden_size)
    layer = (8 * hidden + 4 * int(getattr(shape, "intermediate_size", None) or 4 * hidden)) * prepared.dtype.itemsize
    layers = int(shape.num_hidden_layers)
    if config.gradient_checkpointing:
        return tokens * (layers * hidden * prepared.dtype.itemsize + layer)
    return tokens * layers * layer
