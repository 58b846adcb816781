"""One Trainer script, in turns: real PEFT on bitsandbytes NF4, the same patched, and fastpeft. And a small UNet step.

SmolLM2, LoRA r=16 on all linear layers, 4 x 128 tokens, every token learned, bfloat16 with float32 adapters, each
variant a process that stays warm (dropin_worker.py). Memory is the peak of training above the process after its
imports. Variants that this checkout cannot run are named with the reason.
  PEFT                 peft.get_peft_model
  patch                fastpeft.patch(model)
  patch, layers, loss  fastpeft.patch(model, layers=True, loss=True)
  PEFT, layers, loss   fastpeft.accelerate(model, loss=True) of PEFT's model, its adapters' layers PEFT's own
  ours                 fastpeft.get_peft_model and fastpeft.accelerate(model, loss=True)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

from ..machine import ROOT
from ..measure import Candidate, Stats
from ..pipes import Process
from ..results import Claim, Row
from .whole import extras, model_folder

VARIANTS = ("PEFT", "patch", "patch, layers, loss", "PEFT, layers, loss", "ours")
TARGETS = {  # by dropout: how much faster than PEFT the issue asks
    0.05: {"patch": 1.6, "patch, layers, loss": 2.1, "ours": 2.1},
    0.0: {"patch": 1.1, "patch, layers, loss": 1.5, "ours": 1.5},
}
PARTS = {"dropout": 0.05, "plain": 0.0}
MEMORY = 0.55  # of PEFT's, at most, with the loss by chunks
KINDS = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0"], "feed-forward": ["net.0.proj", "net.2"],
    "convolution": ["conv1", "conv2"], "projection": ["proj_in", "proj_out"], "time": ["time_emb_proj"],
}  # fmt: skip


class Script(Process):
    """The Trainer script of one variant."""

    def __init__(self, variant: str, dropout: float, args: argparse.Namespace) -> None:
        task = {"variant": variant, "folder": str(model_folder(args)), "threads": args.threads, "dropout": dropout,
                "rows": 4, "length": 128}  # fmt: skip
        super().__init__(variant, ROOT, ["-m", "bench.suites.dropin_worker"], task)
        self.imported = float(self.receive()["imported_mib"] or 0)


def _last_line(error: RuntimeError) -> str:
    return (str(error).strip().splitlines() or ["it ended"])[-1]


def trainer_row(dropout: float, args: argparse.Namespace) -> Row:
    scripts: list[Script] = []
    stats: dict[str, Stats] = {}
    last: dict[str, dict[str, Any]] = {}
    notes = []
    title = f"Trainer, dropout {dropout:g}"
    try:
        for variant in args.modes or VARIANTS:
            script = Script(variant, dropout, args)
            try:
                script.receive()
            except RuntimeError as error:
                notes.append(f"{title}: {variant} does not run: {_last_line(error)}")
                script.close()
                continue
            scripts.append(script)
            print(f"{title}: {variant} is ready", file=sys.stderr)
        stats = {script.name: Stats() for script in scripts}
        for r in range(3 if args.quick else args.step_rounds):
            for i in range(len(scripts)):
                script = scripts[(i + r) % len(scripts)]
                last[script.name] = found = script.ask("run")
                found["above_mib"] = found["peak_mib"] - script.imported
                stats[script.name].samples.append(found["s"])
    finally:
        for script in scripts:
            script.close()
    claims = [Claim("PEFT", [name], ["PEFT"], TARGETS[dropout].get(name)) for name in stats if name != "PEFT"]
    case = {"suite": "dropin", "what": "trainer", "tokens": 512, "dropout": dropout, "r": 16}
    row = Row(title, case, stats, claims, extra=extras(last, ["above_mib", "cpu_s", "loss"]), notes=notes)
    row.notes += memory_notes(title, {name: found["above_mib"] for name, found in last.items()})
    return row


def memory_notes(title: str, above: dict[str, float]) -> list[str]:
    """Peak memory of the variants with the loss by chunks, beside PEFT's."""
    if "PEFT" not in above:
        return []
    found = {name: mib / above["PEFT"] for name, mib in above.items() if "loss" in name or name == "ours"}
    return [f"{title}: peak memory of {name} is {share:.2f} of PEFT's, at most {MEMORY} is asked: "
            f"{'met' if share <= MEMORY else 'MISSED'}" for name, share in found.items()]  # fmt: skip


Step = Callable[[], None]


def unet(kind: str, patched: bool) -> tuple[Step, Step]:
    """A forward and backward pass of a small UNet of diffusers with PEFT's LoRA on one kind of its layers; and the same
    of these layers alone, one after another, each with the input that it has in the UNet."""
    import diffusers
    import fastpeft
    import peft
    import torch

    torch.manual_seed(0)
    model: Any = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64, attention_head_dim=8, norm_num_groups=8, use_linear_projection=True,
    ).requires_grad_(False)  # fmt: skip
    model.add_adapter(peft.LoraConfig(r=8, target_modules=KINDS[kind], init_lora_weights=False))
    if patched:
        fastpeft.patch(model)
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 8, 64)

    def step() -> Any:
        loss = model(sample, torch.tensor([3, 5]), text).sample.square().mean()
        return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    calls: list[tuple[Any, ...]] = []

    def seen(layer: Any, inputs: tuple[Any, ...], y: Any) -> None:
        x, weights = inputs[0], [p for p in layer.parameters() if p.requires_grad]
        x = x.detach().clone().requires_grad_(x.requires_grad)
        calls.append((layer, x, [*weights, x] if x.requires_grad else weights, torch.randn_like(y)))

    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    if not layers:
        raise ValueError(f"no layer of the UNet is of the kind {kind}: {KINDS[kind]}")
    hooks = [m.register_forward_hook(seen) for m in layers]
    step()
    for hook in hooks:
        hook.remove()

    def alone() -> None:
        for layer, x, wanted, dy in calls:
            torch.autograd.grad(layer(x), wanted, dy)

    return step, alone


def unet_rows() -> Iterator[Row]:
    try:
        import diffusers

        assert diffusers
    except ImportError as error:
        print(f"the UNet was not run: {error}", file=sys.stderr)
        return
    for kind in KINDS:
        theirs, ours = unet(kind, False), unet(kind, True)
        for i, (title, asked) in enumerate({"UNet": None, "UNet's layers": 1.0}.items()):
            candidates = [Candidate("PEFT", [theirs[i]]), Candidate("patch", [ours[i]])]
            case = {"suite": "dropin", "what": title, "kind": kind, "r": 8}
            yield Row(f"{title}, {kind}", case, {}, [Claim("PEFT", ["patch"], ["PEFT"], asked)], candidates=candidates)


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for part, dropout in PARTS.items():
        if part in args.only:
            yield trainer_row(dropout, args)
    if "unet" in args.only:
        yield from unet_rows()
