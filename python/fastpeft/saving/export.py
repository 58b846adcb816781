"""Adapter folders for servers: a report of one, and the export of a form that they can serve.

vLLM and SGLang read `adapter_config.json` and `adapter_model.safetensors` only, and scale every layer by one number.
vLLM refuses DoRA, trained biases and modules_to_save; SGLang also ignores rsLoRA; neither knows rank or alpha
patterns, so such adapters are answered with the wrong scaling, silently. The export folds it all into r and alpha.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.patterns import first_match
from ..files import atomic
from ..files.checks import PREFIX, AdapterFileError, Confined, list_some
from ..methods.lora.lora import scaling_of
from ..methods.lora.start import start_of
from .folder import load_adapter_file, open_adapter, save_adapter
from .state_dict import get_peft_model_state_dict

# The ranks that vLLM has kernels for; an adapter of another rank is served at the next one (max_lora_rank).
VLLM_MAX_RANK = 512
_A_SUFFIX, _B_SUFFIX = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class AdapterReport:
    """Report of `inspect_adapter`. serving: the reasons against each server; none means that it is served right."""

    path: str
    method: str
    base_model: str | None
    task_type: str | None
    ranks: dict[int, int]
    scalings: dict[float, int]
    target_modules: Any
    tensors: dict[str, list[int]]
    dtypes: dict[str, int]
    parameters: int
    bytes: int
    manifest: str
    options: dict[str, Any]
    serving: dict[str, list[str]]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(dataclasses.asdict(self).items())


def inspect_adapter(directory: str | os.PathLike[str]) -> AdapterReport:
    """Describe an adapter folder from its configuration and header; no tensor is read."""
    source = open_adapter(directory)
    config, tensors = source.config, source.tensors
    held = tensors if str(config.get("peft_type")).upper() == "LORA" else {}
    marks = (_A_SUFFIX, ".lora_embedding_A")
    ranks = {k.removesuffix(m): t.shape[0] for k, t in held.items() for m in marks if k.endswith(m) and t.shape}
    interesting = ("use_rslora", "use_dora", "bias", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern",
                   "init_lora_weights", "lora_dropout", "layers_to_transform", "layer_replication")  # fmt: skip
    return AdapterReport(
        path=str(source.folder),
        method=str(config["peft_type"]),
        base_model=config.get("base_model_name_or_path"),
        task_type=config.get("task_type"),
        ranks=dict(Counter(ranks.values())),
        scalings=dict(Counter(_scalings(config, ranks).values())),
        target_modules=config.get("target_modules"),
        tensors={name: list(info.shape) for name, info in tensors.items()},
        dtypes=dict(Counter(str(info.dtype).removeprefix("torch.") for info in tensors.values())),
        parameters=sum(math.prod(info.shape) for info in tensors.values()),
        bytes=sum(info.nbytes for info in tensors.values()),
        manifest=_manifest_state(source.folder),
        options={name: config[name] for name in interesting if config.get(name) not in (None, {}, [], False, "none")},
        serving=_against_servers(config, tensors),
    )


def _manifest_state(folder: Path | Confined) -> str:
    if not (folder / atomic.MANIFEST_NAME).exists():
        return "none"
    try:
        atomic.verify_manifest(folder)
    except AdapterFileError as error:
        return f"broken: {error}"
    return "intact"


def _scalings(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    alphas = first_match(config.get("alpha_pattern") or {}, [name.removeprefix(PREFIX) for name in ranks])
    default, root = config.get("lora_alpha", 8), bool(config.get("use_rslora"))
    return {n: scaling_of(float(alphas.get(n.removeprefix(PREFIX), default)), r, root) for n, r in ranks.items()}


def beyond_plain_lora(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> list[str]:
    """Parts of an adapter's configuration and tensors, by key, beyond A, B and a scaling for each linear layer."""
    if str(config.get("peft_type")).upper() != "LORA":
        return [f"the method is {config.get('peft_type')}, only LORA is served"]
    bias, saved, init = (config.get(name) for name in ("bias", "modules_to_save", "init_lora_weights"))
    biased, start = bias not in (None, "none"), start_of(init.lower()) if isinstance(init, str) else None
    other = [key for key in tensors if not key.endswith((_A_SUFFIX, _B_SUFFIX))]
    reasons = {
        "DoRA is refused": config.get("use_dora"),
        f"bias={bias!r} is refused": biased,
        "lora_bias is refused": config.get("lora_bias"),
        f"modules_to_save={saved} is refused": saved,
        "aLoRA is refused": config.get("alora_invocation_tokens"),
        f"init_lora_weights={init!r} changed the base weights, which a server does not have": (
            start is not None and start.takes_base
        ),
        f"tensors other than lora_A and lora_B of linear layers: {list_some(other, 3)}": (
            other and not saved and not biased
        ),
        "adapters on convolutions are not served": not other and any(len(t.shape) != 2 for t in tensors.values()),
    }
    return [reason for reason, holds in reasons.items() if holds]


def _against_servers(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, list[str]]:
    folds = "is refused, or ignored and the scaling wrong (export_for_serving folds it)"
    both = beyond_plain_lora(config, tensors)
    both += [f"{name} {folds}" for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    found, r = {"vllm": [*both], "sglang": [*both]}, config.get("r")
    if isinstance(r, int) and r > VLLM_MAX_RANK:
        found["vllm"].append(f"r={r} exceeds {VLLM_MAX_RANK}, the largest max_lora_rank")
    if config.get("use_rslora"):
        found["sglang"].append("rsLoRA is ignored: it scales by alpha / r (export_for_serving folds it)")
    return found


def export_for_serving(adapter: Any, out: str | os.PathLike[str], adapter_name: str = "default") -> dict[str, Any]:
    """Write the same LoRA adapter with one r and one alpha for all layers; return its configuration.

    adapter: a PeftModel or a folder. rsLoRA and patterns are folded: lower ranks are padded with zeros to the highest,
    the scaling that most layers have becomes alpha / r, and in the others B takes up the quotient, rounded once. Raises
    ValueError for what no such adapter can say (DoRA, biases, modules_to_save, embeddings): merge those instead.
    """
    config, state = read_adapter(adapter, adapter_name)
    if reasons := beyond_plain_lora(config, state):
        raise ValueError(f"this adapter has no serving-safe form, merge it into the model: {'; '.join(reasons)}")
    folded, result = fold(config, state)
    save_adapter(out, folded, result)
    return result


def read_adapter(adapter: Any, adapter_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors, by file keys, of a PeftModel's adapter or of a folder."""
    if isinstance(adapter, (str, os.PathLike)):
        return load_adapter_file(adapter)
    config = adapter.peft_config[adapter_name].to_dict()
    return config, get_peft_model_state_dict(adapter, adapter_name=adapter_name, save_embedding_layers=False)


def fold(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (by file keys) and the configuration of a plain LoRA with one r and one alpha, as
    `export_for_serving` writes them."""
    ranks = {key.removesuffix(_A_SUFFIX): int(t.shape[0]) for key, t in state.items() if key.endswith(_A_SUFFIX)}
    scalings = _scalings(config, ranks)
    r = max(ranks.values())
    common = Counter(scalings.values()).most_common(1)[0][0]
    alpha = common * r
    # Servers take alpha for an integer; where it is none, or 0, scale by 1 and let B hold the scaling.
    alpha = int(alpha) if alpha and alpha == int(alpha) and alpha / r == common else r
    folded: dict[str, Tensor] = {}
    for name, rank in ranks.items():
        a, b = state[name + _A_SUFFIX], state[name + _B_SUFFIX]
        factor = scalings[name] / (alpha / r)
        if factor != 1.0:
            b = (b.double() * factor).to(b.dtype)
        folded[name + _A_SUFFIX] = torch.cat([a, a.new_zeros(r - rank, a.shape[1])])
        folded[name + _B_SUFFIX] = torch.cat([b, b.new_zeros(b.shape[0], r - rank)], dim=1)
    result = {**config, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "r": r, "lora_alpha": alpha,
              "init_lora_weights": True, "inference_mode": True}  # fmt: skip
    return folded, result
