/* lora_linear on the GPU: what is exported. Checks the arguments once, projects x onto A, and chooses by M. */
#include "dropout.cuh"
#include "lora.cuh"
#include "values.cuh"

namespace {
constexpr int THREADS = 256, WARPS = THREADS / 32;
const char *const what = "lora_linear";

struct Projection {
    const void *z, *w;
    const float *gain; /* NULL, or of the rows of w, by_columns */
    float *out;
    int64_t M, C;
    int r, w_dtype;
    bool by_columns, z_fast, w_fast; /* fast: rows of whole, aligned vectors */
    float scale;
    PkDropout drop;
};

/* A block has MT rows of z and RT ranks; its threads share the columns, eight at a time, and add up in a fixed order. */
template <typename T, int MT, int RT>
__global__ void __launch_bounds__(THREADS) project_kernel(const __grid_constant__ Projection p) {
    __shared__ float warps[WARPS][MT * RT];
    const int j0 = blockIdx.x * RT;
    const int64_t m0 = static_cast<int64_t>(blockIdx.y) * MT;
    const uint64_t seed = pk_seed(p.drop);
    float sums[MT * RT] = {};
    for (int64_t c = 8 * threadIdx.x; c < p.C; c += 8 * THREADS) {
        float w[RT][8];
#pragma unroll
        for (int j = 0; j < RT; ++j) {
            if (j0 + j >= p.r) {
#pragma unroll
                for (int i = 0; i < 8; ++i) w[j][i] = 0.0f;
            } else if (p.by_columns) {
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    w[j][i] = c + i < p.C ? pk_load_as(p.w, p.w_dtype, (c + i) * p.r + j0 + j) *
                                                (p.gain ? __ldg(p.gain + c + i) : 1.0f)
                                          : 0.0f;
            } else {
                pk_load8_as(p.w, p.w_dtype, (j0 + j) * p.C + c, p.C - c, p.w_fast, w[j]);
            }
        }
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            if (m0 + m >= p.M) continue;
            const int64_t e = (m0 + m) * p.C + c;
            float z[8];
            if (p.z_fast) {
                pk_load8(static_cast<const T *>(p.z) + e, z);
            } else {
#pragma unroll
                for (int i = 0; i < 8; ++i) z[i] = c + i < p.C ? pk_float(static_cast<const T *>(p.z)[e + i]) : 0.0f;
            }
            if (p.drop.seed) {
                const uint32_t keep = pk_keep<8>(p.drop, seed, e);
#pragma unroll
                for (int i = 0; i < 8; ++i) z[i] = keep >> i & 1 ? z[i] : 0.0f;
            }
#pragma unroll
            for (int j = 0; j < RT; ++j)
#pragma unroll
                for (int i = 0; i < 8; ++i) sums[m * RT + j] += z[i] * w[j][i];
        }
    }
#pragma unroll
    for (int i = 0; i < MT * RT; ++i) {
#pragma unroll
        for (int d = 16; d > 0; d /= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], d);
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32][i] = sums[i];
    }
    __syncthreads();
    const int64_t m = m0 + threadIdx.x / RT;
    const int j = j0 + threadIdx.x % RT;
    if (threadIdx.x >= MT * RT || m >= p.M || j >= p.r) return;
    float sum = 0.0f;
    for (int i = 0; i < WARPS; ++i) sum += warps[i][threadIdx.x];
    p.out[m * p.r + j] = p.scale * (p.drop.keep * sum);
}

template <typename T> void launch(const Projection &p, cudaStream_t stream) {
    if (p.M == 1) { /* few rows: more blocks instead of more work for each */
        auto kernel = project_kernel<T, 1, 1>;
        PK_LAUNCH(kernel, dim3(p.r, 1), THREADS, stream, p);
    } else {
        auto kernel = project_kernel<T, 4, 4>;
        PK_LAUNCH(kernel, dim3((p.r + 3) / 4, static_cast<unsigned>((p.M + 3) / 4)), THREADS, stream, p);
    }
}

bool is_float(int64_t dtype) { return dtype == PK_F32 || dtype == PK_BF16 || dtype == PK_F16; }
} // namespace

int pk_lora_check(const pk_lora_args *a, const char *what) {
    const auto fail = [what](const char *text, int64_t got) {
        return pk_fail(PK_ERR_ARGUMENT, "%s: %s, got %lld", what, text, static_cast<long long>(got));
    };
    if (!a) return pk_fail(PK_ERR_ARGUMENT, "%s: no arguments", what);
    if (a->M < 0 || a->N < 0 || a->K < 0 || a->r < 0)
        return pk_fail(PK_ERR_ARGUMENT, "%s: negative size (M %lld, N %lld, K %lld, r %lld)", what,
                       static_cast<long long>(a->M), static_cast<long long>(a->N), static_cast<long long>(a->K),
                       static_cast<long long>(a->r));
    if (a->N > INT32_MAX || a->K > INT32_MAX) return fail("N and K must be below 2^31", a->N > a->K ? a->N : a->K);
    if (a->x_dtype != PK_BF16 && a->x_dtype != PK_F16) return fail("x_dtype must be bfloat16 or float16", a->x_dtype);
    if (a->quant_type != PK_NF4 && a->quant_type != PK_FP4) return fail("the weight must be NF4 or FP4", a->quant_type);
    if (a->blocksize < 32 || a->blocksize > 4096 || !pk_power_of_two(a->blocksize))
        return fail("blocksize must be a power of two from 32 to 4096", a->blocksize);
    if (a->nested_code && !pk_power_of_two(a->nested_blocksize))
        return fail("nested_blocksize must be a power of two", a->nested_blocksize);
    if (a->nested_code && (!a->nested_absmax || !a->offset))
        return pk_fail(PK_ERR_ARGUMENT, "%s: nested scales need nested_absmax and offset", what);
    if (a->N > 0 && a->K > 0 && (!a->weight || !a->absmax || !a->table))
        return pk_fail(PK_ERR_ARGUMENT, "%s: weight, absmax or table is NULL", what);
    if (a->r > 0 && (!is_float(a->a_dtype) || !is_float(a->b_dtype)))
        return fail("a and b must be float32, bfloat16 or float16", is_float(a->a_dtype) ? a->b_dtype : a->a_dtype);
    if (a->r > 65535 * 4) return fail("r must be below 2^18", a->r);
    if (a->r > 0 && a->M > 0 && ((!a->a && a->K > 0) || (!a->b && a->N > 0)))
        return pk_fail(PK_ERR_ARGUMENT, "%s: a or b is NULL", what);
    if (a->r > 0 && a->dropout_p != 0.0 && (!a->seed || !(a->dropout_p > 0.0 && a->dropout_p < 1.0)))
        return pk_fail(PK_ERR_ARGUMENT, "%s: dropout needs a seed and p in [0, 1), got p %g", what, a->dropout_p);
    if (a->bias && !is_float(a->bias_dtype)) return fail("bias must be float32, bfloat16 or float16", a->bias_dtype);
    if (a->gain && a->r > 0 && a->dropout_p != 0.0)
        return pk_fail(PK_ERR_ARGUMENT, "%s: serves a gain without dropout only, got p %g", what, a->dropout_p);
    return PK_OK;
}

namespace {
int check_workspace(const pk_lora_args &a, int64_t needed) {
    if (needed > 0 && (!a.workspace || a.workspace_bytes < needed || !pk_aligned(a.workspace, 16)))
        return pk_fail(PK_ERR_ARGUMENT, "%s: needs %lld bytes of workspace, 16-byte aligned; got %lld at %p", what,
                       static_cast<long long>(needed), static_cast<long long>(a.workspace_bytes),
                       static_cast<const void *>(a.workspace));
    return PK_OK;
}

int check_forward(const pk_lora_args *args) {
    if (int code = pk_lora_check(args, what)) return code;
    const pk_lora_args &a = *args;
    if (a.M > PK_MMA_ROWS)
        return pk_fail(PK_ERR_ARGUMENT, "%s: M must be at most %lld, got %lld", what,
                       static_cast<long long>(PK_MMA_ROWS), static_cast<long long>(a.M));
    const char *why = a.M > PK_GEMV_ROWS ? pk_lora_mma_refuses(a) : nullptr;
    return why ? pk_fail(PK_ERR_ARGUMENT, "%s: %s", what, why) : int(PK_OK);
}

int64_t forward_workspace(const pk_lora_args &a) {
    return a.M > PK_GEMV_ROWS ? pk_lora_mma_workspace(a) : pk_lora_gemv_workspace(a);
}

int check_backward(const pk_lora_args *args) {
    if (int code = pk_lora_check(args, what)) return code;
    if (args->M > PK_BACKWARD_ROWS)
        return pk_fail(PK_ERR_ARGUMENT, "%s: M must be at most %lld in the backward, got %lld", what,
                       static_cast<long long>(PK_BACKWARD_ROWS), static_cast<long long>(args->M));
    return PK_OK;
}
} // namespace

int pk_lora_project(const pk_lora_args &args, const void *z, int64_t C, const void *w, int64_t w_dtype, bool by_columns,
                    bool dropout, float scale, float *out, cudaStream_t stream) {
    Projection p = {};
    p.z = z, p.w = w, p.gain = by_columns ? args.gain : nullptr, p.out = out, p.M = args.M, p.C = C;
    p.r = static_cast<int>(args.r), p.w_dtype = static_cast<int>(w_dtype), p.by_columns = by_columns;
    p.z_fast = C % 8 == 0 && pk_aligned(z, 16), p.w_fast = C % 8 == 0 && pk_aligned(w, 16);
    p.scale = scale, p.drop = dropout ? pk_dropout_of(args) : PkDropout{nullptr, 0, 1.0f};
    if (args.x_dtype == PK_BF16)
        launch<__nv_bfloat16>(p, stream);
    else
        launch<__half>(p, stream);
    return pk_cuda_check(cudaGetLastError(), what);
}

extern "C" int pk_cuda_lora_workspace(const pk_lora_args *args, int64_t backward, int64_t *bytes) {
    if (int code = backward ? check_backward(args) : check_forward(args)) return code;
    if (!bytes) return pk_fail(PK_ERR_ARGUMENT, "%s: bytes is NULL", what);
    *bytes = args->M == 0 ? 0 : (backward ? pk_lora_backward_workspace(*args) : forward_workspace(*args));
    return PK_OK;
}

extern "C" int pk_cuda_lora_linear(const pk_lora_args *args, int64_t device, void *stream) {
    if (int code = check_forward(args)) return code;
    const pk_lora_args &a = *args;
    if (a.M == 0) return PK_OK;
    if ((a.K > 0 && !a.x) || (a.N > 0 && !a.y) || (a.r > 0 && !a.s))
        return pk_fail(PK_ERR_ARGUMENT, "%s: x, y or s is NULL", what);
    if (int code = check_workspace(a, forward_workspace(a))) return code;
    if (int code = pk_cuda_use(device, what)) return code;
    cudaStream_t on = static_cast<cudaStream_t>(stream);
    if (a.r > 0)
        if (int code = pk_lora_project(a, a.x, a.K, a.a, a.a_dtype, false, true, 1.0f, a.s, on)) return code;
    if (a.N == 0) return PK_OK;
    return a.M > PK_GEMV_ROWS ? pk_lora_mma(a, on) : pk_lora_gemv(a, on);
}

extern "C" int pk_cuda_lora_linear_backward(const pk_lora_args *args, int64_t device, void *stream) {
    if (int code = check_backward(args)) return code;
    const pk_lora_args &a = *args;
    const bool factors = (a.da || a.db) && a.r > 0;
    if (a.M > 0 && ((!a.dy && a.N > 0) || (factors && (!a.s || (!a.x && a.K > 0)))))
        return pk_fail(PK_ERR_ARGUMENT, "%s: dy, x or s is NULL", what);
    if (a.r > 0 && a.N > 0 && a.K > 0 && !a.da != !a.db)
        return pk_fail(PK_ERR_ARGUMENT, "%s: da and db are given together or not at all", what);
    if (a.dgain && (!a.gain || (!a.h && a.M > 0 && a.N > 0)))
        return pk_fail(PK_ERR_ARGUMENT, "%s: dgain needs gain and h", what);
    if (int code = check_workspace(a, a.M == 0 ? 0 : pk_lora_backward_workspace(a))) return code;
    if (int code = pk_cuda_use(device, what)) return code;
    return pk_lora_backward(a, static_cast<cudaStream_t>(stream));
}
