"""One of two processes of tests/fastpeft/test_parallel.py: `parallel_tools.py RANK FOLDER`.

Trains adapters on models that transformers' tensor parallelism splits, and writes what each process got to FOLDER. The
short form has a small model of its own, for which nothing slow is imported, the full one a Llama too.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fastpeft
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fastpeft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
ROWS = ["o_proj", "down_proj"]
COLUMNS = [name for name in ATTENTION + MLP if name not in ROWS]
BD = {"target_modules_bd_a": ROWS, "target_modules_bd_b": COLUMNS}
HEAD = {"target_modules": ["embed_tokens", "lm_head", "q_proj", "o_proj"], "init_lora_weights": "gaussian"}
CASES: dict[str, dict[str, Any]] = {
    "net": HEAD,
    "net-bdlora": {"target_modules": ["q_proj", "o_proj"], "use_bdlora": fastpeft.BdLoraConfig(
        ["o_proj"], ["q_proj"], nblocks=2)},
    "lora": {"target_modules": ATTENTION + MLP},
    "columns": {"target_modules": COLUMNS},
    "bias": {"target_modules": ["q_proj", "o_proj"], "lora_bias": True, "bias": "lora_only"},
    "head": HEAD,
    "bdlora": {"target_modules": ATTENTION + MLP, "use_bdlora": fastpeft.BdLoraConfig(**BD, nblocks=2)},
    # blocks that do not go with the parts: three of them, and A's where B is split
    "bdlora-3": {"target_modules": MLP, "r": 6, "use_bdlora": fastpeft.BdLoraConfig(
        ["up_proj"], ["gate_proj"], nblocks=3, match_strict=False)},
}  # fmt: skip
IDS = torch.arange(30).view(3, 10) * 7 % 61
SHORT = ("net", "net-bdlora")
LATE = ("net", "lora", "head")  # with a second adapter, rows of several, and merging


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(36, 66), nn.Linear(66, 36)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.o_proj(F.silu(self.q_proj(h)))


class Net(nn.Module):
    """As much of a language model as a plan can split; its vocabulary is divided unevenly by two."""

    def __init__(self, split: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens, self.lm_head = nn.Embedding(61, 36, padding_idx=3), nn.Linear(36, 61, bias=False)
        self.layers = nn.ModuleList([Block(), Block()])
        self.checkpoints = False
        if split:
            from transformers.distributed.tensor_parallel import apply_tensor_parallelism

            self._device_mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
            self._tp_plan = {
                "embed_tokens": "embedding_rowwise", "layers.*.q_proj": "colwise", "layers.*.o_proj": "rowwise",
                "lm_head": "colwise_gather_output",
            }  # fmt: skip
            styles = {key.rpartition(".")[2]: style for key, style in self._tp_plan.items()}
            named = [name for name, _ in [*self.named_parameters(), *self.named_modules()]]
            ends = {n: [part for part in n.split(".") if part in styles] for n in named}
            apply_tensor_parallelism(self, self._device_mesh, {n: styles[end[0]] for n, end in ends.items() if end})

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        self.checkpoints = True

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None) -> Any:
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            h = checkpoint(layer, h, use_reentrant=False) if self.checkpoints else layer(h)
        return SimpleNamespace(logits=self.lm_head(h))


def save_base(folder: Path) -> None:
    """The base model in folder / "base"; its vocabulary and its layers divide unevenly by two."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=36, intermediate_size=66, num_hidden_layers=2, num_attention_heads=6, head_dim=6,
        num_key_value_heads=2, attention_bias=True, pad_token_id=3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    model.save_pretrained(folder / "base")


def base(folder: Path, split: bool, case: str) -> Any:
    if case.startswith("net"):
        return Net(split)
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=2) if split else None
    return LlamaForCausalLM.from_pretrained(folder / "base", distributed_config=config, attn_implementation="eager")


def adapted(folder: Path, case: str, split: bool, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    config = fastpeft.LoraConfig(**{"r": 4, "lora_alpha": 6, **CASES[case]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fastpeft.get_peft_model(base(folder, split, case), config)


def state(model: Any, adapter: str = "default") -> dict[str, Tensor]:
    found = fastpeft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {key: value.clone() for key, value in found.items()}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def steps(model: Any, values: dict[str, Tensor]) -> dict[str, Any]:
    """Outputs and gradients with given adapter weights, and after one step."""
    from torch.distributed.tensor.experimental import implicit_replication

    fastpeft.set_peft_model_state_dict(model, values)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.3)
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.square().mean().backward()  # what comes into the model gets a gradient, too
    seen = embedded.grad.clone()
    optimizer.zero_grad()
    output = model(IDS).logits
    output.square().mean().backward()
    grads = {n: whole(p.grad).clone() for n, p in trained.items()}
    with implicit_replication():  # what is whole, beside what is split
        norm = whole(nn.utils.clip_grad_norm_(trained.values(), 1e6))
    optimizer.step()
    with torch.no_grad():
        after = model(IDS).logits
    found = {"seen": seen, "output": output.detach(), "norm": norm, "after": after}
    return {**found, "grads": grads, "state": state(model)}


def values_of(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {k: torch.randn(t.shape, generator=generator) * 0.2 for k, t in state(model).items()}


def later(model: Any, folder: Path, case: str, values: dict[str, Tensor], split: bool) -> dict[str, Any]:
    """A second adapter out of a file, rows of several, disabled and merged adapters."""
    found: dict[str, Any] = {}
    fastpeft.set_peft_model_state_dict(model, values)
    with torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.load_adapter(folder / f"{case}-alone", "second")
        rows = ["second", "default", "__base__"]
        found["rows"] = model(IDS, adapter_names=rows).logits
        with torch.enable_grad():
            model.gradient_checkpointing_enable()
            model.train()
            model.zero_grad()
            with model.base_model.rows_assigned(rows):
                model(IDS).logits.square().mean().backward()
            found["row grads"] = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
            model.eval()
        model.set_adapter("second")
        found["second"] = model(IDS).logits
        if case == "lora":
            found["compiled"] = torch.compile(model, backend="eager")(IDS).logits
        with model.disable_adapter():
            found["base"] = model(IDS).logits
        model.merge_adapter(["default"])
        found["merged"] = model(IDS).logits
        layer = next(m for m in model.modules() if hasattr(m, "lora_A") and "default" in m.methods)
        model.unmerge_adapter()
        found["delta"] = layer.get_delta_weight("default")
        found["unmerged"] = model(IDS).logits
        found["refused"] = split and [
            refusal(model.add_weighted_adapter, ["default", "second"], [1, 1], "sum", "linear"),
            refusal(hotswap_adapter, model, folder / f"{case}-alone", "default"),
        ]
        model.delete_adapter("second")
        found["unloaded"] = model.merge_and_unload()(IDS).logits
    return found


def run(folder: Path, case: str, split: bool) -> dict[str, Any]:
    model = adapted(folder, case, split, seed=1 + (dist.get_rank() if split else 0))
    model.train()
    start = state(model)
    values = values_of(model)
    found = {"start": start, **steps(model, values)}
    where = folder / f"{case}-{'split' if split else 'alone'}"
    model.save_pretrained(where, save_embedding_layers=False)
    if split:
        dist.barrier()
        found["shapes"] = {n: tuple(getattr(p, "placements", ())) for n, p in model.named_parameters() if "lora_" in n}
        again = fastpeft.PeftModel.from_pretrained(base(folder, True, case), where)
        with torch.no_grad():
            found["loaded"] = again(IDS).logits
    return {**found, **(later(model.eval(), folder, case, values, split) if case in LATE else {})}


def refused(folder: Path) -> list[str]:
    """Messages for what cannot follow the parts; the model stays as it was."""
    model, found = base(folder, True, "net"), []
    before = [name for name, _ in model.named_modules()]
    lora = {"target_modules": ["q_proj"]}
    configs = (
        fastpeft.LoraConfig(**lora, use_dora=True), fastpeft.VeraConfig(**lora), fastpeft.LoraConfig(
            **lora, init_lora_weights="pissa"), fastpeft.LoraConfig(**lora, modules_to_save=["lm_head"]),
        fastpeft.LoraConfig(**lora, trainable_token_indices=[1]),
    )  # fmt: skip
    for config in configs:
        found.append(refusal(fastpeft.get_peft_model, model, config))
        assert [name for name, _ in model.named_modules()] == before
    return found


def refusal(call: Any, *args: Any) -> str:
    try:
        call(*args)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def pefts(folder: Path) -> dict[str, Any]:
    """Results of real PEFT, split alike, with the adapter that ours saved, and ours with the file that PEFT saves.

    Of layers whose outputs are split: where inputs are, a forward with gradients fails in PEFT 0.21.2, which tells
    transformers 5.23 the size of a part for the whole's."""
    import peft

    model = peft.PeftModel.from_pretrained(base(folder, True, "columns"), folder / "columns-split", is_trainable=True)
    output = model(IDS).logits
    output.square().mean().backward()
    grads = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    model.save_pretrained(folder / f"pefts{dist.get_rank()}", save_embedding_layers=False)
    dist.barrier()
    ours = fastpeft.PeftModel.from_pretrained(base(folder, True, "columns"), folder / "pefts0", is_trainable=True)
    again = ours(IDS).logits
    again.square().mean().backward()
    theirs = {n: whole(p.grad) for n, p in ours.named_parameters() if p.grad is not None}
    rows = peft.get_peft_model(base(folder, True, "columns"), peft.LoraConfig(target_modules=["o_proj"]))
    try:
        rows(IDS)
        error = ""
    except RuntimeError as raised:
        error = str(raised)
    return {"output": (again.detach(), output.detach()), "grads": (theirs, grads), "error": error}


def pefts_names(folder: Path) -> list[bool]:
    """Checks of what PEFT's functions for split models say."""
    from fastpeft.tuners.lora.model import get_tp_plan_and_mesh
    from fastpeft.utils.integrations import check_deepspeed_zero3_enabled, dtensor_from_local_like, gather_params_ctx

    model = base(folder, True, "net")
    weight = model.layers[0].q_proj.weight
    again = dtensor_from_local_like(weight.to_local(), weight)
    with gather_params_ctx(weight):  # nothing to gather without ZeRO-3
        whole_again = torch.equal(again.full_tensor(), weight.full_tensor())
    keys = ["layers.1.q_proj", "layers.0.o_proj", "lm_head", "layers.0"]
    found = [get_tp_plan_and_mesh(model, key) for key in keys]
    return [
        whole_again, again.placements == weight.placements, not check_deepspeed_zero3_enabled(),
        [style for style, _ in found] == ["colwise", "rowwise", "colwise_gather_output", None],
        [mesh and mesh.mesh_dim_names for _, mesh in found] == [("tp",)] * 3 + [None],
        get_tp_plan_and_mesh(nn.Sequential(), "0") == (None, None),
    ]  # fmt: skip


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    import megatron_tools

    dist.init_process_group("gloo")
    full = os.environ.get("PEFT_KERNELS_FULL_TESTS") == "1"
    cases = CASES if full else SHORT
    results: dict[str, Any] = {case: run(folder, case, True) for case in cases}
    results["refused"] = refused(folder)
    results["names"] = pefts_names(folder)
    results["megatron"] = megatron_tools.everything()
    if full:
        results["peft"] = pefts(folder)
        results["peft's error"] = megatron_tools.pefts_error()
    torch.save(results, folder / f"results{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
