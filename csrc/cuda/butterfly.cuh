/* Shared by the files of butterfly_rotate. */
#pragma once
#include "rotate.cuh"

constexpr int64_t PK_REACH = 256; /* features that m factors may mix, and the size of a block */
constexpr int64_t PK_BLOCKS = 264; /* a launch should have, as in peft_kernels/cuda_rt.py */
