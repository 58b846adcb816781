"""The whole model: PeftModel, its tuner, tasks, status, merging and combining of adapters."""
