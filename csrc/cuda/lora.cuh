/* Shared by the files of lora_linear on the GPU. pk_lora_args is checked once, in lora_linear.cu; the functions here
 * start from checked arguments: quantised W (16 `table` values on the host), x of bfloat16 or float16, N, K, M > 0. */
#pragma once
#include "common.cuh"

/* PK_OK, or what is wrong with the arguments: of lora_linear.cu, which checks for all. */
int pk_lora_check(const pk_lora_args *args, const char *what);

/* y = x W^T + bias + scaling * s b^T for PK_GEMV_ROWS < M <= PK_MMA_ROWS, from ready args.s (float32 [M, r]).
 * With args.gain y = gain * h + bias, where h is the rest, and goes to args.h unless that is NULL; so in pk_lora_gemv.
 * start: NULL, or float32 [M, N] in place of scaling * s b^T.
 * pk_lora_mma_refuses: why it cannot serve these arguments (a static text), or NULL; a caller asks first.
 * pk_lora_mma_workspace: the bytes of args.workspace that it needs. All in lora_mma.cu. */
constexpr int64_t PK_MMA_ROWS = 512;
const char *pk_lora_mma_refuses(const pk_lora_args &args);
int64_t pk_lora_mma_workspace(const pk_lora_args &args);
int pk_lora_mma(const pk_lora_args &args, const float *start, cudaStream_t stream);

/* The same for M <= PK_GEMV_ROWS, any shape; with args.adapters each row has its own adapter: lora_gemv.cu. */
constexpr int64_t PK_GEMV_ROWS = 8;
int64_t pk_lora_gemv_workspace(const pk_lora_args &args);
int pk_lora_gemv(const pk_lora_args &args, cudaStream_t stream);

/* out = drop(x) a^T or, backward, scaling * dy b (the rows of b multiplied by args.gain where there is one): float32
 * [M, r], summed in a fixed order. With args.adapters each row takes its own adapter's a, or b and scaling, and what is
 * beyond its rank is zero. In lora_linear.cu. */
int pk_lora_project(const pk_lora_args &args, bool backward, float *out, cudaStream_t stream);

/* With args.adapters, from s [M, r]: out[m] = scaling * s[m] b^T of row m's adapter, float32 [M, N], or, backward,
 * drop'(s[m] a), [M, K]; out is 16-byte aligned. In multi_lora.cu. */
int pk_lora_expand(const pk_lora_args &args, const float *s, bool backward, float *out, cudaStream_t stream);

/* The whole backward for M <= PK_BACKWARD_ROWS: lora_backward.cu. */
constexpr int64_t PK_BACKWARD_ROWS = 64;
int64_t pk_lora_backward_workspace(const pk_lora_args &args);
int pk_lora_backward(const pk_lora_args &args, cudaStream_t stream);

/* Its product dy W, float32 [splits, M, K], to be added up: lora_dx.cu. */
int pk_lora_dx_splits(const pk_lora_args &args);
int pk_lora_dx(const pk_lora_args &args, float *parts, cudaStream_t stream);
