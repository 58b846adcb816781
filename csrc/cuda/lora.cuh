/* What the files of lora_linear on the GPU share. pk_lora_args is checked once, in lora_linear.cu; the functions here
 * start from checked arguments: quantised W (16 `table` values on the host), x of bfloat16 or float16, N, K, M > 0. */
#pragma once
#include "common.cuh"

/* PK_OK, or what is wrong with the arguments: of lora_linear.cu, which checks for all. */
int pk_lora_check(const pk_lora_args *args, const char *what);

/* y = x W^T + bias + scaling * s b^T for PK_GEMV_ROWS < M <= PK_MMA_ROWS, from ready args.s (float32 [M, r]).
 * With args.gain y = gain * h + bias, where h is the rest, and goes to args.h unless that is NULL; so in pk_lora_gemv.
 * pk_lora_mma_refuses: why it cannot serve these arguments (a static text), or NULL; a caller asks first.
 * pk_lora_mma_workspace: the bytes of args.workspace that it needs. All in lora_mma.cu. */
constexpr int64_t PK_MMA_ROWS = 512;
const char *pk_lora_mma_refuses(const pk_lora_args &args);
int64_t pk_lora_mma_workspace(const pk_lora_args &args);
int pk_lora_mma(const pk_lora_args &args, cudaStream_t stream);

/* The same for M <= PK_GEMV_ROWS, any shape: lora_gemv.cu. */
constexpr int64_t PK_GEMV_ROWS = 8;
int64_t pk_lora_gemv_workspace(const pk_lora_args &args);
int pk_lora_gemv(const pk_lora_args &args, cudaStream_t stream);

/* out[m, j] = scale * sum_c drop(z)[m, c] w[j, c], float32 [M, r], summed in a fixed order; z [M, C] of z_dtype (16 bits).
 * by_columns: w is stored as [C, r], and its rows are multiplied by args.gain where there is one. dropout: args' own, of z = x. In lora_linear.cu. */
int pk_lora_project(const pk_lora_args &args, const void *z, int64_t C, const void *w, int64_t w_dtype, bool by_columns,
                    bool dropout, float scale, float *out, cudaStream_t stream);

/* The whole backward for M <= PK_BACKWARD_ROWS: lora_backward.cu. */
constexpr int64_t PK_BACKWARD_ROWS = 64;
int64_t pk_lora_backward_workspace(const pk_lora_args &args);
int pk_lora_backward(const pk_lora_args &args, cudaStream_t stream);
