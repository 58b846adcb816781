"""LoRA in a diffusion model: two adapters trained, loaded into a pipeline, mixed, fused and taken out again.

    python examples/diffusers_lora.py --output runs/diffusers

The pipeline is tiny and random, so that this takes seconds; a real one goes in the place of `tiny_pipeline()`. Each
adapter learns to denoise towards one value, +1 or -1. What the pipeline draws moves there with each adapter, and stays
between the two with both.
"""

import argparse
from typing import Any

import fastpeft
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from tiny_pipeline import tiny_pipeline

fastpeft.patch()  # diffusers puts real PEFT's layers in; they run on fastpeft's kernels

parser = argparse.ArgumentParser()
parser.add_argument("--output", default="runs/diffusers")
parser.add_argument("--steps", type=int, default=40)
args = parser.parse_args()


def draw(pipeline: Any) -> float:
    """The mean of what the pipeline draws: its latents, since it has no decoder here."""
    text, start = torch.ones(1, 4, 16), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    return float(pipeline(prompt_embeds=text, latents=start, **options).images.mean())


pipeline = tiny_pipeline()
print(f"without an adapter: {draw(pipeline):.2f}")
for name, value in (("light", 1.0), ("dark", -1.0)):
    unet = tiny_pipeline().unet
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_v", "to_out.0", "conv1", "conv2"]))
    optimizer = torch.optim.AdamW((p for p in unet.parameters() if p.requires_grad), lr=2e-2)
    for _ in range(args.steps):
        x, times = torch.randn(4, 4, 8, 8), torch.randint(1000, (4,))
        (unet(x, times, torch.ones(4, 4, 16)).sample - value).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = f"{args.output}/{name}"
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    pipeline.load_lora_weights(folder, adapter_name=name)

for names, weights in ((["light"], [1.0]), (["dark"], [1.0]), (["light", "dark"], [0.5, 0.5])):
    pipeline.set_adapters(names, adapter_weights=weights)
    print(f"{' and '.join(names)}: {draw(pipeline):.2f}")
pipeline.set_adapters("light")
pipeline.fuse_lora(adapter_names=["light"])
print(f"light, fused: {draw(pipeline):.2f}")
pipeline.unfuse_lora()
pipeline.unload_lora_weights()
print(f"unloaded: {draw(pipeline):.2f}")
