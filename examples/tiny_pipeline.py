"""A diffusion pipeline with a tiny random UNet and nothing else, for the examples beside it: nothing to download."""

from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel


def tiny_pipeline() -> Any:
    """The same weights every time. It takes `prompt_embeds` [1, n, 16] and draws latents [1, 4, 8, 8]."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip
    scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False, steps_offset=1)
    pipeline = StableDiffusionPipeline(None, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
