"""One of two processes of tests/fastpeft/test_deepspeed.py: `deepspeed_tools.py RANK FOLDER CASE STAGE`.

A step of ZeRO on the CPU, of which the small sizes leave nothing gathered between modules.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import deepspeed
import fastpeft
import peft
import torch
from sharing_tools import IDS, Net, error_of, make, state_of, step
from torch import Tensor

ZERO = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0}  # fmt: skip


def packed(library: Any) -> Any:
    """A 4-bit base with LoRA."""
    torch.manual_seed(0)
    base = fastpeft.quantize_model(Net(64), double_quant=False)
    torch.manual_seed(1)
    config = library.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return library.get_peft_model(base, config)


def main(rank: int, folder: Path, case: str, stage: int) -> None:
    torch.set_num_threads(1)
    quantised = case == "packed"
    alone = packed(fastpeft) if quantised else make(peft, case)
    library = fastpeft if quantised else peft
    model = packed(fastpeft) if quantised else make(fastpeft, case)
    start = state_of(library, alone)
    buffers = {name: copy.deepcopy(tensor) for name, tensor in model.named_buffers()}
    found: dict[str, Any] = {"start": start, "alone": step(alone, IDS), "trained": state_of(library, alone)}
    config = {
        "train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **(ZERO if stage == 3 else {})}, "steps_per_print": 10**9,
    }  # fmt: skip
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    found["partitioned"] = all(hasattr(p, "ds_id") and not p.numel() for p in model.parameters())
    found["buffers"] = all(torch.equal(t, buffers[n]) and t.dtype is buffers[n].dtype for n, t in model.named_buffers())
    part = IDS.chunk(2)[rank]
    y: Tensor = engine(part)
    engine.backward(y.square().mean())
    engine.step()
    parts = [torch.empty_like(y) for _ in range(2)]
    torch.distributed.all_gather(parts, y.detach().contiguous())
    found["ours"], found["state"] = torch.cat(parts), state_of(fastpeft, model)
    model.save_pretrained(folder / "asked")
    if stage == 3:
        found["merging"] = error_of(model.merge_adapter)
        whole = engine._zero3_consolidated_16bit_state_dict()  # what Trainer and accelerate ask for
        if rank == 0:
            model.save_pretrained(folder / "given", state_dict=whole)
    fastpeft.set_peft_model_state_dict(model, start)
    found["set"] = state_of(fastpeft, model)
    if rank == 0:
        torch.save(found, folder / "results.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
