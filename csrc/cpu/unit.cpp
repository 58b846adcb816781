/* One translation unit per (op, level): CMake sets PK_NS (namespace of the level), PK_LEVEL (0 scalar, 2 avx2,
 * 5 avx512, 6 avx512bf16) and PK_OP_INC (the kernel text), with that level's instruction set flags.
 *
 * Rules for an .inc file: it defines its kernels from kernels.def as plain functions (their namespace is PK_NS), and
 * everything else as static. It includes nothing of the C++ standard library beyond what is here: an inline function or
 * std:: template instantiated in an AVX-512 file could be the copy that the linker keeps for the scalar one.
 * Multiplications and additions are not contracted (-ffp-contract=off): say so where an FMA is wanted. */
#include <math.h>
#include <string.h>

#include "kernels.h"
#if PK_LEVEL >= 2
#include <immintrin.h>
#endif

namespace PK_NS {
#define PK_KERNEL(ret, name, args) ret name args;
#include "kernels.def"
#undef PK_KERNEL
#include PK_OP_INC
} // namespace PK_NS
