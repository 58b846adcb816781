"""`python tools/gpu_run.py --out DIR`: what a machine with a GPU can tell about these kernels (bench/gpu/run.py)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.gpu import run

if __name__ == "__main__":
    sys.exit(run.main())
