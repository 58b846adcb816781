/* The whole C ABI of the native libraries. No torch headers, no C++ in the signatures.
 *
 * Conventions
 *   - Every function that can fail returns a pk_status; the text is in pk_last_error() of the same thread until the
 *     next failing call there. Nothing exits, prints or throws.
 *   - Pointers are to contiguous row-major memory that the caller owns; a pointer to something absent is NULL.
 *   - Sizes are int64_t counts of elements unless the name says bytes. dtype arguments are pk_dtype codes.
 *   - `threads` is of the call at most, from torch.get_num_threads(). Results never depend on it.
 *   - Any change to a signature, a struct or a meaning below raises PK_ABI_VERSION and its twin in native.py.
 *
 * Adding a function to the CPU library (five places, each one line or one file):
 *   1. here: its declaration, with shapes and units;
 *   2. csrc/cpu/kernels.def: one PK_KERNEL line for what differs by instruction set;
 *   3. csrc/cpu/<op>.inc: the text of that kernel, compiled once per level (see csrc/cpu/unit.cpp for the rules);
 *   4. csrc/cpu/<op>.cpp: the exported function: checks its arguments, then calls pk_table()->name(...);
 *   5. CMakeLists.txt: <op> in PK_CPU_OPS; peft_kernels/native.py: its argtypes in _CPU_SIGNATURES.
 * The LoRA family (lora_linear, lora_linear_stacked, multi_lora_linear, dora_linear, dora_norm) shares csrc/cpu/lora/:
 * 3 and 4 are lora_linear.inc, lora_linear_backward.inc and lora_linear.cpp there; grouped_linear.cpp calls those.
 */
#ifndef PK_ABI_H
#define PK_ABI_H
#include <stdint.h>

#define PK_ABI_VERSION 13
#if defined(_WIN32)
#define PK_EXPORT __declspec(dllexport)
#else
#define PK_EXPORT __attribute__((visibility("default")))
#endif
#ifdef __cplusplus
extern "C" {
#endif

typedef enum pk_status {
    PK_OK = 0,
    PK_ERR_ARGUMENT = 1, /* a value the function does not take: a bug of the caller */
    PK_ERR_MEMORY = 2,   /* workspace could not be allocated */
    PK_ERR_LEVEL = 3,    /* unknown instruction set level, or one this CPU lacks */
    PK_ERR_DEVICE = 4    /* a CUDA call failed */
} pk_status;

typedef enum pk_dtype { PK_F32 = 0, PK_BF16 = 1, PK_F16 = 2, PK_F64 = 3, PK_U8 = 4 } pk_dtype;

/* Formats of weights: peft_kernels/formats/known. 3 to 5: integers by group; from 6 on: GGUF. CUDA has the first 4. */
typedef enum pk_quant_type {
    PK_DENSE = 0, PK_NF4 = 1, PK_FP4 = 2, PK_INT4 = 3, PK_INT8 = 4, PK_UINT8 = 5, PK_Q4_0 = 6, PK_Q4_1 = 7, PK_Q5_0 = 8,
    PK_Q5_1 = 9, PK_Q8_0 = 10, PK_Q4_K = 11, PK_Q5_K = 12, PK_Q6_K = 13, PK_IQ4_NL = 14, PK_MXFP4 = 15
} pk_quant_type;

PK_EXPORT int pk_abi_version(void);
PK_EXPORT const char *pk_last_error(void); /* never NULL; "" before the first failure of this thread */

/* ---- instruction set levels (CPU library) ------------------------------------------------------------------------ */
PK_EXPORT const char *pk_cpu_level(void);            /* the level in use: scalar, avx2, avx512 or avx512bf16 */
PK_EXPORT const char *pk_cpu_levels(void);           /* all that this CPU and build have, comma separated, rising */
PK_EXPORT int pk_cpu_set_level(const char *name);    /* NULL or "": the best one. For tests: not while kernels run */
PK_EXPORT const char *pk_cpu_openmp(void);           /* path of the OpenMP runtime in use; "" for none (serial) */

/* ---- memory (CPU library) ------------------------------------------------------------------------------------------
 * Many places that are in no cache, at once: 1 where `count` places of 1, 2, 4 or 8 `bytes` are content [count]. */
PK_EXPORT int pk_cpu_unchanged(const int64_t *addresses, int64_t count, int64_t bytes, const void *content);

/* ---- lora_linear (CPU library) -----------------------------------------------------------------------------------
 * Shapes: x, dx [M, K]; y, dy [M, N]; weight [N, K]; a, da [r, K]; b, db [N, r]; bias [N]; s [M, r] float32.
 *   forward:  s = drop(x) a^T;  y = x weight^T + bias + scaling * s b^T
 *   backward: ds = scaling * dy b;  dx = dy weight + drop'(ds a);  da = ds^T drop(x);  db = scaling * dy^T s
 * With a gain [N] (DoRA; h [M, N], dgain [N] float32), d = drop:
 *   forward:  h = d(x) weight^T + scaling * s b^T;  y = gain * h + (x - d(x)) weight^T + bias
 *   backward: dh = gain * dy; ds, da, db as above with dh for dy; dgain = sum over rows of dy * h;
 *             dx = dy weight + drop'((dh - dy) weight + ds a), which without dropout is dh weight + ds a
 * With adapters (many adapters on one weight, no gain): a, da [P, K]; b, db [P, N], which is b transposed; rows
 * starts[i] .. starts[i] + ranks[i] of both are adapter i's. adapters[m] is row m's, -1 for none; r = max_rank is the
 * width of s, with zeros beyond ranks[i]. Adapters in use share no rows in a backward; rows of da and db that belong to
 * no adapter in use are zeroed.
 * Adapters by pointer (starts NULL, S > 0; CPU only): a, b, da, db are arrays of S pointers, to a_i, da_i [ranks[i], K]
 * and b_i, db_i [N, ranks[i]] of each adapter; an entry of da or db that is NULL is not wanted, and those of adapters
 * without a row of x are zeroed. P is not read.
 * Quantised weights: N*K codes, two a byte, high nibble = even element of the flat row-major order, absmax per
 * `blocksize` elements of that order. absmax is float32, or uint8 codes when nested_code != NULL: then
 * absmax[i] = nested_code[codes[i]] * nested_absmax[i / nested_blocksize] + *offset.
 * NF4 and FP4 are these. GGUF: weight is the blocks, row after row, and K a multiple of theirs; the other parts are not
 * read. Integers by group, G = ceil(K / blocksize) groups a row: weight is the codes, absmax [N, G] scales of w_dtype,
 * nested_absmax [N, G] zeros whose dtype is nested_blocksize (PK_U8 or w_dtype), offset [N, G] shifts of w_dtype, and
 * nested_code int32 [K] groups of columns; the last three may be NULL.
 * Dropout: element e = row * K + col is dropped iff word e & 3 of Philox4x32-10(key = seed, counter = e >> 2) is below
 * min(round(p * 2^32), 2^32 - 1); kept elements are multiplied by 1 / (1 - p).
 * Every field is 8 bytes wide so that Python can pack the struct in one call. */
typedef struct pk_lora_args {
    const void *x;
    const void *weight;
    const void *absmax;
    const float *nested_absmax;
    const float *nested_code; /* 256 entries */
    const float *offset;
    const void *a;    /* NULL: no adapter (then r = 0) */
    const void *b;
    const void *bias; /* forward only */
    const int64_t *seed; /* not NULL when dropout_p > 0 */
    void *y;          /* forward: out, x_dtype */
    float *s;         /* forward: out; backward: in */
    const void *dy;   /* backward: x_dtype */
    void *dx;         /* backward: out, x_dtype; NULL: not needed */
    void *da;         /* backward: out, a_dtype; NULL with db: neither is needed */
    void *db;         /* backward: out, b_dtype */
    int64_t M, N, K, r;
    int64_t quant_type, blocksize, nested_blocksize;
    int64_t x_dtype, w_dtype, a_dtype, b_dtype, bias_dtype;
    int64_t threads;
    double scaling, dropout_p;
    const float *gain; /* [N]; NULL: lora_linear; else DoRA, see above */
    void *h;           /* forward: out, NULL: not needed; backward: in, not NULL with dgain; x_dtype */
    float *dgain;      /* backward: out; NULL: not needed */
    /* CUDA only; the CPU library ignores them (zeros) */
    const float *table;      /* quantised weights: the 16 values in code order, on the **host** */
    float *workspace;        /* device memory, 16-byte aligned: partial sums */
    int64_t workspace_bytes; /* at least what pk_cuda_lora_workspace() says */
    /* an adapter per row, see above */
    const int64_t *adapters; /* [M]; NULL: one adapter for all rows */
    const int64_t *starts;   /* [S]; NULL: each adapter in tensors of its own */
    const int64_t *ranks;    /* [S] */
    const float *scalings;   /* [S]; `scaling` is not read */
    int64_t S, P, max_rank;
} pk_lora_args;

PK_EXPORT int64_t pk_lora_args_size(void); /* sizeof(pk_lora_args), checked by native.py */
/* A stack of `count` projections of one x (1 for a single layer): args[count], which share x, dx, M, K, x_dtype,
 * threads. dx is the sum over them, rounded once. da of a projection may be NULL while another's is wanted. */
enum { PK_LORA_MOST = 16 }; /* projections in a stack */
PK_EXPORT int pk_cpu_lora_linear(const pk_lora_args *args, int64_t count);
PK_EXPORT int pk_cpu_lora_linear_backward(const pk_lora_args *args, int64_t count);
/* For tests: paths[count] = the pk_lora_path by which a forward with these arguments multiplies row `row` of x by each
 * projection's weight, at the level in use. PK_PATH_X is csrc/cpu/lora/forward_x.inc; a table in lora_linear.inc says
 * when. Of the memory that the arguments point to, adapters, starts and ranks are read (and a, b by pointer). */
typedef enum pk_lora_path { PK_PATH_GEMV, PK_PATH_ROW_PER_LANE, PK_PATH_IN_REGISTERS, PK_PATH_PANELS } pk_lora_path;
PK_EXPORT int pk_cpu_lora_linear_paths(const pk_lora_args *args, int64_t count, int64_t row, int64_t *paths);

/* lora_mixture: n adapters of rank r / n and a weight of each per row, mix [M, n]: in the place of `scaling`, which is
 * not read, ranks i r / n .. of s are multiplied by mix[m, i] for row m; dmix[m, i] = the sum over those ranks of
 * (dy b) s. A weight of zero leaves its adapter out, and costs nothing where all rows of a tile have it. masked: s of
 * such is zero, and dmix. args: one projection without gain and adapters, with one adapter of rank r that is all of
 * them: a [r, K], b [N, r]. Backward: dmix may be NULL. */
PK_EXPORT int pk_cpu_lora_mixture(const pk_lora_args *args, const float *mix, int64_t n, int64_t masked);
PK_EXPORT int pk_cpu_lora_mixture_backward(const pk_lora_args *args, const float *mix, int64_t n, int64_t masked,
                                           float *dmix);

/* grouped_linear: a weight and an adapter for each of E groups of the rows of x. Rows offsets[e] .. offsets[e + 1] are
 * group e's, 0 = offsets[0] <= ... <= offsets[E] <= M; offsets [E + 1]. args: one projection without gain, dropout and
 * adapters per row, with x, y, dy, dx [M, ...] of all groups, weight [E, N, K], a, da [E, r, K], b, db [E, N, r], bias
 * [E, N]. Rows from offsets[E] on become zero in y and dx, and so do da and db of groups without rows. 4-bit weights:
 * [E * N, K], N * K a multiple of blocksize, and of blocksize * nested_blocksize where scales are nested. s is
 * workspace, [M, r] float32. turned: the groups' matrices are stored with their columns first, weight [E, K, N], a, da
 * [E, K, r], b, db [E, r, N]; a backward that wants da and db then wants dx, too. */
PK_EXPORT int pk_cpu_grouped_linear(const pk_lora_args *args, const int64_t *offsets, int64_t E, int64_t turned);
PK_EXPORT int pk_cpu_grouped_linear_backward(const pk_lora_args *args, const int64_t *offsets, int64_t E,
                                             int64_t turned);

/* squares[n] = |row n of weight + scaling * b a|^2 (r = 0: of weight), summed in double; no rows of x are read. */
PK_EXPORT int pk_cpu_squared_row_norms(const pk_lora_args *args, double *squares);
/* DoRA's forward with the norm of this weight: norm[n] = |row n of weight + scaling * b a|, at least FLT_MIN; gain[n] =
 * magnitude[n] / norm[n]; then pk_cpu_lora_linear with that gain, which args->gain points to. */
PK_EXPORT int pk_cpu_dora_linear(const pk_lora_args *args, const float *magnitude, float *gain, float *norm);
/* Its backward: pk_cpu_lora_linear_backward, but dgain is the gradient of magnitude, dgain / norm. */
PK_EXPORT int pk_cpu_dora_linear_backward(const pk_lora_args *args, const float *norm);

/* ---- gated (CPU library) -------------------------------------------------------------------------------------------
 * h = act(min(g, limit)) * (min(max(u, -limit), limit) + shift), or act(min(g, limit)) where up is NULL, and the
 * gradients of g and u; limit 0: none. [rows, n] elements of dtype (float32, bfloat16, float16) each, computed in
 * float32. Element i of row r is at r * gate_row + i * step of gate, r * up_row + i * step of up, r * grad_row + i *
 * grad_step of dgate and dup; h and dh are contiguous. A step is 1, or 2 where the two alternate: then up is gate + 1,
 * or dup dgate + 1. dup is NULL without up.
 * act: silu(g) = g / (1 + exp(-alpha g)); gelu(g) = g Phi(g), or with tanh g (1 + tanh(sqrt(2 / pi) (g + 0.044715
 * g^3))) / 2; relu(g) = max(g, 0), and its square. alpha is of silu alone. */
typedef enum pk_act { PK_SILU = 0, PK_GELU = 1, PK_GELU_TANH = 2, PK_RELU = 3, PK_RELU2 = 4 } pk_act;
PK_EXPORT int pk_cpu_gated(const void *gate, const void *up, int64_t dtype, int64_t rows, int64_t n, int64_t gate_row,
                           int64_t up_row, int64_t step, int64_t act, double alpha, double limit, double shift, void *h,
                           int64_t threads);
PK_EXPORT int pk_cpu_gated_backward(const void *dh, const void *gate, const void *up, int64_t dtype, int64_t rows,
                                    int64_t n, int64_t gate_row, int64_t up_row, int64_t step, int64_t grad_row,
                                    int64_t grad_step, int64_t act, double alpha, double limit, double shift,
                                    void *dgate, void *dup, int64_t threads);

/* ---- adamw (CPU library) -------------------------------------------------------------------------------------------
 * A step of AdamW (arXiv 1711.05101) over float32 tensors: with g = scale * grad and t = ++step,
 *   p -= lr decay p;  m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2;
 *   p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
 * settings: lr, beta1, beta2, eps, decay, scale. The norm is of `grad` alone, summed over the tensors. */
typedef struct pk_adamw {
    float *p;
    const float *grad;
    float *m, *v;
    float *step; /* one number */
    int64_t numel;
} pk_adamw;
PK_EXPORT int pk_cpu_adamw(const pk_adamw *list, int64_t count, const double *settings, int64_t threads);
PK_EXPORT int pk_cpu_squared_norm(const pk_adamw *list, int64_t count, double *square, int64_t threads);

/* ---- softmax_slice (CPU library) -----------------------------------------------------------------------------------
 * Columns start .. start + width of the scores of a softmax that is made slice by slice. before and after, [3, rows]:
 * each row's largest score m, the sum of exp(score - m) and the target's score, of the slices so far; at first
 * -INFINITY, 0 and any. scores, p: [rows, width] of dtype (float32, bfloat16, float16), contiguous; a score is an
 * element times scale, p = exp(score - m), and 0 at the target. targets [rows]: a column of all of them. rescale
 * [rows]: exp(m before - m), for earlier sums of p. In float32; p is rounded once summed; it may be scores. */
PK_EXPORT int pk_cpu_softmax_slice(const void *scores, int64_t dtype, int64_t rows, int64_t width,
                                   const int64_t *targets, int64_t start, double scale, const float *before, void *p,
                                   float *after, float *rescale, int64_t threads);

/* ---- rms_norm and layer_norm (CPU library) -------------------------------------------------------------------------
 * y = f (x - m) c + bias with c = 1 / sqrt(mean((x - m)^2) + eps), f = offset + weight, 1 without weight; m is the mean
 * of a row where `centred` is not 0, else 0. dx = c (g - mean(g) - (x - m) c^2 mean(g (x - m))), g = dy f, without
 * mean(g) where nothing is centred. dweight, dbias: sums over rows of dy (x - m) c and of dy. Computed in float32.
 * y, dy, dx [rows, n] of dtype, contiguous; row r of x begins at r / inner * outer_row + r % inner * inner_row. weight
 * and bias [n] of w_dtype; NULL: none; dtypes are float32, bfloat16 or float16. dx, dweight, dbias: NULL where not
 * wanted; bias and dbias are NULL where nothing is centred. */
PK_EXPORT int pk_cpu_norm(const void *x, const void *weight, const void *bias, int64_t dtype, int64_t w_dtype,
                          int64_t rows, int64_t n, int64_t inner, int64_t inner_row, int64_t outer_row,
                          int64_t centred, double eps, double offset, void *y, int64_t threads);
PK_EXPORT int pk_cpu_norm_backward(const void *dy, const void *x, const void *weight, int64_t dtype, int64_t w_dtype,
                                   int64_t rows, int64_t n, int64_t inner, int64_t inner_row, int64_t outer_row,
                                   int64_t centred, double eps, double offset, void *dx, float *dweight, float *dbias,
                                   int64_t threads);

/* ---- attention (CPU library) ---------------------------------------------------------------------------------------
 * y = softmax(scores where seen) v for q, dq [B, T, H, D], k, dk [B, S, G, D], v, dv [B, S, G, Dv], y, dy [B, T, H, Dv]
 * of dtype, H a multiple of G, D and Dv even. Query i has the position S - T + i; of query p and key j
 *   scores = c tanh(scale q k / c) + bias + slopes[h] (j - p), with softcap c; 0: scale q k
 * seen: j <= p if causal; |p - j| < window unless that is 0; spans[b, i, 0] <= j < spans[b, i, 1]; keep != 0.
 * sinks: another term exp(sinks[h]) of the softmax's denominator. lse [B, H, T]: log of the denominator, inf where a
 * query sees nothing and has no sink (y is 0). cos, sin (S = T): the first R features of q and k are turned before, x
 * cos + x' sin, where x' has (-b, a) of each pair (a, b): features i and R / 2 + i, or interleaved 2 i and 2 i + 1.
 * q, k, v, dy: strides in elements (_b of a row of the batch, _t of a token, _h of a head), features dense; keep [B or
 * 1, T, S] of 0 and 1 and bias [B or 1, H or 1, T or 1, S] as well, keys dense; strides may be 0. cos, sin [B or 1, T,
 * R] of table_dtype and spans [B or 1, T, 2] are contiguous, cos_b and spans_b 0 where there is one for all. The rest
 * is contiguous. float32, bfloat16, float16; sums are float32. Turned q and k, probabilities and gradients of scores
 * are rounded to bfloat16 where dtype is, but where T is 1. The backward reads y and lse. dropout_p: of probabilities
 * (lse is without it), element ((b H + h) T + i) S + j by the seed as below pk_lora_args.
 * Every field is 8 bytes wide so that Python can pack the struct in one call. */
typedef struct pk_attention_args {
    const void *q, *k, *v, *dy;
    const void *cos, *sin;  /* NULL: nothing is turned */
    const int32_t *spans;   /* this and the four below: NULL for none */
    const uint8_t *keep;
    const void *bias;
    const float *slopes;    /* [H] */
    const float *sinks;     /* [H] */
    const int64_t *seed;    /* not NULL where dropout_p > 0 */
    void *y;                /* forward: out; backward: in */
    float *lse;             /* like y */
    void *dq, *dk, *dv;     /* backward: out */
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dy_b, dy_t, dy_h;
    int64_t keep_b, keep_t, bias_b, bias_h, bias_t, cos_b, spans_b;
    int64_t dtype, table_dtype, bias_dtype;
    int64_t B, T, S, H, G, D, Dv, R;
    int64_t interleaved, causal, window, threads;
    double scale, softcap, dropout_p;
} pk_attention_args;
PK_EXPORT int64_t pk_attention_args_size(void); /* sizeof(pk_attention_args), checked by native.py */
PK_EXPORT int pk_cpu_attention(const pk_attention_args *args);
PK_EXPORT int pk_cpu_attention_backward(const pk_attention_args *args);
/* q and k (T = S) turned by cos and sin alone, rounded once: dq [B, T, H, D] and dk [B, T, G, D], contiguous. */
PK_EXPORT int pk_cpu_rotary(const pk_attention_args *args);

/* ---- rotations (CPU library) ----------------------------------------------------------------------------------------
 * x, y, dy, dx: [M, d] of dtype (float32, bfloat16, float16); all else float32; computed in float32 and rounded once.
 * butterfly_rotate: blocks, dblocks [m, d / b, b, b], or [m, 1, b, b] if shared. Factor i multiplies half blocks p and
 * p + 2^i of every 2^(i + 1) by a block from the right; from the last factor to the first, or (transposed) from the
 * first, each block transposed. m > 1: b is even, d / b a multiple of 2^(m - 1). dx may be NULL. */
PK_EXPORT int pk_cpu_butterfly_rotate(const void *x, const float *blocks, int64_t dtype, int64_t M, int64_t d,
                                      int64_t b, int64_t m, int64_t shared, int64_t transposed, void *y,
                                      int64_t threads);
PK_EXPORT int pk_cpu_butterfly_rotate_backward(const void *dy, const void *x, const float *blocks, int64_t dtype,
                                               int64_t M, int64_t d, int64_t b, int64_t m, int64_t shared,
                                               int64_t transposed, void *dx, float *dblocks, int64_t threads);
/* butterfly_linear: lora_linear (forward, backward) of x turned by butterfly_rotate, not transposed. args: one
 * projection without adapter and dropout; x and dx as before the rotation; a gain may come without an adapter here.
 * Backward: x is not read where dblocks is NULL; neither dx nor dblocks: dgain alone. No turned copy of x is longer
 * than 1,024 rows. */
PK_EXPORT int pk_cpu_butterfly_linear(const pk_lora_args *args, const float *blocks, int64_t b, int64_t m,
                                      int64_t shared);
PK_EXPORT int pk_cpu_butterfly_linear_backward(const pk_lora_args *args, const float *blocks, int64_t b, int64_t m,
                                               int64_t shared, float *dblocks);
/* cayley: q, r [blocks, b, b]. n = 0: r = (I + q) (I - q)^-1; else the sum of weights[k] q^k, k < n. */
PK_EXPORT int pk_cpu_cayley(const float *q, int64_t blocks, int64_t b, const float *weights, int64_t n, float *r,
                            int64_t threads);
PK_EXPORT int pk_cpu_cayley_backward(const float *q, const float *r, const float *dr, int64_t blocks, int64_t b,
                                     const float *weights, int64_t n, float *dq, int64_t threads);
/* householder_rotate: u, v, du, dv [r, d]; s [M, r]: s = x u^T, y = x - s v. du is NULL with dv, dx may be. */
PK_EXPORT int pk_cpu_householder_rotate(const void *x, const float *u, const float *v, int64_t dtype, int64_t M,
                                        int64_t d, int64_t r, void *y, float *s, int64_t threads);
PK_EXPORT int pk_cpu_householder_rotate_backward(const void *dy, const void *x, const float *u, const float *v,
                                                 const float *s, int64_t dtype, int64_t M, int64_t d, int64_t r,
                                                 void *dx, float *du, float *dv, int64_t threads);
/* pair_rotate: first, second, dfirst, dsecond [d]. Within 2 * half features, a = x[i] and b = x[i + half] become
 * a first - b second (at i) and b first + a second (at i + half). dfirst is NULL with dsecond, dx may be. */
PK_EXPORT int pk_cpu_pair_rotate(const void *x, const float *first, const float *second, int64_t dtype, int64_t M,
                                 int64_t d, int64_t half, void *y, int64_t threads);
PK_EXPORT int pk_cpu_pair_rotate_backward(const void *dy, const void *x, const float *first, const float *second,
                                          int64_t dtype, int64_t M, int64_t d, int64_t half, void *dx, float *dfirst,
                                          float *dsecond, int64_t threads);

/* ---- quantize_4bit, dequantize_4bit (CPU library) -----------------------------------------------------------------
 * The layout of quantised weights is the one above, of any number of elements (the last block may be partial).
 * w: numel elements, float32, bfloat16 or float16. packed: ceil(numel / 2) bytes. absmax: one float32 per block.
 * midpoints: the 15 midpoints between the table's values, ascending; order: the 16 codes by ascending value. */
PK_EXPORT int pk_cpu_quantize_4bit(const void *w, int64_t w_dtype, int64_t numel, int64_t blocksize,
                                   const float *midpoints, const uint8_t *order, uint8_t *packed, float *absmax,
                                   int64_t threads);
/* The scales in 8 bits: per nested_blocksize of absmax - *offset the largest magnitude and a code for each.
 * rounding: 65536 codes, entry i for the scaled value -1 + 2 i / 65535. */
PK_EXPORT int pk_cpu_quantize_absmax(const float *absmax, int64_t nblocks, const float *offset,
                                     int64_t nested_blocksize, const uint8_t *rounding, uint8_t *codes,
                                     float *nested_absmax, int64_t threads);
/* out: numel elements of out_dtype (float32, bfloat16, float16). Nested when nested_code != NULL. */
PK_EXPORT int pk_cpu_dequantize_4bit(const uint8_t *packed, const void *absmax, const float *nested_absmax,
                                     const float *nested_code, const float *offset, int64_t quant_type,
                                     int64_t blocksize, int64_t nested_blocksize, int64_t numel, int64_t out_dtype,
                                     void *out, int64_t threads);
/* The same of the other formats, whose parts are those of a pk_lora_args: out [N, K]. */
PK_EXPORT int pk_cpu_dequantize_rows(const void *weight, const void *absmax, const void *nested_absmax,
                                     const void *nested_code, const void *offset, int64_t quant_type,
                                     int64_t blocksize, int64_t nested_blocksize, int64_t w_dtype, int64_t N, int64_t K,
                                     int64_t out_dtype, void *out, int64_t threads);

/* ---- CUDA library --------------------------------------------------------------------------------------------------
 * The same functions on device memory of GPU `device`, put on `stream` (a cudaStream_t; NULL is the default stream).
 * They return once the work is queued; PK_ERR_DEVICE where there is no usable GPU. Nothing synchronises or allocates.
 * midpoints, order and table (the 16 values in code order) are **host** pointers, read before the call returns. */
PK_EXPORT int pk_cuda_device_count(int64_t *count); /* PK_ERR_DEVICE with the reason where CUDA does not work */
/* The CUDA that the library was built with, and the newest that the driver runs (0: none), as 1000 major + 10 minor */
PK_EXPORT int pk_cuda_versions(int64_t *built, int64_t *driver);
PK_EXPORT int pk_cuda_loads(int64_t device); /* PK_ERR_DEVICE with the reason where `device` runs none of its kernels */
PK_EXPORT int pk_cuda_quantize_4bit(const void *w, int64_t w_dtype, int64_t numel, int64_t blocksize,
                                    const float *midpoints, const uint8_t *order, uint8_t *packed, float *absmax,
                                    int64_t device, void *stream);
PK_EXPORT int pk_cuda_quantize_absmax(const float *absmax, int64_t nblocks, const float *offset,
                                      int64_t nested_blocksize, const uint8_t *rounding, uint8_t *codes,
                                      float *nested_absmax, int64_t device, void *stream);
PK_EXPORT int pk_cuda_dequantize_4bit(const uint8_t *packed, const void *absmax, const float *nested_absmax,
                                      const float *nested_code, const float *offset, const float *table,
                                      int64_t blocksize, int64_t nested_blocksize, int64_t numel, int64_t out_dtype,
                                      void *out, int64_t device, void *stream);
/* The same of int4, any parts: out [N, K]. Of args the weight alone is read. */
PK_EXPORT int pk_cuda_dequantize_rows(const pk_lora_args *args, int64_t out_dtype, void *out, int64_t device,
                                      void *stream);
/* lora_linear of one projection: quantised weights, x of bfloat16 or float16, blocksizes that are powers of two (int4:
 * and divide K; no nested_code). M at most 512, in the backward 64; a gain without dropout only. bytes: of the
 * workspace that the call with these arguments needs, 0 for none. */
PK_EXPORT int pk_cuda_lora_workspace(const pk_lora_args *args, int64_t backward, int64_t *bytes);
PK_EXPORT int pk_cuda_lora_linear(const pk_lora_args *args, int64_t device, void *stream);
/* The forward of up to PK_CUDA_STACK projections of one x: args[count], which share x, x_dtype, M, K; the workspace is
 * that of the first. Two launches, for every product and for every s, where the weights are quantised alike. */
enum { PK_CUDA_STACK = 4 };
PK_EXPORT int pk_cuda_lora_stacked_workspace(const pk_lora_args *args, int64_t count, int64_t *bytes);
PK_EXPORT int pk_cuda_lora_linear_stacked(const pk_lora_args *args, int64_t count, int64_t device, void *stream);
PK_EXPORT int pk_cuda_lora_linear_backward(const pk_lora_args *args, int64_t device, void *stream);
/* As pk_cpu_squared_row_norms, of quantised weights; of K in parts: squares [parts][N], to be added in order. */
PK_EXPORT int pk_cuda_squared_row_norms(const pk_lora_args *args, double *squares, int64_t parts, int64_t device,
                                        void *stream);
/* ---- rotations (CUDA library): x, y, dy, dx and what they are as in the CPU library, d below 2^24 -------------------
 * Gradients that are sums over the rows of x come in parts of the rows, to be added in order. */
/* sums [parts][2][d]: dfirst, dsecond; NULL with x, dx may be. */
PK_EXPORT int pk_cuda_pair_rotate(const void *x, const float *first, const float *second, int64_t dtype, int64_t M,
                                  int64_t d, int64_t half, void *y, int64_t device, void *stream);
PK_EXPORT int pk_cuda_pair_rotate_backward(const void *dy, const void *x, const float *first, const float *second,
                                           int64_t dtype, int64_t M, int64_t d, int64_t half, void *dx, float *sums,
                                           int64_t parts, int64_t device, void *stream);
/* Factors as in the CPU library that reach b * 2^(m - 1) <= 256 features, one after another in float32. x NULL: the
 * rows of an identity for each such group, float32 [b * 2^(m - 1), d]. every: y [m][M][d], what each factor gives. */
PK_EXPORT int pk_cuda_butterfly_rotate(const void *x, const float *blocks, int64_t dtype, int64_t M, int64_t d,
                                       int64_t b, int64_t m, int64_t shared, int64_t transposed, int64_t every, void *y,
                                       int64_t device, void *stream);
/* The gradient of the factors' blocks, dblocks [m][d / b][b][b], from that of what they make of identities: last
 * [b * 2^(m - 1)][d]; inputs and gradients: `every` factor of the identities, and of `last` turned back. */
PK_EXPORT int pk_cuda_butterfly_gradient(const float *inputs, const float *gradients, const float *last, int64_t d,
                                         int64_t b, int64_t m, int64_t transposed, float *dblocks, int64_t device,
                                         void *stream);
/* y = x by block-diagonal matrices on tensor cores: 16-bit x, y, 8-byte aligned, P a multiple of 16 up to 256.
 * Element (k, c) of matrix n is matrices[n * group + k * row + c * column]; about 16 bits of it count. */
PK_EXPORT int pk_cuda_block_product(const void *x, const float *matrices, int64_t dtype, int64_t M, int64_t d,
                                    int64_t P, int64_t group, int64_t row, int64_t column, void *y, int64_t device,
                                    void *stream);
/* x^T dy within each group of P <= 256 features, in parts of the rows: out [parts][d * P], element (k, c) of group n at
 * n * group + k * row + c. */
PK_EXPORT int pk_cuda_block_gradient(const void *x, const void *dy, int64_t dtype, int64_t M, int64_t d, int64_t P,
                                     int64_t group, int64_t row, float *out, int64_t parts, int64_t device,
                                     void *stream);
/* Up to 64 reflections. y NULL: only s. The other way round, x = dy with u and v exchanged gives dx and t = dy v^T. */
PK_EXPORT int pk_cuda_householder_rotate(const void *x, const float *u, const float *v, int64_t dtype, int64_t M,
                                         int64_t d, int64_t r, void *y, float *s, int64_t device, void *stream);
/* out [parts][r][d]: -t^T x, which is du, and dv where t is s and x is dy. t: float32 [M, r]. */
PK_EXPORT int pk_cuda_householder_gradient(const float *t, const void *x, int64_t dtype, int64_t M, int64_t d,
                                           int64_t r, float *out, int64_t parts, int64_t device, void *stream);
/* cayley: b <= 64, n <= 104; weights [n] on the **host**. */
PK_EXPORT int pk_cuda_cayley(const float *q, int64_t blocks, int64_t b, const float *weights, int64_t n, float *r,
                             int64_t device, void *stream);
PK_EXPORT int pk_cuda_cayley_backward(const float *q, const float *r, const float *dr, int64_t blocks, int64_t b,
                                      const float *weights, int64_t n, float *dq, int64_t device, void *stream);
#ifdef __cplusplus
}
#endif
#endif
