/* Shared by the level-independent files and the kernel texts of each level. */
#ifndef PK_KERNELS_H
#define PK_KERNELS_H
#include <stddef.h>
#include <stdint.h>

#include "../pk_abi.h"

/* True where a, b, da and db are arrays of pointers. Without adapters `starts` may be NULL because it is empty. */
static inline bool pk_adapters_by_pointer(const pk_lora_args *args) {
    return args->adapters && !args->starts && args->S > 0;
}

/* True where a backward gives gradients of a and b. One of them may be NULL because it is empty. */
static inline bool pk_wants_factors(const pk_lora_args *args) { return args->da || args->db; }

/* butterfly_rotate: rows [M][d] of dtype; blocks [m][d / b, or 1 if shared][b][b]. Forward: x -> y. Backward: x and
 * dy -> y, which is dx, or NULL. */
struct PkButterfly {
    const void *x, *dy;
    const float *blocks;
    void *y;
    int64_t dtype, M, d, b, m, shared, transposed;
};

/* True of formats whose rows are groups of columns: all but dense weights, NF4 and FP4. */
static inline bool pk_in_groups(int64_t quant_type) { return quant_type > PK_FP4; }

/* Columns of a block of GGUF; 1 of integers. */
static inline int64_t pk_block_columns(int64_t quant_type) {
    if (quant_type < PK_Q4_0) return 1;
    return quant_type >= PK_Q4_K && quant_type <= PK_Q6_K ? 256 : 32;
}

/* Bytes of a block of GGUF. */
static constexpr int64_t pk_block_bytes(int64_t quant_type) {
    constexpr int64_t block[] = {18, 20, 22, 24, 34, 144, 176, 210, 18, 17}; /* from PK_Q4_0 */
    return block[quant_type - PK_Q4_0];
}

/* Bytes of a row of K columns of a format in groups; of half a byte too few in PK_INT4 where K is odd. */
static inline int64_t pk_row_bytes(int64_t quant_type, int64_t K) {
    if (quant_type == PK_INT4) return K / 2;
    return quant_type < PK_Q4_0 ? K : K / pk_block_columns(quant_type) * pk_block_bytes(quant_type);
}

/* A weight in a format in groups: row n of the codes is at n * row_bytes. */
struct PkCodes {
    int64_t type, row_bytes, group, groups; /* columns of a group of integers, and how many a row has */
    const void *scales, *zeros, *shifts;
    const int32_t *index;
    int64_t scale_dtype, zero_dtype;
    bool fast; /* integers: groups of a multiple of 16 columns, in their order, and rows of whole bytes */
};
PkCodes pk_codes_of(const pk_lora_args *args);

/* 1-4 rows of x times a weight in groups, see formats/few_rows.inc, and lora/few_passes.inc for up to 16, four at a
 * time. x: [M][ldx] float, zeros beyond K. X: x as few_pack() lays it out for the weight's format, with room for
 * pk_few_room() floats; words: pairs of bfloat16. */
struct PkFew {
    const PkCodes *w;
    const uint8_t *codes;
    int64_t K, M, ldx;
    const float *x;
    float *X;
    bool words;
};
enum PkFewLayout { PK_FEW_BYTES, PK_FEW_IN_ORDER, PK_FEW_BLOCKS, PK_FEW_SUPERBLOCKS, PK_FEW_FOURS, PK_FEW_LAYOUTS };

/* The order in which a format's codes meet x; PK_FEW_BYTES of formats that become bytes and have no X. */
static inline PkFewLayout pk_few_layout(int64_t quant_type) {
    if (quant_type == PK_INT4) return PK_FEW_IN_ORDER;
    if (quant_type == PK_Q4_K) return PK_FEW_SUPERBLOCKS;
    if (quant_type == PK_Q6_K) return PK_FEW_FOURS;
    bool blocks = quant_type == PK_Q4_0 || quant_type == PK_Q4_1 || quant_type == PK_IQ4_NL || quant_type == PK_MXFP4;
    return blocks ? PK_FEW_BLOCKS : PK_FEW_BYTES;
}
static inline bool pk_few_serves(const PkCodes &w, int64_t K) {
    return K > 0 && (w.type > PK_UINT8 || (w.fast && K % 32 == 0));
}
static inline int64_t pk_few_room(int64_t M, int64_t ldx) { return M * ldx / 4 * 5; }

/* Refuses arguments that a lora_linear, or its backward, does not take, with pk_fail(); else PK_OK. */
int pk_lora_check(const pk_lora_args *args, bool backward);

/* The same of the parts of a weight in groups. */
int pk_groups_check(const pk_lora_args *args);

/* Functions of butterfly_rotate.cpp for kernels that turn rows on their way into another product; each returns a
 * pk_status. pk_butterfly_backward adds to the sums of the blocks' gradients, [ranges][m][d / b][b][b], which
 * pk_butterfly_sums() adds up in their order: range i has the rows i * rows .. of each call. */
int pk_butterfly_check(const PkButterfly &t);
int pk_butterfly(const PkButterfly &t, int64_t rows, int64_t threads);
int pk_butterfly_backward(const PkButterfly &t, int64_t rows, float *sums, int64_t threads);
void pk_butterfly_sums(const PkButterfly &t, const float *sums, int64_t ranges, float *dblocks, int64_t threads);

/* lora_mixture: weights of n adapters, [M][n], which have args->r / n ranks each; dmix like them, NULL: not needed. A
 * weight of zero leaves its adapter out; masked: s of such is zero, and dmix, and neither is computed. */
struct PkMixture {
    const float *weight;
    int64_t n;
    bool masked;
    float *dmix;
};

/* gated: element i of row r is at r * gate_row + i * step of gate, up_row of up, grad_row and grad_step of dgate and
 * dup. Of a step of 2, up is gate + 1, dup dgate + 1. h, dh: [rows, n]. limit: INFINITY for none. dh NULL: forward. */
struct PkGated {
    const void *dh, *gate, *up;
    int64_t dtype, rows, n, gate_row, up_row, grad_row, step, grad_step, act;
    float alpha, limit, shift;
    void *dgate, *dup, *h;
};

enum PkAttention { PK_ATTENTION, PK_ATTENTION_BACKWARD, PK_ROTARY }; // what a pk_attention_args asks for

/* rms_norm and layer_norm (centred): row r of x begins at r / inner * outer_row + r % inner * inner_row; dy and out,
 * which is y or dx or NULL, are [rows, n]; weight and bias of w_dtype, or NULL. dy NULL: forward. */
struct PkNorm {
    const void *dy, *x, *weight, *bias;
    int64_t dtype, w_dtype, rows, n, inner, inner_row, outer_row;
    float eps, offset;
    bool centred;
    void *out;
};

/* softmax_slice: see pk_abi.h. */
struct PkSoftmaxSlice {
    const void *scores;
    int64_t dtype, rows, width;
    const int64_t *targets;
    int64_t start;
    float scale;
    const float *before;
    void *p;
    float *after, *rescale;
};

/* Constants of an AdamW step, besides the tensors: made by adamw.cpp. */
struct PkAdamw {
    double step;
    float scale, new_m, old_v, new_v, root, eps, decay, rate; /* root: 1 / sqrt(1 - beta2^step) */
};

/* A function table per level; pk_table() is the one in use. */
struct PkTable {
#define PK_KERNEL(ret, name, args) ret(*name) args;
#include "kernels.def"
#undef PK_KERNEL
};
const PkTable *pk_table();

/* Each level's kernels live in its own namespace; the linker can then never mix the code of two levels. */
#define PK_DECLARE_LEVEL(ns)                                                                                           \
    namespace ns {                                                                                                     \
    extern const PkTable table;                                                                                        \
    }
PK_DECLARE_LEVEL(pk_scalar)
PK_DECLARE_LEVEL(pk_avx2)
PK_DECLARE_LEVEL(pk_avx512)
PK_DECLARE_LEVEL(pk_avx512bf16)

/* Sets pk_last_error() (printf style) and returns `code`. */
int pk_fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Runs fn(ctx, task) for task = 0 .. tasks-1 on up to `threads` threads. Tasks are handed out one by one, so which
 * thread runs a task is not fixed: a task must write only what no other task writes or reads. Never throws. */
void pk_parallel(int64_t tasks, int64_t threads, void (*fn)(void *ctx, int64_t task), void *ctx);

/* Per-thread workspace, 64-byte aligned, contents undefined, valid until the same thread asks for the same slot again.
 * Slots below PK_SHARED_SLOTS are for the calling thread outside of tasks, those below PK_OUTER_SLOT for use within one
 * task, the rest for functions that call others which have slots of their own.
 * NULL when memory is short. Freed when the thread ends; blocks above 16 MiB already by pk_scratch_trim(). */
enum { PK_SCRATCH_SLOTS = 19, PK_SHARED_SLOTS = 8, PK_OUTER_SLOT = 16 };
void *pk_scratch(int slot, size_t bytes);
void pk_scratch_trim(int first = 0, int end = PK_OUTER_SLOT);

/* The 16 values of NF4 and FP4 in code order (the C twin of peft_kernels/formats/tables.py; a test compares them). */
extern const float pk_nf4_table[16];
extern const float pk_fp4_table[16];
#endif
