"""Fine-tuning of causal language models: data, packing, chunked loss, optimizers, checkpoints, the loop."""
