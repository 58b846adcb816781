"""Helpers that every Triton kernel shares: `device` (called inside kernels) and `host` (launching and compiling).

Nothing here imports Triton until a kernel is asked for: `import peft_kernels` stays free of it.
"""
