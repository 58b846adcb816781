"""The GPU report: the `gpu` tests, then the benches on a CUDA device beside what a user would otherwise run there.

`make gpu-report`, or `python -m bench --gpu`. Results lie under bench/results/<gpu>/.
"""
