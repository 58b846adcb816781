/* lora_linear on the GPU: what is exported. Checks the arguments once, projects x onto A, and chooses by M. */
#include "dropout.cuh"
#include "lora.cuh"
#include "row_groups.cuh"
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
    bool own_scaling;                /* ROUTED: the adapter's, besides `scale` */
    float scale;
    PkDropout drop;
    PkRoutes routes;
};

/* A block has MT rows of z and RT ranks; its threads share the columns, eight at a time, and add up in a fixed order.
 * ROUTED: MT rows of one adapter, whose rows of w (by rows) it reads; a block for each row of z, of which most find
 * that another has theirs. */
template <typename T, int MT, int RT, bool ROUTED>
__global__ void __launch_bounds__(THREADS, 2) project_kernel(const __grid_constant__ Projection p) {
    __shared__ float warps[WARPS][MT * RT];
    __shared__ uint32_t same[ROUTED ? PK_ROUTED_ROWS / 32 : 1];
    const int j0 = blockIdx.x * RT;
    const int64_t m0 = static_cast<int64_t>(blockIdx.y) * MT;
    int rows[MT] = {};
    PkRoute route = {0, p.r, 1.0f};
    if constexpr (ROUTED) {
        const int own = static_cast<int>(blockIdx.y), M = static_cast<int>(p.M);
        const int64_t adapter = pk_adapter(p.routes, own);
        pk_same<THREADS>(p.routes, M, adapter, same);
        if (!pk_set_of<MT>(same, M, own, rows)) return;
        route = pk_route(p.routes, adapter);
    }
    const auto row = [&](int i) { return ROUTED ? static_cast<int64_t>(rows[i]) : m0 + i; };
    const int64_t columns = ROUTED && j0 >= route.rank ? 0 : p.C;
    const uint64_t seed = pk_seed(p.drop);
    float sums[MT * RT] = {};
    for (int64_t c = 8 * threadIdx.x; c < columns; c += 8 * THREADS) {
        float w[RT][8];
#pragma unroll
        for (int j = 0; j < RT; ++j) {
            if (j0 + j >= route.rank) {
#pragma unroll
                for (int i = 0; i < 8; ++i) w[j][i] = 0.0f;
            } else if (!ROUTED && p.by_columns) {
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    w[j][i] = c + i < p.C ? pk_load_as(p.w, p.w_dtype, (c + i) * p.r + j0 + j) *
                                                (p.gain ? __ldg(p.gain + c + i) : 1.0f)
                                          : 0.0f;
            } else {
                pk_load8_as(p.w, p.w_dtype, (route.start + j0 + j) * p.C + c, p.C - c, p.w_fast, w[j]);
            }
        }
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            if (row(m) >= p.M) continue;
            const int64_t e = row(m) * p.C + c;
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
    const int own = static_cast<int>(threadIdx.x) / RT;
    int64_t m = m0 + own;
    if constexpr (ROUTED) {
#pragma unroll
        for (int i = 0; i < MT; ++i) m = i == own ? rows[i] : m;
    }
    const int j = j0 + threadIdx.x % RT;
    if (threadIdx.x >= MT * RT || m >= p.M || j >= p.r) return;
    float sum = 0.0f;
    for (int i = 0; i < WARPS; ++i) sum += warps[i][threadIdx.x];
    const float scale = ROUTED && p.own_scaling ? p.scale * route.scaling : p.scale;
    p.out[m * p.r + j] = scale * (p.drop.keep * sum);
}

template <typename T> void launch(const Projection &p, cudaStream_t stream) {
    const auto go = [&](auto kernel, int RT, int64_t rows) {
        PK_LAUNCH(kernel, dim3((p.r + RT - 1) / RT, static_cast<unsigned>(rows)), THREADS, stream, p);
    };
    /* few rows: more blocks instead of more work for each */
    if (p.routes.adapters) {
        if (p.M <= PK_GEMV_ROWS)
            go(project_kernel<T, PK_GEMV_ROWS, 1, true>, 1, p.M);
        else
            go(project_kernel<T, 4, 4, true>, 4, p.M);
    } else if (p.M == 1) {
        go(project_kernel<T, 1, 1, false>, 1, 1);
    } else {
        go(project_kernel<T, 4, 4, false>, 4, (p.M + 3) / 4);
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
    if (a->adapters && a->r != a->max_rank) return fail("r must be max_rank where rows have adapters", a->r);
    if (a->adapters && (a->S < 0 || a->P < 0 || (a->S > 0 && (!a->starts || !a->ranks || !a->scalings))))
        return fail("a stack needs starts, ranks and scalings, and S and P of 0 or more", a->S < a->P ? a->S : a->P);
    if (a->adapters && a->gain) return pk_fail(PK_ERR_ARGUMENT, "%s: serves a gain with one adapter only", what);
    const bool some = a->r > 0 && !(a->adapters && a->P == 0);
    if (some && a->M > 0 && ((!a->a && a->K > 0) || (!a->b && a->N > 0)))
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

/* Without ranks there is no adapter at all. */
pk_lora_args prepared(const pk_lora_args &args) {
    pk_lora_args a = args;
    if (a.r == 0) a.adapters = nullptr;
    return a;
}

int check_forward(const pk_lora_args &a) {
    if (int code = pk_lora_check(&a, what)) return code;
    if (a.M > PK_MMA_ROWS)
        return pk_fail(PK_ERR_ARGUMENT, "%s: M must be at most %lld, got %lld", what,
                       static_cast<long long>(PK_MMA_ROWS), static_cast<long long>(a.M));
    const char *why = a.M > PK_GEMV_ROWS ? pk_lora_mma_refuses(a) : nullptr;
    return why ? pk_fail(PK_ERR_ARGUMENT, "%s: %s", what, why) : int(PK_OK);
}

/* The start of the sums of y, where rows have adapters of their own: one float each. */
int64_t start_bytes(const pk_lora_args &a) { return a.adapters ? (a.M * a.N * 4 + 15) / 16 * 16 : 0; }

int64_t forward_workspace(const pk_lora_args &a) {
    return a.M > PK_GEMV_ROWS ? start_bytes(a) + pk_lora_mma_workspace(a) : pk_lora_gemv_workspace(a);
}

int check_backward(const pk_lora_args &a) {
    if (int code = pk_lora_check(&a, what)) return code;
    if (a.M > PK_BACKWARD_ROWS)
        return pk_fail(PK_ERR_ARGUMENT, "%s: M must be at most %lld in the backward, got %lld", what,
                       static_cast<long long>(PK_BACKWARD_ROWS), static_cast<long long>(a.M));
    return PK_OK;
}

int forward(const pk_lora_args &a, cudaStream_t on) {
    if (a.r > 0)
        if (int code = pk_lora_project(a, false, a.s, on)) return code;
    if (a.N == 0) return PK_OK;
    if (a.M <= PK_GEMV_ROWS) return pk_lora_gemv(a, on);
    if (!a.adapters) return pk_lora_mma(a, nullptr, on);
    pk_lora_args rest = a;
    rest.workspace += start_bytes(a) / 4, rest.workspace_bytes -= start_bytes(a);
    if (int code = pk_lora_expand(a, a.s, false, a.workspace, on)) return code;
    return pk_lora_mma(rest, a.workspace, on);
}
} // namespace

int pk_lora_project(const pk_lora_args &args, bool backward, float *out, cudaStream_t stream) {
    Projection p = {};
    p.z = backward ? args.dy : args.x, p.w = backward ? args.b : args.a, p.out = out;
    p.M = args.M, p.C = backward ? args.N : args.K, p.r = static_cast<int>(args.r);
    p.w_dtype = static_cast<int>(backward ? args.b_dtype : args.a_dtype), p.by_columns = backward && !args.adapters;
    p.gain = backward ? args.gain : nullptr;
    p.z_fast = p.C % 8 == 0 && pk_aligned(p.z, 16), p.w_fast = p.C % 8 == 0 && pk_aligned(p.w, 16);
    p.own_scaling = backward, p.scale = backward && !args.adapters ? static_cast<float>(args.scaling) : 1.0f;
    p.drop = backward ? PkDropout{nullptr, 0, 1.0f} : pk_dropout_of(args);
    p.routes = pk_routes_of(args);
    if (args.x_dtype == PK_BF16)
        launch<__nv_bfloat16>(p, stream);
    else
        launch<__half>(p, stream);
    return pk_cuda_check(cudaGetLastError(), what);
}

extern "C" int pk_cuda_lora_workspace(const pk_lora_args *args, int64_t backward, int64_t *bytes) {
    if (!args) return pk_lora_check(args, what);
    const pk_lora_args a = prepared(*args);
    if (int code = backward ? check_backward(a) : check_forward(a)) return code;
    if (!bytes) return pk_fail(PK_ERR_ARGUMENT, "%s: bytes is NULL", what);
    *bytes = a.M == 0 ? 0 : (backward ? pk_lora_backward_workspace(a) : forward_workspace(a));
    return PK_OK;
}

extern "C" int pk_cuda_lora_linear(const pk_lora_args *args, int64_t device, void *stream) {
    if (!args) return pk_lora_check(args, what);
    const pk_lora_args a = prepared(*args);
    if (int code = check_forward(a)) return code;
    if (a.M == 0) return PK_OK;
    if ((a.K > 0 && !a.x) || (a.N > 0 && !a.y) || (a.r > 0 && !a.s))
        return pk_fail(PK_ERR_ARGUMENT, "%s: x, y or s is NULL", what);
    if (int code = check_workspace(a, forward_workspace(a))) return code;
    if (int code = pk_cuda_use(device, what)) return code;
    return forward(a, static_cast<cudaStream_t>(stream));
}

extern "C" int pk_cuda_lora_linear_backward(const pk_lora_args *args, int64_t device, void *stream) {
    if (!args) return pk_lora_check(args, what);
    const pk_lora_args a = prepared(*args);
    if (int code = check_backward(a)) return code;
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
