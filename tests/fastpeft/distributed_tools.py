"""One of two processes of tests/fastpeft/test_distributed*.py: `distributed_tools.py RANK FOLDER [sharing]`.

Trains small models alone and shared with the other process, and writes what each gave to FOLDER.
"""

from __future__ import annotations

import copy
import importlib.util
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastpeft
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WORLD = 2
TARGETS = ["q_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: fastpeft.LoraConfig(r=4, target_modules=TARGETS),
    "dora": lambda: fastpeft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    # one bank of vectors for all blocks
    "vblora": lambda: fastpeft.VBLoRAConfig(r=2, target_modules=TARGETS, num_vectors=8, vector_length=32),
}
QUICKER = ("llama", "opt")  # an MLP of its own, and one that lies in the decoder layer
IDS = torch.arange(24).view(4, 6) % 31


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.up_proj = nn.Linear(width, 2 * width, bias=False)
        self.down_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.q_proj(self.norm(h))
        return h + self.down_proj(F.silu(self.up_proj(h)))


class Net(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.lm_head = nn.Linear(width, 31, bias=False)
        self.reentrant: bool | None = None  # None: no checkpointing

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            if self.reentrant is None:
                h = layer(h)
            else:
                h = checkpoint(layer, h.requires_grad_() if h.is_leaf else h, use_reentrant=self.reentrant)
        return self.lm_head(h)


def base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = Net().bfloat16()
    if kind.startswith("nf4"):
        return fastpeft.quantize_model(model, "nf4", double_quant=kind == "nf4-nested")
    if kind == "bnb":
        import bitsandbytes as bnb

        for block in model.layers:
            for name in TARGETS:
                dense = getattr(block, name)
                layer = bnb.nn.Linear4bit(dense.in_features, dense.out_features, dense.bias is not None, torch.bfloat16)
                layer.load_state_dict(dense.state_dict())
                setattr(block, name, layer.to("cpu"))
    return model


def adapted(method: str, kind: str, reentrant: bool | None) -> Any:
    model = base(kind)
    model.reentrant = reentrant
    model = fastpeft.get_peft_model(model, CONFIGS[method]())
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.1)
    return model


def step(model: Any, ids: Tensor, whole: Callable[[Tensor], Tensor] = lambda t: t) -> dict[str, Any]:
    """One step of SGD: the output, the gradients and the adapter after it."""
    inner = getattr(model, "module", model)
    trained = {n: p for n, p in inner.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(list(trained.values()), lr=0.5)
    y = model(ids)
    y.double().square().mean().backward()
    grads = {n.replace("_fsdp_wrapped_module.", ""): whole(p.grad) for n, p in trained.items() if p.grad is not None}
    optimizer.step()
    return {"output": y.detach(), "grads": grads}


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather(y: Tensor) -> Tensor:
    parts = [torch.empty_like(y) for _ in range(WORLD)]
    dist.all_gather(parts, y.contiguous())
    return torch.cat(parts)


def alone(model: Any) -> dict[str, Any]:
    """Results of one process and of float64."""
    exact = copy.deepcopy(model).double()
    found = {"eager": step(model, IDS), "exact": step(exact, IDS)}
    for name, each in (("eager", model), ("exact", exact)):
        found[name]["state"] = fastpeft.get_peft_model_state_dict(each)
    return found


FSDP2 = [
    ("lora", "dense", None), ("lora", "nf4", None), ("lora", "nf4-nested", False), ("lora", "nf4", True),
    ("dora", "nf4-nested", None), ("vblora", "nf4", None), ("vblora", "dense", False), ("lora", "bnb", None),
]  # fmt: skip


def fsdp2(rank: int, folder: Path, method: str, kind: str, reentrant: bool | None) -> dict[str, Any]:
    found = alone(adapted(method, kind, reentrant))
    model = adapted(method, kind, reentrant)
    assert fastpeft.fully_shard_model(model) is model
    placements = {n: (tuple(p.shape), tuple(getattr(p, "placements", ()))) for n, p in model.named_parameters()}
    held = {n: p.to_local().numel() if hasattr(p, "to_local") else p.numel() for n, p in model.named_parameters()}
    ours = step(model, IDS.chunk(WORLD)[rank], full)
    ours["output"] = gather(ours["output"])
    ours["state"] = fastpeft.get_peft_model_state_dict(model)
    name = f"{method}-{kind}-{reentrant}"
    model.save_pretrained(folder / name)  # every process; one writes
    dist.barrier()
    with torch.no_grad():
        before = gather(model(IDS.chunk(WORLD)[rank]))
    errors = refusal(model.merge_adapter)
    fastpeft.set_peft_model_state_dict(model, {k: torch.zeros_like(v) for k, v in ours["state"].items()})
    zeroed = fastpeft.get_peft_model_state_dict(model)
    return {**found, "ours": ours, "placements": placements, "held": held, "after": before, "merging": errors,
            "zeroed": zeroed}  # fmt: skip


def torchs_states(rank: int) -> dict[str, Any]:
    """State dicts of packed layers, sharded by `fully_shard` and `fully_shard_model`, by the functions of torch that
    accelerate calls; outputs of a model of zeros in which they set one."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    both = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
    found: dict[str, Any] = {"wanted": adapted("lora", "nf4-nested", None).state_dict()}
    ours = fastpeft.fully_shard_model(adapted("lora", "nf4-nested", None))
    theirs, other = (fully_shard(adapted("lora", "nf4-nested", None)) for _ in range(2))
    found["states"] = [get_model_state_dict(model, options=both) for model in (ours, theirs)]
    adapter = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    found["adapter"] = get_model_state_dict(theirs, options=adapter)
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.detach().zero_()
    # accelerate reads the file in one process alone; torch writes into the dict that it is given
    set_model_state_dict(other, {**found["states"][1]} if rank == 0 else {}, options=both)
    with torch.no_grad():
        found["outputs"] = [gather(model(IDS.chunk(WORLD)[rank])) for model in (theirs, other)]
    return found


def packed_experts() -> dict[str, Any]:
    """A mixture with experts in 4 bits before it is sharded and after: outputs, gradients, state dicts."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    tools = runpy.run_path(str(Path(__file__).with_name("families_tools.py")))
    model = fastpeft.quantize_model(tools["tiny"]("mixtral", layers=1), experts=True)
    config = fastpeft.LoraConfig(r=2, target_modules=[], target_parameters=["gate_up_proj", "down_proj"],
                                 init_lora_weights=False)  # fmt: skip
    torch.manual_seed(0)
    model = fastpeft.get_peft_model(model, config)
    fastpeft.accelerate(model)
    wanted = {name: t.clone() for name, t in model.state_dict().items()}
    ids = torch.arange(3, 12)[None]
    runs = [_logits_and_gradients(model, ids)]
    fastpeft.fully_shard_model(model)
    runs.append(_logits_and_gradients(model, ids))
    shards = [type(p).__name__ for n, p in model.named_parameters() if "_4bit." in n]
    found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {"wanted": wanted, "found": found, "runs": runs, "shards": shards}


def quicker(name: str) -> dict[str, Any]:
    """A model of a family made quicker before it is sharded, after it, and never sharded, by its layers and what is in
    them: outputs and gradients so and undone, and what is served."""
    from torch.distributed.fsdp import fully_shard

    tools = runpy.run_path(str(Path(__file__).with_name("families_tools.py")))
    ids, found = torch.arange(3, 12)[None], {}
    for order in ("whole", "before", "after"):
        model = tools["tiny"](name, layers=1).requires_grad_()
        report = fastpeft.accelerate(model) if order == "before" else None
        units = [m for n, m in model.named_modules() if n.endswith((".0", ".0.mlp", ".0.self_attn"))]
        for unit in (*units[::-1], model) if order != "whole" else ():
            fully_shard(unit)
        report = report or fastpeft.accelerate(model)
        run, served = _logits_and_gradients(model, ids), report.served
        report.remove()
        left = [c.__name__ for m in model.modules() for c in type(m).__mro__ if "Fast" in c.__name__]
        found[order] = {"run": run, "served": served, "undone": _logits_and_gradients(model, ids), "left": left}
    return found


def _logits_and_gradients(model: Any, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    logits.square().mean().backward()
    return [logits.detach(), *(full(p.grad).clone() for p in model.parameters() if p.grad is not None)]


def refusal(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    try:
        call(*args, **options)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def ddp(rank: int, reentrant: bool | None) -> dict[str, Any]:
    from torch.nn.parallel import DistributedDataParallel

    found = alone(adapted("lora", "nf4-nested", reentrant))
    model = adapted("lora", "nf4-nested", reentrant)
    shared = DistributedDataParallel(model, find_unused_parameters=False)
    ours = step(shared, IDS.chunk(WORLD)[rank])
    ours["output"] = gather(ours["output"])
    ours["state"] = fastpeft.get_peft_model_state_dict(model)
    sent = [n for n, _ in model.named_buffers() if n not in shared.parameters_to_ignore]
    return {**found, "ours": ours, "sent": sent}


def fsdp1(rank: int) -> dict[str, Any]:
    """PEFT's recipe for the older FSDP."""
    from fastpeft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel

    found = alone(adapted("lora", "dense", None))
    model = adapted("lora", "dense", None)
    model.base_model.model._no_split_modules = ["Block"]
    shared = FullyShardedDataParallel(
        model, auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=True, device_id=torch.device("cpu")
    )
    wrapped = sorted({type(m.module).__name__ for m in FullyShardedDataParallel.fsdp_modules(shared)})
    y = shared(IDS.chunk(WORLD)[rank])
    start = fastpeft.get_peft_model_state_dict(adapted("lora", "dense", None))
    states = [start, fastpeft.get_peft_model_state_dict(shared)]
    fastpeft.set_peft_model_state_dict(shared, {k: t + 1 for k, t in start.items()})
    states.append({k: t - 1 for k, t in fastpeft.get_peft_model_state_dict(shared).items()})
    return {**found, "ours": {"output": gather(y.detach())}, "wrapped": wrapped, "states": states}


def refused() -> list[str]:
    """Messages of `fully_shard_model` for models that it refuses."""
    two = adapted("lora", "dense", None)
    two.base_model.model.layers[0].norm.weight.requires_grad_(True)  # bfloat16 beside the adapter's float32
    bank = adapted("vblora", "dense", None)
    merged = adapted("lora", "dense", None)
    merged.merge_adapter()
    shard = fastpeft.fully_shard_model
    return [
        refusal(shard, two), refusal(shard, bank, blocks=["NoSuchBlock"]), refusal(shard, bank.base_model.model),
        refusal(shard, merged),
    ]  # fmt: skip


def main(rank: int, folder: Path, part: str = "") -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD)
    if part == "sharing":
        import sharing_tools

        results = sharing_tools.run_all(rank, folder)
    else:
        results = everything(rank, folder)
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


def everything(rank: int, folder: Path) -> dict[Any, Any]:
    results: dict[Any, Any] = {"refused": refused()}
    for case in FSDP2:
        results[("fsdp2", *case)] = fsdp2(rank, folder, *case)
    for reentrant in (None, False):
        results["ddp", reentrant] = ddp(rank, reentrant)
    results["fsdp1"] = fsdp1(rank)
    results["torch's states"] = torchs_states(rank)
    if importlib.util.find_spec("transformers") is not None:
        results["packed experts"] = packed_experts()
        results["quicker"] = {name: quicker(name) for name in QUICKER}
    return results


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
