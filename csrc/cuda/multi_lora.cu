/* multi_lora_linear where its matrix product starts from S·B of every row: each adapter's part of b (or, backward,
 * of a) is read once for ROWS rows that share it. */
#include "dropout.cuh"
#include "lora.cuh"
#include "row_groups.cuh"
#include "values.cuh"

namespace {
constexpr int THREADS = 128, ROWS = 8, COLUMNS = 8 * THREADS, DEPTH = 4;

struct Expand {
    const float *s; /* [M, r] */
    const void *w;  /* [P, C] */
    float *out;     /* [M, C] */
    int64_t C;
    int M, r, w_dtype;
    bool fast, own_scaling; /* fast: rows of w of whole, aligned vectors */
    PkRoutes routes;
    PkDropout drop;
};

/* out[m, c] = drop(sum_j s[m, j] w[start + j, c]), times the adapter's scaling. A thread has 8 columns of ROWS rows,
 * and DEPTH rows of w under way. */
__global__ void __launch_bounds__(THREADS) expand_kernel(const __grid_constant__ Expand e) {
    __shared__ uint32_t same[PK_ROUTED_ROWS / 32];
    const int own = static_cast<int>(blockIdx.y);
    const int64_t adapter = pk_adapter(e.routes, own);
    pk_same<THREADS>(e.routes, e.M, adapter, same);
    int rows[ROWS];
    if (!pk_set_of<ROWS>(same, e.M, own, rows)) return;
    const int64_t c = 8 * (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x);
    if (c >= e.C) return;
    const PkRoute route = pk_route(e.routes, adapter);
    float sums[ROWS][8] = {};
    for (int j0 = 0; j0 < route.rank; j0 += DEPTH) {
        float w[DEPTH][8];
#pragma unroll
        for (int j = 0; j < DEPTH; ++j)
            if (j0 + j < route.rank)
                pk_load8_as(e.w, e.w_dtype, (route.start + j0 + j) * e.C + c, e.C - c, e.fast, w[j]);
#pragma unroll
        for (int j = 0; j < DEPTH; ++j) {
            if (j0 + j >= route.rank) continue;
#pragma unroll
            for (int m = 0; m < ROWS; ++m) {
                if (rows[m] >= e.M) continue;
                const float s = __ldg(e.s + static_cast<int64_t>(rows[m]) * e.r + j0 + j);
#pragma unroll
                for (int i = 0; i < 8; ++i) sums[m][i] += s * w[j][i];
            }
        }
    }
    const uint64_t seed = pk_seed(e.drop);
    const float scale = (e.own_scaling ? route.scaling : 1.0f) * e.drop.keep;
#pragma unroll
    for (int m = 0; m < ROWS; ++m) {
        if (rows[m] >= e.M) continue;
        const int64_t at = rows[m] * e.C + c;
        const uint32_t keep = e.drop.seed ? pk_keep<8>(e.drop, seed, at) : 255u;
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[m][i] = keep >> i & 1 ? scale * sums[m][i] : 0.0f;
        if (e.C % 8 == 0) {
            float4 *const to = reinterpret_cast<float4 *>(e.out + at);
            to[0] = make_float4(sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
            to[1] = make_float4(sums[m][4], sums[m][5], sums[m][6], sums[m][7]);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (c + i < e.C) e.out[at + i] = sums[m][i];
        }
    }
}
} // namespace

int pk_lora_expand(const pk_lora_args &args, const float *s, bool backward, float *out, cudaStream_t stream) {
    Expand e = {};
    e.s = s, e.w = backward ? args.a : args.b, e.out = out, e.C = backward ? args.K : args.N;
    e.M = static_cast<int>(args.M), e.r = static_cast<int>(args.r);
    e.w_dtype = static_cast<int>(backward ? args.a_dtype : args.b_dtype);
    e.fast = e.C % 8 == 0 && pk_aligned(e.w, 16), e.own_scaling = !backward;
    e.routes = pk_routes_of(args);
    e.drop = backward ? pk_dropout_of(args) : PkDropout{nullptr, 0, 1.0f};
    const dim3 grid(static_cast<unsigned>((e.C + COLUMNS - 1) / COLUMNS), static_cast<unsigned>(args.M));
    PK_LAUNCH(expand_kernel, grid, THREADS, stream, e);
    return pk_cuda_check(cudaGetLastError(), "multi_lora_linear");
}
