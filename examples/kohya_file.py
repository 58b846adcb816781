"""A LoRA file in Kohya's format, as most image models' adapters are published, loaded into a diffusers pipeline.

    python examples/kohya_file.py --lora my_style.safetensors --pipeline stable-diffusion-v1-5/stable-diffusion-v1-5
    python examples/kohya_file.py

Without arguments it writes such a file for a tiny pipeline first. diffusers turns its names and `alpha` into PEFT's;
the layers that PEFT puts in run on fastpeft's kernels. The script prints which, and checks one weight by the formula
W + scale * alpha / rank * up @ down.
"""

import argparse
import tempfile

import fastpeft
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_pipeline import tiny_pipeline

fastpeft.patch()
NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def write_example(path: str) -> None:
    """Kohya's keys for two layers: `lora_<model>_<path with underscores>`, with lora_down, lora_up and alpha."""
    torch.manual_seed(0)
    tensors = {}
    for name in (NAME, NAME.replace("to_q", "to_v")):
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, 16)
        tensors[f"{name}.lora_up.weight"] = torch.randn(16, 4)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)


parser = argparse.ArgumentParser()
parser.add_argument("--lora", help="a .safetensors file in Kohya's format")
parser.add_argument("--pipeline", help="a folder, or a name on the Hub")
parser.add_argument("--scale", type=float, default=0.5)
args = parser.parse_args()
if args.lora is None:
    args.lora = f"{tempfile.mkdtemp()}/style.safetensors"
    write_example(args.lora)
pipeline = tiny_pipeline() if args.pipeline is None else DiffusionPipeline.from_pretrained(args.pipeline)

layer = pipeline.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
before = layer.to_q.weight.detach().clone()
pipeline.load_lora_weights(args.lora, adapter_name="style")
print(fastpeft.patch(pipeline.unet))  # the report: which layers run on which kernel
pipeline.set_adapters("style", adapter_weights=args.scale)
pipeline.fuse_lora(adapter_names=["style"])

file = load_file(args.lora)
down, up = file[f"{NAME}.lora_down.weight"], file[f"{NAME}.lora_up.weight"]
expected = before + args.scale * file[f"{NAME}.alpha"] / len(down) * up @ down
print(f"largest difference from the formula: {(layer.to_q.get_base_layer().weight - expected).abs().max().item():.1e}")
