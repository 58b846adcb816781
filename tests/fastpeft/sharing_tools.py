"""Cases of two processes that hold one model together, in fastpeft and in real PEFT: run by distributed_tools.py."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fastpeft
import peft
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fastpeft.methods.registry import registry
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

FULL = os.environ.get("PEFT_KERNELS_FULL_TESTS") == "1"
IDS = torch.arange(24).view(4, 6) % 31
LORA = {"r": 4}
SAVED = {"bias": "all", "modules_to_save": ["lm_head", "norm"]}
# By name: the configuration's class and options. Those of the registry are every method's first example.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    method.config_class.__name__: (method.config_class.__name__, dict(method.examples[0]))
    for method in registry().values() if method.examples
} | {
    "lora": ("LoraConfig", LORA),
    "all": ("LoraConfig", {**LORA, **SAVED}),
    "own bias": ("LoraConfig", {**LORA, "bias": "lora_only"}),
    "head": ("LoraConfig", {**LORA, "modules_to_save": ["lm_head"]}),
    "embedding": ("LoraConfig", {**LORA, "target_modules": ["q_proj", "embed"]}),
    "tokens": ("LoraConfig", {**LORA, "trainable_token_indices": {"embed": [1, 3]}}),
    "parameters": ("LoraConfig", {**LORA, "target_parameters": ["o_proj.weight"]}),
    "dora": ("LoraConfig", {**LORA, "use_dora": True}),
    "dora, all": ("LoraConfig", {**LORA, "use_dora": True, **SAVED}),
    "oft, all": ("OFTConfig", {"oft_block_size": 4, **SAVED}),
    "arrow": ("ArrowConfig", {"top_k": 2, "rng_seed": 3}),
    "xlora": ("XLoraConfig", {"hidden_size": 31, "xlora_depth": 1, "layerwise_scalings": True}),
}  # fmt: skip
TARGETS = ["q_proj", "down_proj"]
_FOLDER = tempfile.TemporaryDirectory()
# fsdp1: PEFT's policy, as its documentation has it, and with the options of torch; blocks, whole: other policies
POLICIES = ("ddp", "fsdp1", "fsdp1 orig", "fsdp1 blocks", "fsdp1 whole", "fsdp2")
# Trained tensors that several layers have: only one unit can have them, so that blocks cannot be wrapped one by one.
ACROSS = ("LilyConfig", "TinyLoraConfig", "UniLoraConfig", "VBLoRAConfig")
# Their output is not a function of each row alone: PVeRA draws noise, Lily's router looks at the batch.
BY_BATCH = ("PveraConfig", "LilyConfig")
NOT_BESIDE = ("xlora",)  # PEFT's state dict lacks its classifier, and its draws are others
SHORT = [
    ("all", "ddp"), ("all", "fsdp1 orig"), ("all", "fsdp1 whole"), ("all", "fsdp2"), ("dora", "fsdp1"),
    ("parameters", "fsdp1 blocks"), ("OFTConfig", "fsdp1"), ("VeraConfig", "fsdp1 blocks"), ("VBLoRAConfig", "fsdp1"),
    ("FrodConfig", "fsdp2"), ("FrodConfig", "fsdp1 whole"),
]  # fmt: skip


def flat_together(case: str) -> bool:
    """True if a unit that keeps no parameters of its own (`use_orig_params=False`) can have what is trained here: leaf
    modules with a weight, as the policy wants them, rather than tensors beside frozen ones."""
    return case in ("lora", "head", "dora", "LoraConfig", "OFTConfig", "PsoftConfig", "LNTuningConfig", "parameters")


def cases() -> list[tuple[str, str]]:
    """Those that are run; of what blocks share torch loses some, or waits for ever, in both libraries."""
    every = [(case, policy) for case in CASES for policy in POLICIES if policy != "fsdp1" or flat_together(case)]
    lost = [(case, policy) for case in ACROSS for policy in ("fsdp1 blocks", "fsdp1 orig", "fsdp2")]
    kept = [pair for pair in every if pair not in lost and pair[0] not in BY_BATCH + NOT_BESIDE]
    return kept + [(c, "fsdp1") for c in ACROSS]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.down_proj = nn.Linear(width, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.o_proj(self.down_proj(F.silu(self.q_proj(self.norm(h)))))  # type: ignore[no-any-return]


class Net(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(31, width), nn.Linear(width, 31)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer(h)
        return self.lm_head(h)  # type: ignore[no-any-return]


class Told(nn.Module):
    """A model as X-LoRA wants it: its parts are in `model`, as transformers' are, and it tells its last states."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.config = Net(), {"model_type": "custom"}

    def forward(self, input_ids: Tensor, output_hidden_states: bool = False, **others: Any) -> Any:
        y = self.model(input_ids)
        return SimpleNamespace(hidden_states=(y,)) if output_hidden_states else y


def lora(library: Any, seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)  # of the adapter that is made next
    return library.LoraConfig(target_modules=TARGETS, **LORA, **options)


@functools.cache
def experts() -> dict[str, str]:
    """Folders of LoRA adapters, of this process."""
    folders = {str(i): f"{_FOLDER.name}/{i}" for i in range(3)}
    for name, folder in folders.items():
        config = lora(fastpeft, 20 + int(name), init_lora_weights=False)
        fastpeft.get_peft_model(Told(), config).save_pretrained(folder)
    return folders


def arrow(library: Any, base: nn.Module, **options: Any) -> Any:
    """A router over three LoRA adapters, of which the first trains."""
    model = library.get_peft_model(base, lora(library, 1, init_lora_weights=False))
    for i in (2, 3):
        model.add_adapter(f"task_{i}", lora(library, i, init_lora_weights=False))
    config = library.ArrowConfig(**options)
    config.task_adapter_names, config.gks_adapter_names = [*model.peft_config], []
    model.add_adapter("arrow_router", lora(library, 4, arrow_config=config))
    model.set_adapter("arrow_router")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".default." in name)
    return model


def make(library: Any, case: str) -> Any:
    """The same model with the same random adapter in either library."""
    name, options = CASES[case]
    targets = {"TrainableTokensConfig": ["embed"], "LNTuningConfig": ["norm"]}.get(name, TARGETS)
    if case == "xlora":
        options = {**options, "adapters": experts()}
    else:
        options = {"target_modules": targets, **options}
    torch.manual_seed(0)
    base = Told() if case == "xlora" else Net()
    torch.manual_seed(1)
    if case == "arrow":
        model = arrow(library, base, **CASES[case][1])
    else:
        model = library.get_peft_model(base, getattr(library, name)(**options))
    generator = torch.Generator().manual_seed(3)
    for _, p in sorted(model.named_parameters()):
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def step(model: nn.Module, ids: Tensor) -> Tensor:
    """A step of SGD, after which the parameters say what the gradients were."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    y: Tensor = model(input_ids=ids)  # PEFT's X-LoRA wants the name
    y.double().square().mean().backward()
    optimizer.step()
    return y.detach()


def state_of(library: Any, model: Any) -> dict[str, Tensor]:
    state = library.get_peft_model_state_dict(model)
    # With bias="all" PEFT has the biases of saved modules twice.
    return {k: t.detach().clone() for k, t in state.items() if not k.endswith(".modules_to_save.bias")}


def together(library: Any, model: Any, policy: str) -> Any:
    if policy == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if policy == "fsdp2":
        for block in [module for module in model.modules() if isinstance(module, Block)]:
            fully_shard(block)
        return fully_shard(model)
    options: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": policy != "fsdp1"}
    if policy in ("fsdp1", "fsdp1 orig"):
        options["auto_wrap_policy"] = library.utils.other.fsdp_auto_wrap_policy(model)
    elif policy == "fsdp1 blocks":
        options["auto_wrap_policy"] = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={Block})
    return FullyShardedDataParallel(model, **options)


def gather(y: Tensor) -> Tensor:
    parts = [torch.empty_like(y) for _ in range(2)]
    dist.all_gather(parts, y.contiguous())
    return torch.cat(parts)


def whole(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in state.items()}


def error_of(call: Any, *args: Any) -> str:
    try:
        call(*args)
    except ValueError as error:
        return str(error)
    return ""


def run(rank: int, folder: Path, case: str, policy: str) -> dict[str, Any]:
    """Real PEFT in one process, and in both where it can; ours in both: a step, its state, files, the state set."""
    part = IDS.chunk(2)[rank]
    alone = make(peft, case)
    start = state_of(peft, alone)
    found: dict[str, Any] = {"start": start, "alone": step(alone, IDS), "trained": state_of(peft, alone)}
    if policy.startswith("fsdp1") and case in ACROSS:
        return {**found, "refused": error_of(fastpeft.utils.other.fsdp_auto_wrap_policy, make(fastpeft, case))}
    try:
        found["theirs"] = gather(step(together(peft, make(peft, case), policy), part))
    except (AssertionError, IndexError, RuntimeError, ValueError):  # PEFT reads a shard as if it were whole
        if policy in ("ddp", "fsdp2"):
            raise
    model = together(fastpeft, make(fastpeft, case), policy)
    found["ours"] = gather(step(model, part))
    inner = model.module if policy == "ddp" or policy.startswith("fsdp1") else model
    target = inner if policy == "ddp" else model
    found["state"] = state_of(fastpeft, target)
    saved = folder / f"{case} {policy}"
    inner.save_pretrained(saved / "given", state_dict=whole(target.state_dict()), is_main_process=rank == 0)
    if policy in ("ddp", "fsdp2"):
        inner.save_pretrained(saved / "asked", is_main_process=rank == 0)
    dist.barrier()
    found["files"] = [load_file(file) for file in saved.glob("*/adapter_model.safetensors")]
    if case == "FrodConfig" and policy.startswith("fsdp1"):
        found["unset"] = error_of(fastpeft.set_peft_model_state_dict, target, start)
        return found
    if policy.startswith("fsdp"):
        found["merging"] = error_of(inner.merge_adapter)
    fastpeft.set_peft_model_state_dict(target, start)
    found["set"] = state_of(fastpeft, target)
    model.eval()
    with torch.no_grad():
        found["again"] = gather(model(input_ids=part))
    return found


def inside(rank: int) -> str:
    """The error of a module whose tensors a unit around it has."""
    model = FullyShardedDataParallel(make(fastpeft, "lora"), device_id=torch.device("cpu"), use_orig_params=True)
    return error_of(fastpeft.get_peft_model_state_dict, model.module)


def through_accelerate(folder: Path, version: int, kind: str) -> dict[str, Any]:
    """accelerate's `save_fsdp_model` and `load_fsdp_model` of the adapter alone, with fastpeft in the place of PEFT."""
    from accelerate.utils import fsdp_utils

    model = together(fastpeft, make(fastpeft, "all"), "fsdp1 orig" if version == 1 else "fsdp2")
    start = state_of(fastpeft, model)
    plugin = SimpleNamespace(
        state_dict_type=StateDictType[kind], fsdp_version=version, optim_state_dict_config=None,
        state_dict_config=FullStateDictConfig() if version == 1 else SimpleNamespace(), sync_module_states=True,
    )  # fmt: skip
    accelerator = SimpleNamespace(
        num_processes=1, process_index=dist.get_rank(), is_fsdp2=version == 2, is_main_process=dist.get_rank() == 0,
        wait_for_everyone=dist.barrier,
    )  # fmt: skip
    old = fsdp_utils.is_peft_model, peft.get_peft_model_state_dict, peft.set_peft_model_state_dict
    fsdp_utils.logger = logging.getLogger(__name__)  # accelerate's wants an Accelerator
    fsdp_utils.is_peft_model = lambda model: True
    peft.get_peft_model_state_dict = fastpeft.get_peft_model_state_dict
    peft.set_peft_model_state_dict = fastpeft.set_peft_model_state_dict
    try:
        fsdp_utils.save_fsdp_model(plugin, accelerator, model, str(folder), adapter_only=True)
        dist.barrier()
        fastpeft.set_peft_model_state_dict(model, {k: torch.zeros_like(t) for k, t in start.items()})
        zeroed = state_of(fastpeft, model)
        fsdp_utils.load_fsdp_model(plugin, accelerator, model, str(folder), adapter_only=True)
    finally:
        fsdp_utils.is_peft_model, peft.get_peft_model_state_dict, peft.set_peft_model_state_dict = old
    return {"start": start, "zeroed": zeroed, "loaded": state_of(fastpeft, model)}


def run_all(rank: int, folder: Path) -> dict[Any, Any]:
    warnings.simplefilter("ignore")
    results: dict[Any, Any] = {"inside": inside(rank)}
    for case, policy in cases() if FULL else SHORT:
        results[case, policy] = run(rank, folder, case, policy)
    for version, kind in ((1, "FULL_STATE_DICT"), (2, "SHARDED_STATE_DICT")):
        results["accelerate", version] = through_accelerate(folder / f"accelerate{version}", version, kind)
    return results
