"""The compilers of Triton's kernels: which Triton is installed, and which ptxas it takes for an architecture."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

# ptxas may write to the registers that a wgmma of sm_90 still reads as its left operand (triton-lang/triton #9433 and
# #11781); fixed in
_WGMMA_FROM_REGISTERS = (13, 3)


def numbers(version: str) -> tuple[int, ...]:
    """"3.6.0+git1" -> (3, 6, 0); () where it does not begin with a number."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


@dataclass(frozen=True)
class Toolchain:
    """Versions of Triton and of ptxas for one architecture, as numbers; () where there is none, which is older than
    all."""

    arch: str
    triton: tuple[int, ...] = ()
    ptxas: tuple[int, ...] = ()

    @property
    def wgmma_from_registers(self) -> bool:
        """True where a product may have its left operand in registers whatever tensor-core instruction it becomes."""
        return self.arch != "sm_90" or self.ptxas >= _WGMMA_FROM_REGISTERS


@cache
def of(arch: str) -> Toolchain:
    """The compilers for `arch` ("sm_90"). Asks Triton once a process: the first call of an architecture starts ptxas.

    The ptxas is the one that Triton itself would start, so TRITON_PTXAS_PATH and the like count.
    """
    try:
        import triton
        from triton.backends.nvidia.compiler import get_ptxas

        return Toolchain(arch, numbers(triton.__version__), numbers(get_ptxas(int(arch.removeprefix("sm_"))).version))
    except ImportError:
        return Toolchain(arch)
    except RuntimeError:  # Triton without a ptxas, which compiles for no NVIDIA GPU
        return Toolchain(arch, numbers(triton.__version__))
