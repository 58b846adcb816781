"""From a config to trained adapter folders: load, prepare, train, save."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import models
from .config import PROMPTS, TrainConfig, nearest
from .data import Dataset, Encoder
from .errors import UserError
from .lines import JsonLines, Records, split
from .metrics import Progress
from .output import ADAPTER_NAME, CURVE_NAME, METRICS_NAME, held
from .preferences import PairEncoder, check_pair
from .trainers import check_trainer

if TYPE_CHECKING:
    import torch

    from .loop import Result, Trainer
    from .track import Track


@dataclass
class Prepared:
    """An adapter's part of a run that is ready to start. config: its settings, as of a run of it alone."""

    config: TrainConfig
    source: models.Source
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    train: Dataset
    held_out: Dataset
    name: str = "default"


def prepare(config: TrainConfig, train: Records | None = None, held_out: Records | None = None) -> Prepared:
    """Prepare a run of one adapter, with given records or the config's files."""
    (prepared,) = prepare_all(config, None if train is None else {"default": (train, held_out or [])})
    return prepared


def prepare_all(config: TrainConfig, records: Mapping[str, tuple[Records, Records]] | None = None) -> list[Prepared]:
    """Resolve the model, load the tokenizer and encode each adapter's data.

    records: (to train, held out) by adapter, in place of the config's files.
    """
    each = config.each()
    if records is None:  # before the model: a bad line is found in a moment
        files = {name: _read(one, name) for name, one in each.items()}
    else:
        files = {name: [(train, held_out, None)] for name, (train, held_out) in records.items()}
    source = models.resolve(config.model, config.quantize)
    device = models.pick_device(config.device)
    dtype = models.pick_dtype(config.dtype, device)
    tokenizer = models.load_tokenizer(source)
    prepared = []
    for name, one in each.items():
        with _named(name):
            encoding = PairEncoder if one.objective == "dpo" else Encoder
            encoder = encoding(tokenizer, one.template, one.max_length, one.truncate)
            train = Dataset.mixed([encoder.dataset(file) for file, _, _ in files[name]], [w for *_, w in files[name]])
            held_out = [encoder.dataset(file) for file in _limited([f for _, f, _ in files[name]], one)]
            data = train, Dataset.mixed(held_out, [None] * len(held_out)) if held_out else Dataset()
        prepared.append(Prepared(one, source, tokenizer, device, dtype, *data, name))
    return prepared


def _read(config: TrainConfig, name: str) -> list[tuple[Records, Records, float | None]]:
    """(to train, held out, weight) of each file."""
    with _named(name):
        check = check_pair if config.objective == "dpo" else None
        found: list[tuple[Records, Records, float | None]] = []
        for path, weight in config.files():
            records = JsonLines(path, check)
            train, held_out = split(records, config.eval_fraction) if config.eval_fraction else (records, [])
            found.append((train, held_out, weight))
        if config.eval_data is not None:
            found[0] = (found[0][0], JsonLines(config.eval_data, check), found[0][2])
        return found


def _limited(files: list[Records], config: TrainConfig) -> list[Records]:
    """Files with something in them, of which the first records are taken: in all as many as there may be held out."""
    files = [file for file in files if len(file)]
    total, most = sum(map(len, files)), config.max_eval_examples
    if not most or most >= total:
        return files
    ends = [most * end // total for end in itertools.accumulate(map(len, files), initial=0)]
    return [file[: end - start] for file, start, end in zip(files, ends, ends[1:], strict=False) if end > start]


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Within this, errors say which adapter of several they are of."""
    try:
        yield
    except UserError as error:
        if name == "default":
            raise
        raise UserError(f"adapters.{name}: {error.problem}", error.fix) from None
    except (ValueError, NotImplementedError) as error:
        if name == "default":
            raise
        raise UserError(f"adapters.{name}: {error}", "correct its settings") from error


def adapter_config(config: TrainConfig) -> Any:
    """The adapter configuration of the run; an unknown method or field is named with the nearest known one."""
    from ... import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS

    name = config.method.lower()
    where = "lora" if name in ("lora", "dora") else "adapter"
    if where == "lora" and config.adapter:
        raise UserError(f"adapter.* is for other methods, the method is {name}", "use lora.* instead")
    fields = config.lora | ({"use_dora": True} if name == "dora" else {}) if where == "lora" else config.adapter
    by_name = {peft_type.value.lower(): cls for peft_type, cls in CONFIGS.items()}
    config_class = by_name.get("lora" if where == "lora" else name)
    if config_class is None:
        raise UserError(f"unknown method {config.method!r}", nearest(name, [*by_name, "dora"]))
    known = [f.name for f in dataclasses.fields(config_class)]
    for key in fields:
        if key not in known:
            raise UserError(f"unknown setting {where}.{key}", nearest(str(key), known))
    if "num_virtual_tokens" in known and name not in PROMPTS:
        raise UserError(f"the method {name} needs examples or tasks, which training here does not have",
                        "train it with a loop of your own")  # fmt: skip
    usual: dict[str, Any] = {"num_virtual_tokens": 20} if name in PROMPTS else {}
    if not getattr(config_class, "whole_modules", True):
        usual["target_modules"] = "all-linear"
    try:
        return config_class(**{"task_type": "CAUSAL_LM", **usual, **fields})
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"{where}: {error}", f"correct the {where} settings") from error


def adapted_model(*prepared: Prepared, say: Callable[[str], object] | None = None) -> Any:
    """The quantised base with fresh adapters, each seeded as alone, so that a resumed run starts from the same tensors.

    say: is told why layers keep transformers' own code, and what is kept of the base, a line each. Raises `UserError`
    for an adapter that would change the base under the others.
    """
    from ... import get_peft_model
    from .loop import set_seed

    first = prepared[0]
    shared = first.config
    configs = {}
    for p in prepared:
        with _named(p.name):
            configs[p.name] = adapter_config(p.config)
    model = models.load_base(
        first.source, first.dtype, first.device, shared.quantize, shared.to_dict(), shared.attention,
        shared.cache_quantized, say,
    )  # fmt: skip
    for p in prepared:
        set_seed(p.config.seed)
        with _named(p.name):
            if p is first:
                model = get_peft_model(model, configs[p.name], p.name)
            else:
                model.add_adapter(p.name, configs[p.name])
        _check_alone(model, p.name, len(prepared) > 1, p.config.objective == "dpo")
    if shared.fast_layers:
        for why in models.speed_up(model):
            if say is not None:
                say(f"layers: {why}")
    return model


def _check_alone(model: Any, name: str, several: bool, compared: bool) -> None:
    """Raise for what training here does not do: values by row, and with several adapters what changes their base.

    compared: the adapter is trained beside a copy of what it began as.
    """
    from ... import Method, method_of

    config = model.peft_config[name]
    where = f"adapters.{name}" if several else "lora"
    if type(method_of(config)).row_values is not Method.row_values:
        raise UserError(f"{where}: aLoRA needs an invocation in each row, which training here does not look for",
                        "leave alora_invocation_tokens out, or train it with a loop of your own")  # fmt: skip
    if not several and not compared:
        return
    with_it = "the reference of objective=dpo computes" if compared else "the other adapters compute"
    fix = "leave it out" if compared else "train it in a run of its own"
    edited = [layer for _, layer in model.base_model.adapter_layers() if name in layer.base_edits]
    for changes, what in (
        (getattr(config, "bias", "none") != "none", f"bias={getattr(config, 'bias', '')!r} trains the base's biases"),
        (bool(getattr(config, "layer_replication", None)), "layer_replication changes the base's layers"),
        (bool(edited), f"{getattr(config, 'init_lora_weights', 'its initialisation')!r} edits the base's weights"),
    ):
        if changes:
            raise UserError(f"{where}: {what}, which {with_it} with", fix)


def make_tracks(prepared: Sequence[Prepared]) -> list[Track]:
    from .samples import Samples
    from .track import Track

    pad = prepared[0].tokenizer.pad_token_id
    return [
        Track(p.name, p.config, p.train.examples, p.held_out.examples, pad, Samples.of(p.config, p.tokenizer))
        for p in prepared
    ]


def train(
    prepared: Prepared, progress: Progress, resume: bool = False, model: Any = None, restart: bool = False
) -> tuple[Result, Any]:
    """Train one adapter and save ``<output>/adapter``; returns the result and the trained model."""
    results, model = train_all(prepared.config, [prepared], progress, resume, model, restart)
    return results[prepared.name], model


def train_all(
    config: TrainConfig, prepared: Sequence[Prepared], progress: Progress, resume: bool = False, model: Any = None,
    restart: bool = False, trainer: str = "own",
) -> tuple[dict[str, Result], Any]:  # fmt: skip
    """Train a run's adapters and save each to ``adapter`` in its own output; returns results by name and the model.

    trainer: "own", or "hf" for that of transformers or TRL, whose checkpoints and files are the same.
    resume, restart: as of `Trainer.run`, which also says how a signal ends it. Raises UserError for an output that
    another run holds, that cannot be written, or in which there is no room left.
    """
    check_trainer(config, trainer)
    with held(config):
        if model is None:
            model = adapted_model(*prepared, say=progress.say)
        pad = prepared[0].tokenizer.pad_token_id
        made = trainer_class(trainer)(config, model, make_tracks(prepared), pad, prepared[0].device, progress)
        results = made.run(resume, restart)
        for p in prepared:
            save_adapter(model, Path(p.config.output) / ADAPTER_NAME, p)
        metrics = Path(config.output) / METRICS_NAME
        if importlib.util.find_spec("matplotlib") is None:
            progress.say(f"no {CURVE_NAME} is drawn: pip install matplotlib")
        elif metrics.stat().st_size:
            from .plot import plot_losses

            plot_losses(metrics, metrics.with_name(CURVE_NAME))
    return results, model


def trainer_class(name: str) -> type[Trainer]:
    """The class that trains tracks: our loop, or around transformers' trainers."""
    if name == "hf":
        from .hf import HFTrainer

        return HFTrainer
    from .loop import Trainer

    return Trainer


def save_adapter(model: Any, folder: Path, prepared: Prepared) -> None:
    """The adapter with a note on the base it was trained on, so that `generate` and `merge` rebuild that base."""
    from ... import atomic_directory
    from .checkpoints import write_adapter

    config = prepared.config
    note = {
        "base": config.model,
        "quantize": config.quantize,
        "double_quant": config.double_quant,
        "quantize_skip": config.quantize_skip,
        "quantize_experts": config.quantize_experts,
        "quantize_embeddings": config.quantize_embeddings,
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "template": config.template,
    }
    with atomic_directory(folder) as temporary:
        write_adapter(model, prepared.name, Path(temporary))
        (Path(temporary) / models.NOTE_NAME).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
