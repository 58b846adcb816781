"""`python -m bench`: speed and memory of the kernels and of the whole model, beside what a user would otherwise run."""
