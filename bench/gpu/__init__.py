"""The GPU run, `python tools/gpu_run.py --out DIR`: `gpu` tests, sanitizers and rows of times, then an answer sheet.

What starts the parts needs nothing but Python (run.py, supervise.py); each part has processes of its own (worker.py).
"""
