/* Shared by the files of lora_linear on the GPU. pk_lora_args is checked once, in lora_linear.cu; the functions here
 * start from checked arguments: quantised W (16 `table` values on the host), x of bfloat16 or float16, N, K, M > 0. */
#pragma once
#include "lora_stack.cuh"

/* PK_OK, or what is wrong with the arguments: of lora_linear.cu, which checks for all. */
int pk_lora_check(const pk_lora_args *args, const char *what);

/* Projections of one x that a launch serves: they have x, x_dtype, M, K and all that chooses a kernel in common. */
struct PkStack {
    const pk_lora_args *layer[PK_STACK];
    int count;
};
/* A product's share of the workspace, in bytes, multiples of 16: counters, which are 0 when it begins and when it
 * ends, and room for parts of sums. */
struct PkNeed {
    int64_t counters, parts;
};
struct PkRoom {
    unsigned *counters;
    float *parts;
};

/* Weights of integers by group in the form that all below take (groups.cuh): of `count` projections of one x, args come
 * to have float32 scales as absmax, c as nested_absmax and the sums of x (backward: none) as offset, both NULL where c
 * is 0 everywhere; others stay as they are. `room`: as many bytes as the first says, 16-byte aligned. Nothing is
 * launched where that is 0. In lora_groups.cu. */
int64_t pk_lora_groups_bytes(const pk_lora_args *args, int count, bool backward);
int pk_lora_groups(pk_lora_args *args, int count, float *room, bool backward, cudaStream_t stream);

/* y = x W^T + bias + scaling * s b^T for PK_GEMV_ROWS < M <= PK_MMA_ROWS, from s (float32 [M, r]).
 * With a gain y = gain * h + bias, where h is the rest, and goes to args.h unless that is NULL; so in pk_lora_gemv.
 * start: NULL, or float32 [M, N] in place of scaling * s b^T, of a single projection.
 * after: the launch before it on the stream is pk_lora_project, or this function, of the same call: it may begin
 * sooner. So in pk_lora_gemv.
 * pk_lora_mma_refuses: why it cannot serve these arguments (a static text), or NULL; a caller asks first.
 * pk_lora_mma_general: they take the tile for any K and alignment; a stack is of one sort. All in lora_mma.cu. */
constexpr int64_t PK_MMA_ROWS = 512;
constexpr int64_t PK_STACK_ROWS = 64; /* beyond, a stack is of one */
const char *pk_lora_mma_refuses(const pk_lora_args &args);
bool pk_lora_mma_general(const pk_lora_args &args);
PkNeed pk_lora_mma_need(const PkStack &stack);
int pk_lora_mma(const PkStack &stack, const float *start, PkRoom room, bool after, cudaStream_t stream);

/* The same for M <= PK_GEMV_ROWS, any shape; with args.adapters each row has its own adapter: lora_gemv.cu. */
constexpr int64_t PK_GEMV_ROWS = 8;
PkNeed pk_lora_gemv_need(const PkStack &stack);
int pk_lora_gemv(const PkStack &stack, PkRoom room, bool after, cudaStream_t stream);

/* s = drop(x) a^T of each projection: float32 [M, r], summed in a fixed order. With args.adapters each row takes its
 * own adapter's a, and what is beyond its rank is zero. Sets `bytes` of `cleared` (16-byte aligned, a multiple of 16)
 * to 0, for what comes next. Backward, of a single one: out = scaling * dy b, the rows of b multiplied by args.gain
 * where there is one, or each row's own b and scaling. In lora_project.cu. */
int pk_lora_project(const PkStack &stack, void *cleared, int64_t bytes, cudaStream_t stream);
int pk_lora_project_backward(const pk_lora_args &args, float *out, cudaStream_t stream);

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
