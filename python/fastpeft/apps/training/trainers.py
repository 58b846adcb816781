"""Trainers of a run, our own loop or that of transformers and TRL, and which settings each of them takes."""

from __future__ import annotations

import importlib.util
import os

from .config import PROMPTS, TrainConfig, nearest
from .errors import UserError

TRAINERS = ("own", "hf")
_NUMBER, _YES_NO = ("a number", (int, float)), ("true or false", (bool,))
# Options of TRL's DPOConfig that are of its loss; all others are those of the run, or refused.
DPO_OPTIONS: dict[str, tuple[str, tuple[type, ...]]] = {
    "beta": _NUMBER, "disable_dropout": _YES_NO, "discopop_tau": _NUMBER, "f_alpha_divergence_coef": _NUMBER,
    "f_divergence_type": ("text", (str,)), "label_smoothing": _NUMBER, "ld_alpha": _NUMBER,
    "loss_type": ("a name or a list of names", (str, list)), "loss_weights": ("a list of numbers", (list,)),
    "use_weighting": _YES_NO,
}  # fmt: skip
_HF_ONLY = ("objective", "dpo", "report_to", "early_stopping_patience", "early_stopping_threshold")
_REPORTS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


def check_trainer(config: TrainConfig, trainer: str) -> None:
    """Raise UserError, which names it, for a setting that a trainer cannot honour, and a package that it lacks."""
    if trainer not in TRAINERS:
        raise UserError(f"trainer: expected one of {', '.join(TRAINERS)}, got {trainer!r}", nearest(trainer, TRAINERS))
    if trainer == "own":
        for name, one in config.each().items():
            for key in changed(one, _HF_ONLY):
                of = f"adapters.{name}." if config.adapters else ""
                raise UserError(f"{of}{key} is for the trainers of transformers and TRL", "add --trainer hf")
        return
    _refuse_general(config)
    if config.objective == "dpo":
        _refuse_dpo(config)
    _need("accelerate", "--trainer hf", "transformers' Trainer runs on it")
    for name in config.report_to:
        _need(_REPORTS[name], f"report_to: {name}", "it writes what is reported")
    if config.objective == "dpo":
        for package, why in (
            ("trl", "its DPOTrainer computes the loss"), ("datasets", "TRL reads its data through it"),
            ("peft", "TRL knows an adapter by PEFT's classes, and takes its start as the reference"),
        ):  # fmt: skip
            _need(package, "objective: dpo", why)
    if config.quantize != "none":
        _need("peft", f"--trainer hf with quantize={config.quantize}",
              "without it transformers' Trainer takes no adapter on a 4-bit base")  # fmt: skip


def changed(config: TrainConfig, names: tuple[str, ...]) -> list[str]:
    """Those of the settings that are not at their defaults."""
    plain = TrainConfig(model=config.model, data="-")
    return [name for name in names if getattr(config, name) != getattr(plain, name)]


def _refuse_general(config: TrainConfig) -> None:
    if config.adapters:
        raise UserError("adapters: --trainer hf trains one adapter", "leave --trainer hf out, or train them one by one")
    if config.device.startswith("cuda:") and config.device != "cuda:0":
        raise UserError(f"device: --trainer hf takes the first GPU, got {config.device}",
                        "choose it with CUDA_VISIBLE_DEVICES, and device=cuda")  # fmt: skip
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"--trainer hf runs in one process, WORLD_SIZE is {os.environ['WORLD_SIZE']}",
                        "start it without torchrun or accelerate launch")  # fmt: skip
    stopping = bool(config.early_stopping_patience)
    if stopping and not (config.eval_every and (config.eval_data or config.eval_fraction)):
        raise UserError("early_stopping_patience counts evaluations, and there are none during the run",
                        "set eval_every, and eval_data or eval_fraction")  # fmt: skip
    if config.early_stopping_threshold and not stopping:
        raise UserError("early_stopping_threshold without early_stopping_patience", "set both")
    if config.objective != "dpo" and config.dpo:
        raise UserError(f"dpo.{next(iter(config.dpo))}: the objective is {config.objective}", "add objective=dpo")


def _refuse_dpo(config: TrainConfig) -> None:
    for key, value in config.dpo.items():
        if key not in DPO_OPTIONS:
            raise UserError(f"unknown setting dpo.{key}", nearest(str(key), DPO_OPTIONS))
        expected, types = DPO_OPTIONS[key]
        if not isinstance(value, types) or isinstance(value, bool) != (types == (bool,)):
            raise UserError(f"dpo.{key}: expected {expected}, got {value!r}", f"correct dpo.{key}")
    if config.offload_activations != "none":
        raise UserError("offload_activations with objective=dpo, whose forward passes are TRL's", "leave it out")
    for key in changed(config, ("loss_chunk_vocab", "loss_chunk_tokens")):
        raise UserError(f"{key}: TRL computes the loss of objective=dpo by chunks of its own", f"leave {key} out")
    name = config.method.lower()
    if name in PROMPTS:
        raise UserError(f"method: {name} with objective=dpo, which needs a second adapter as reference",
                        "use a method that acts on layers, as lora")  # fmt: skip
    where, options = ("lora", config.lora) if name in ("lora", "dora") else ("adapter", config.adapter)
    dropped = [key for key, value in options.items() if "dropout" in key and value]
    if dropped and config.dpo.get("disable_dropout", True):
        raise UserError(f"{where}.{dropped[0]}: TRL switches dropout off for objective=dpo",
                        f"set {where}.{dropped[0]}=0, or dpo.disable_dropout=false")  # fmt: skip


def _need(packages: str | tuple[str, ...], what: str, why: str) -> None:
    names = (packages,) if isinstance(packages, str) else packages
    if not any(importlib.util.find_spec(name) for name in names):
        raise UserError(f"{what} needs the package {names[0]}: {why}", f"pip install {names[0]}")
