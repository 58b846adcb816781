"""Fine-tuning of causal language models with adapters: data, packing, chunked loss, optimizers, checkpoints, the loop."""
