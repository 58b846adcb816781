/* S = drop(x) A^T of every projection of a stack in one launch, and the backward's dS = scaling * dy B of one. */
#include "dropout.cuh"
#include "lora.cuh"
#include "ptx.cuh"
#include "row_groups.cuh"
#include "values.cuh"

namespace {
constexpr int THREADS = 256, WARPS = THREADS / 32;

struct Factor { /* of one projection */
    const void *w;
    float *out;
    int r, w_dtype;
    bool fast; /* rows of whole, aligned vectors; so z_fast */
    PkDropout drop;
};
struct Projection {
    Factor factor[PK_STACK];
    PkBlocks blocks; /* of RT ranks */
    const void *z;
    const float *gain; /* NULL, or of the rows of w, by_columns */
    int64_t M, C;
    bool by_columns, z_fast;
    bool own_scaling; /* ROUTED: the adapter's, besides `scale` */
    float scale;
    PkRoutes routes;
    uint4 *cleared;
    int64_t clears; /* of 16 bytes */
};

/* A block has MT rows of z and RT ranks; its threads share the columns, eight at a time, and add up in a fixed order.
 * ROUTED: MT rows of one adapter, whose rows of w (by rows) it reads; a block for each row of z, of which most find
 * that another has theirs. */
template <typename T, int MT, int RT, bool ROUTED>
__global__ void __launch_bounds__(THREADS, 2) project_kernel(const __grid_constant__ Projection p) {
    __shared__ float warps[WARPS][MT * RT];
    __shared__ uint32_t same[ROUTED ? PK_ROUTED_ROWS / 32 : 1];
    /* anybody's launch may come before this one: nothing is read until it has ended. Only then may the next begin,
     * which so finds all but what this one writes. */
    pk_wait_for_previous();
    pk_release_next();
    const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    for (int64_t i = block * THREADS + threadIdx.x; i < p.clears; i += int64_t(THREADS) * gridDim.x * gridDim.y)
        p.cleared[i] = {0, 0, 0, 0};
    const int which = p.blocks.of(blockIdx.x);
    const Factor &f = p.factor[which];
    const int j0 = static_cast<int>(blockIdx.x - p.blocks.first[which]) * RT;
    if (j0 >= f.r) return; /* it only clears */
    const int64_t m0 = static_cast<int64_t>(blockIdx.y) * MT;
    int rows[MT] = {};
    PkRoute route = {0, f.r, 1.0f};
    if constexpr (ROUTED) {
        const int own = static_cast<int>(blockIdx.y), M = static_cast<int>(p.M);
        const int64_t adapter = pk_adapter(p.routes, own);
        pk_same<THREADS>(p.routes, M, adapter, same);
        if (!pk_set_of<MT>(same, M, own, rows)) return;
        route = pk_route(p.routes, adapter);
    }
    const auto row = [&](int i) { return ROUTED ? static_cast<int64_t>(rows[i]) : m0 + i; };
    const int64_t columns = ROUTED && j0 >= route.rank ? 0 : p.C;
    const uint64_t seed = pk_seed(f.drop);
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
                    w[j][i] = c + i < p.C ? pk_load_as(f.w, f.w_dtype, (c + i) * f.r + j0 + j) *
                                                (p.gain ? __ldg(p.gain + c + i) : 1.0f)
                                          : 0.0f;
            } else {
                pk_load8_as(f.w, f.w_dtype, (route.start + j0 + j) * p.C + c, p.C - c, f.fast, w[j]);
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
            if (f.drop.seed) {
                const uint32_t keep = pk_keep<8>(f.drop, seed, e);
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
    if (threadIdx.x >= MT * RT || m >= p.M || j >= f.r) return;
    float sum = 0.0f;
    for (int i = 0; i < WARPS; ++i) sum += warps[i][threadIdx.x];
    const float scale = ROUTED && p.own_scaling ? p.scale * route.scaling : p.scale;
    f.out[m * f.r + j] = scale * (f.drop.keep * sum);
}

template <typename T> void launch(Projection &p, int count, bool after, cudaStream_t stream) {
    const auto go = [&](auto kernel, int RT, int64_t rows) {
        PkBlockCounter counter;
        for (int i = 0; i < count; ++i) counter.add((p.factor[i].r + RT - 1) / RT);
        p.blocks = counter.blocks;
        const unsigned across = counter.total > 0 ? static_cast<unsigned>(counter.total) : 1u;
        PK_LAUNCH_AFTER(after, kernel, dim3(across, static_cast<unsigned>(rows)), THREADS, 0, stream, p);
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

int queue(Projection &p, const pk_lora_args &a, int count, bool after, cudaStream_t stream) {
    p.M = a.M, p.z_fast = p.C % 8 == 0 && pk_aligned(p.z, 16), p.routes = pk_routes_of(a);
    for (int i = 0; i < count; ++i) p.factor[i].fast = p.C % 8 == 0 && pk_aligned(p.factor[i].w, 16);
    if (a.x_dtype == PK_BF16)
        launch<__nv_bfloat16>(p, count, after, stream);
    else
        launch<__half>(p, count, after, stream);
    return PK_OK;
}
} // namespace

int pk_lora_project(const PkStack &stack, void *cleared, int64_t bytes, cudaStream_t stream) {
    const pk_lora_args &first = *stack.layer[0];
    Projection p = {};
    p.z = first.x, p.C = first.K, p.scale = 1.0f;
    p.cleared = static_cast<uint4 *>(cleared), p.clears = bytes / 16;
    for (int i = 0; i < stack.count; ++i) {
        const pk_lora_args &a = *stack.layer[i];
        p.factor[i] = {a.a, a.s, static_cast<int>(a.r), static_cast<int>(a.a_dtype), false, pk_dropout_of(a)};
    }
    return queue(p, first, stack.count, true, stream);
}

int pk_lora_project_backward(const pk_lora_args &a, float *out, cudaStream_t stream) {
    Projection p = {};
    p.z = a.dy, p.C = a.N, p.gain = a.gain, p.by_columns = !a.adapters;
    p.own_scaling = true, p.scale = a.adapters ? 1.0f : static_cast<float>(a.scaling);
    p.factor[0] = {a.b, out, static_cast<int>(a.r), static_cast<int>(a.b_dtype), false, {nullptr, 0, 1.0f}};
    if (int code = queue(p, a, 1, false, stream)) return code;
    return pk_cuda_check(cudaGetLastError(), "lora_linear_backward");
}
