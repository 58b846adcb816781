/* What the files of lora_linear on the GPU share. pk_lora_args is checked once, in lora_linear.cu; the functions here
 * start from checked arguments: quantised W (16 `table` values on the host), x of bfloat16 or float16, N, K, M > 0. */
#pragma once
#include "common.cuh"

/* y = x W^T + bias + scaling * s b^T for 8 < M <= 512, from ready args.s (float32 [M, r]); queued on `stream`.
 * pk_lora_mma_refuses: why it cannot serve these arguments (a static text), or NULL; a caller asks first.
 * pk_lora_mma_workspace: the bytes of args.workspace that it needs. All in lora_mma.cu. */
const char *pk_lora_mma_refuses(const pk_lora_args &args);
int64_t pk_lora_mma_workspace(const pk_lora_args &args);
int pk_lora_mma(const pk_lora_args &args, cudaStream_t stream);
