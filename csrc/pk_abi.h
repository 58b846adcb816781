/* The whole C ABI of the native libraries. No torch headers, no C++ in the signatures.
 *
 * Conventions
 *   - Every function that can fail returns a pk_status; the text is in pk_last_error() of the same thread until the next
 *     failing call there. Nothing exits, prints or throws.
 *   - Pointers are to contiguous row-major memory that the caller owns; a pointer to something absent is NULL.
 *   - Sizes are int64_t counts of elements unless the name says bytes. dtype arguments are pk_dtype codes.
 *   - `threads` is the number of threads that the call may use, from torch.get_num_threads(). Results never depend on it.
 *   - Any change to a signature, a struct or a meaning below raises PK_ABI_VERSION; peft_kernels/native.py has its twin.
 *
 * Adding a function to the CPU library (five places, each one line or one file):
 *   1. here: its declaration, with shapes and units;
 *   2. csrc/cpu/kernels.def: one PK_KERNEL line for what differs by instruction set;
 *   3. csrc/cpu/<op>.inc: the text of that kernel, compiled once per level (see csrc/cpu/unit.cpp for the rules);
 *   4. csrc/cpu/<op>.cpp: the exported function: checks its arguments, then calls pk_table()->name(...);
 *   5. CMakeLists.txt: <op> in PK_CPU_OPS; peft_kernels/native.py: its argtypes in _CPU_SIGNATURES.
 */
#ifndef PK_ABI_H
#define PK_ABI_H
#include <stdint.h>

#define PK_ABI_VERSION 1

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

typedef enum pk_quant_type { PK_DENSE = 0, PK_NF4 = 1, PK_FP4 = 2 } pk_quant_type;

PK_EXPORT int pk_abi_version(void);
PK_EXPORT const char *pk_last_error(void); /* never NULL; "" before the first failure of this thread */

/* ---- instruction set levels (CPU library) ------------------------------------------------------------------------ */
PK_EXPORT const char *pk_cpu_level(void);            /* the level in use: scalar, avx2, avx512 or avx512bf16 */
PK_EXPORT const char *pk_cpu_levels(void);           /* all levels that this CPU and build have, comma separated, rising */
PK_EXPORT int pk_cpu_set_level(const char *name);    /* NULL or "": the best one. For tests: not while kernels run */
PK_EXPORT const char *pk_cpu_openmp(void);           /* path of the OpenMP runtime in use; "" when there is none (serial) */

/* ---- lora_linear (CPU library) -----------------------------------------------------------------------------------
 * Shapes: x, dx [M, K]; y, dy [M, N]; weight [N, K]; a, da [r, K]; b, db [N, r]; bias [N]; s [M, r] float32.
 *   forward:  s = drop(x) a^T;  y = x weight^T + bias + scaling * s b^T
 *   backward: ds = scaling * dy b;  dx = dy weight + drop'(ds a);  da = ds^T drop(x);  db = scaling * dy^T s
 * Quantised weights: N*K codes, two a byte, high nibble = even element of the flat row-major order, absmax per
 * `blocksize` elements of that order. absmax is float32, or uint8 codes when nested_code != NULL: then
 * absmax[i] = nested_code[codes[i]] * nested_absmax[i / nested_blocksize] + *offset.
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
    void *da;         /* backward: out, a_dtype; NULL: not needed (with db) */
    void *db;         /* backward: out, b_dtype */
    int64_t M, N, K, r;
    int64_t quant_type, blocksize, nested_blocksize;
    int64_t x_dtype, w_dtype, a_dtype, b_dtype, bias_dtype;
    int64_t threads;
    double scaling, dropout_p;
} pk_lora_args;

PK_EXPORT int64_t pk_lora_args_size(void); /* sizeof(pk_lora_args), checked by native.py */
PK_EXPORT int pk_cpu_lora_linear(const pk_lora_args *args);
PK_EXPORT int pk_cpu_lora_linear_backward(const pk_lora_args *args);

#ifdef __cplusplus
}
#endif
#endif
