"""A small Llama trained as other people's scripts do, by Trainer and by a loop on accelerate: one of two processes that
DeepSpeed or FSDP has share it on a CPU, or one alone. `launched_tools.py RANK FOLDER KIND`, of which KIND is zero2,
zero3, fsdp1, fsdp2 or alone.

accelerate takes neither for a CPU: with `cpu=True` both become DDP, without a word. What is set here is what it finds
on a GPU.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import fastpeft
import peft
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from ecosystem_tools import llama, lora, losses, rows, trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FullStateDictConfig

BATCH, STEPS, HALF, RATE = 4, 4, 2, 0.02
CASES = [(library, loop, "dense") for library in ("peft", "fastpeft") for loop in ("trainer", "accelerate")]
CASES += [("fastpeft", "trainer", "packed"), ("fastpeft", "accelerate", "packed")]
NOTHING_KEPT = {
    "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0, "stage3_gather_16bit_weights_on_model_save": True,
}  # fmt: skip


def base(case: str) -> nn.Module:
    return fastpeft.quantize_model(llama(), double_quant=False) if case == "packed" else llama()


def adapted(library: Any, case: str) -> Any:
    model = base(case)
    torch.manual_seed(1)
    return library.get_peft_model(model, lora(library, task_type="CAUSAL_LM", init_lora_weights=False))


def begin(kind: str) -> None:
    """The process group; accelerate's state as it is when a script begins."""
    AcceleratorState._reset_state()
    if kind.startswith("zero"):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(cpu=False, backend="gloo")  # without a backend it counts one process
    else:
        PartialState(cpu=True)
    if kind.startswith("fsdp"):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # FSDP is for a few types


def deepspeed_config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": BATCH // 2, "train_batch_size": BATCH, "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **(NOTHING_KEPT if stage == 3 else {})},
    }  # fmt: skip


def made_trainer(model: Any, kind: str, folder: Path) -> Any:
    options: dict[str, Any] = {
        "per_device_train_batch_size": BATCH if kind == "alone" else BATCH // 2, "optim": "adamw_torch",
        "use_cpu": not kind.startswith("zero"), "learning_rate": RATE, "save_strategy": "steps", "save_steps": HALF,
        "accelerator_config": {"use_configured_state": True},
    }  # fmt: skip
    if kind.startswith("zero"):
        options["deepspeed"] = deepspeed_config(int(kind[-1]))
    elif kind.startswith("fsdp"):
        options |= {"fsdp": True, "fsdp_config": {
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "version": int(kind[-1]), "use_orig_params": True,
            "state_dict_type": "FULL_STATE_DICT", "sync_module_states": False, "cpu_ram_efficient_loading": False,
        }}  # fmt: skip
    return trainer(model, folder, STEPS, **options)


def with_trainer(library: Any, case: str, kind: str, folder: Path) -> dict[str, Any]:
    model = adapted(library, case)
    buffers = {name: t.detach().clone() for name, t in model.named_buffers()}
    made = made_trainer(model, kind, folder / "run")
    made.train()
    found = {"losses": losses(made), "type": made.accelerator.distributed_type.value, "state": state_of(library, made)}
    found["buffers"] = kept(model, buffers)
    made.save_model(folder / "saved")
    begin(kind)
    again = made_trainer(adapted(library, case), kind, folder / "run")
    again.train(resume_from_checkpoint=str(folder / f"run/checkpoint-{HALF}"))
    return {**found, "resumed": state_of(library, again), "resumed losses": losses(again)[HALF:]}


def state_of(library: Any, made: Any) -> dict[str, Tensor]:
    """The adapter, by the way on which Trainer and accelerate ask for it."""
    whole = made.accelerator.get_state_dict(made.model_wrapped)
    inner = made.accelerator.unwrap_model(made.model_wrapped)
    if not made.accelerator.is_main_process:
        return {}
    return {k: t.detach().clone() for k, t in library.get_peft_model_state_dict(inner, whole).items()}


def kept(model: Any, buffers: dict[str, Tensor]) -> bool:
    """True if buffers, as packed weights are, are where and as they were."""
    found = {name.replace("_fsdp_wrapped_module.", ""): t for name, t in model.named_buffers()}
    alike = (torch.equal(found[name], t) and found[name].dtype is t.dtype for name, t in buffers.items())
    return found.keys() == buffers.keys() and all(alike)


class Loop:
    """A training loop on accelerate."""

    def __init__(self, library: Any, case: str, kind: str) -> None:
        given: dict[str, Any] = {"cpu": not kind.startswith("zero")}
        self.library, self.model = library, adapted(library, case)
        if kind.startswith("zero"):
            given["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=deepspeed_config(int(kind[-1])))
        elif kind.startswith("fsdp"):
            given["fsdp_plugin"] = plugin = FullyShardedDataParallelPlugin(
                fsdp_version=int(kind[-1]), auto_wrap_policy="transformer_based_wrap", use_orig_params=True,
                transformer_cls_names_to_wrap=["LlamaDecoderLayer"], state_dict_type="FULL_STATE_DICT",
                sync_module_states=False, cpu_ram_efficient_loading=False,
            )  # fmt: skip
            if kind == "fsdp1":
                plugin.auto_wrap_policy = library.utils.other.fsdp_auto_wrap_policy(self.model)
        self.accelerator = accelerate.Accelerator(**given)
        data = rows().with_format("torch")
        loader = torch.utils.data.DataLoader(data, batch_size=BATCH if kind == "alone" else BATCH // 2)
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=RATE, weight_decay=0)
        self.model_wrapped, self.optimizer, self.loader = self.accelerator.prepare(self.model, optimizer, loader)

    def batches(self) -> Iterator[Any]:
        while True:
            yield from self.loader

    def run(self, steps: int) -> list[float]:
        found = []
        for _, batch in zip(range(steps), self.batches(), strict=False):
            loss = self.model_wrapped(**batch).loss
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            found.append(float(self.accelerator.reduce(loss.detach(), "mean")))
        return found


def with_accelerate(library: Any, case: str, kind: str, folder: Path) -> dict[str, Any]:
    made = Loop(library, case, kind)
    buffers = {name: t.detach().clone() for name, t in adapted(library, case).named_buffers()}
    found: dict[str, Any] = {"type": made.accelerator.distributed_type.value, "losses": made.run(HALF)}
    made.accelerator.save_state(str(folder / "run"))
    found["losses"] += made.run(STEPS - HALF)
    found |= {"state": state_of(library, made), "buffers": kept(made.model, buffers)}
    made.accelerator.unwrap_model(made.model_wrapped).save_pretrained(
        folder / "saved", state_dict=made.accelerator.get_state_dict(made.model_wrapped),
        is_main_process=made.accelerator.is_main_process,
    )  # fmt: skip
    begin(kind)
    again = Loop(library, case, kind)
    again.accelerator.load_state(str(folder / "run"))
    return {**found, "resumed losses": again.run(STEPS - HALF), "resumed": state_of(library, again)}


def main(rank: int, folder: Path, kind: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # What FSDP1 is to offload to a CPU from a CPU it frees, and crashes.
    FullStateDictConfig.offload_to_cpu = property(lambda self: False, lambda self, value: None)  # type: ignore
    results: dict[Any, Any] = {}
    for name, loop, case in CASES:
        begin(kind)
        library = peft if name == "peft" else fastpeft
        place = folder / f"{name} {loop} {case}"
        run = with_trainer if loop == "trainer" else with_accelerate
        results[name, loop, case] = found = run(library, case, kind, place)
        if rank == 0:  # the adapter's folder, in a process that shares nothing
            loaded = library.PeftModel.from_pretrained(base(case), place / "saved")
            found["loaded"] = library.get_peft_model_state_dict(loaded)
    if rank == 0:
        torch.save(results, folder / "results.pt")
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
