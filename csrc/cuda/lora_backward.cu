/* Backward of lora_linear for few rows: ds = scaling * dy b;  dx = dy W + drop'(ds a);  da = ds^T drop(x);
 * db = scaling * dy^T s. With a gain (no dropout then) dh = gain * dy stands for dy, and dgain = colsum(dy * h): dh is
 * written, rounded, for dy W alone; elsewhere the gain multiplies b and the rows of db. No dense W, no atomics;
 * every sum has one order. */
#include "dropout.cuh"
#include "groups.cuh"
#include "lora.cuh"
#include "row_groups.cuh"
#include "values.cuh"

namespace {
const char *const what = "lora_linear_backward";
constexpr int THREADS = 256;

struct Sum {
    const float *parts, *ds;
    const void *a;
    void *dx;
    int64_t K;
    int M, r, splits, a_dtype;
    PkDropout drop;
    const float *beside; /* NULL, or dy c [M, groups], of integers by group */
    int groups, size;    /* size: columns of one, a multiple of 4 */
};

/* dx = sum of the parts + drop'(ds a), and what groups have beside them. A thread has 4 columns of ROWS rows. */
template <typename T> __global__ void __launch_bounds__(THREADS) sum_kernel(const __grid_constant__ Sum s) {
    constexpr int ROWS = 4;
    const int64_t k = 4 * (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x);
    const int m0 = blockIdx.y * ROWS;
    if (k >= s.K) return;
    float low[ROWS][4] = {};
    for (int j = 0; j < s.r; ++j) {
        float a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = k + i < s.K ? pk_load_as(s.a, s.a_dtype, j * s.K + k + i) : 0.0f;
#pragma unroll
        for (int m = 0; m < ROWS; ++m) {
            const float ds = m0 + m < s.M ? __ldg(s.ds + (m0 + m) * int64_t(s.r) + j) : 0.0f;
#pragma unroll
            for (int i = 0; i < 4; ++i) low[m][i] += ds * a[i];
        }
    }
    const uint64_t seed = pk_seed(s.drop);
#pragma unroll
    for (int m = 0; m < ROWS; ++m) {
        if (m0 + m >= s.M) return;
        const int64_t e = (m0 + m) * s.K + k;
        const uint32_t keep = s.drop.seed ? pk_keep<4>(s.drop, seed, e) : 15u;
        const float beside = s.beside ? s.beside[(m0 + m) * int64_t(s.groups) + k / s.size] : 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (k + i >= s.K) continue;
            float sum = beside;
            for (int p = 0; p < s.splits; ++p) sum += s.parts[int64_t(p) * s.M * s.K + e + i];
            if (keep >> i & 1) sum += s.drop.keep * low[m][i];
            static_cast<T *>(s.dx)[e + i] = pk_rounded<T>(sum);
        }
    }
}

struct Outer {
    const void *z;
    const float *t; /* [M, r] */
    void *out;
    int64_t C, column, rank; /* out[c * column + j * rank] */
    int M, r, out_dtype;
    float scale;
    PkDropout drop;
    const float *gain; /* NULL, or of the rows of out */
    PkRoutes routes;
    bool own_scaling; /* ROUTED: the adapter's, besides `scale` */
};

/* out[c, j] = scale * sum_m drop(z)[m, c] t[m, j]. A thread has 4 columns and RT ranks. ROUTED: over the rows m that
 * have one adapter, to its rows of out; a block for each row, of which the first with an adapter works. */
constexpr int OUTER_THREADS = 64, RT = 4;
template <typename T, bool ROUTED>
__global__ void __launch_bounds__(OUTER_THREADS) outer_kernel(const __grid_constant__ Outer o) {
    __shared__ uint32_t same[ROUTED ? PK_BACKWARD_ROWS / 32 : 1];
    const int64_t c = 4 * (static_cast<int64_t>(blockIdx.x) * OUTER_THREADS + threadIdx.x);
    const int j0 = blockIdx.y * RT, own = ROUTED ? static_cast<int>(blockIdx.z) : 0;
    PkRoute route = {0, o.r, 1.0f};
    if constexpr (ROUTED) {
        const int64_t adapter = pk_adapter(o.routes, own);
        pk_same<OUTER_THREADS>(o.routes, o.M, adapter, same);
        if (pk_before(same, own)) return;
        route = pk_route(o.routes, adapter);
    }
    if (c >= o.C || j0 >= route.rank) return;
    const uint64_t seed = pk_seed(o.drop);
    float sums[4][RT] = {};
    for (int m = own; m < o.M; ++m) {
        if (ROUTED && !(same[m / 32] >> m % 32 & 1)) continue;
        const int64_t e = m * o.C + c;
        const uint32_t keep = o.drop.seed ? pk_keep<4>(o.drop, seed, e) : 15u;
        float t[RT];
#pragma unroll
        for (int j = 0; j < RT; ++j) t[j] = j0 + j < route.rank ? __ldg(o.t + int64_t(m) * o.r + j0 + j) : 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float z = c + i < o.C && (keep >> i & 1) ? pk_float(static_cast<const T *>(o.z)[e + i]) : 0.0f;
#pragma unroll
            for (int j = 0; j < RT; ++j) sums[i][j] += z * t[j];
        }
    }
    const float scale = (ROUTED && o.own_scaling ? o.scale * route.scaling : o.scale) * o.drop.keep;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < RT; ++j)
            if (c + i < o.C && j0 + j < route.rank)
                pk_store_as(o.out, o.out_dtype, (c + i) * o.column + (route.start + j0 + j) * o.rank,
                            (o.gain ? scale * __ldg(o.gain + c + i) : scale) * sums[i][j]);
}

/* dh = gain * dy and dgain = colsum(dy * h), each unless it is NULL. A thread has a column. */
template <typename T>
__global__ void __launch_bounds__(THREADS)
    gain_kernel(const T *__restrict__ dy, const float *__restrict__ gain, const T *__restrict__ h, T *__restrict__ dh,
                float *__restrict__ dgain, int M, int64_t N) {
    const int64_t n = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (n >= N) return;
    const float factor = gain[n];
    float sum = 0.0f;
#pragma unroll 4
    for (int m = 0; m < M; ++m) {
        const float v = pk_float(dy[m * N + n]);
        if (dh) dh[m * N + n] = pk_rounded<T>(factor * v);
        if (dgain) sum += v * pk_float(h[m * N + n]);
    }
    if (dgain) dgain[n] = sum;
}

/* The workspace: ds, dh, what groups of integers have beside the product, the parts of dx. */
int64_t ds_floats(const pk_lora_args &a) { return a.r > 0 ? (a.M * a.r + 3) / 4 * 4 : 0; }
int64_t dh_floats(const pk_lora_args &a) { return a.gain && a.dx ? (a.M * a.N + 7) / 8 * 4 : 0; }

/* As many as there are where each has a zero or a shift. */
int64_t groups_floats(const pk_lora_args &a) {
    return a.dx && a.quant_type == PK_INT4 ? (a.M * (a.K / a.blocksize) + 3) / 4 * 4 : 0;
}

/* out [M, G] = dy c, by the text that makes ds. */
int project_groups(const pk_lora_args &a, const PkBeside &beside, float *out, cudaStream_t stream) {
    pk_lora_args own = a;
    own.b = beside.c, own.b_dtype = PK_F32, own.r = beside.count, own.scaling = 1.0;
    own.gain = nullptr, own.adapters = nullptr;
    return pk_lora_project_backward(own, out, stream);
}

template <typename T> int launch_dx(const pk_lora_args &given, const float *ds, cudaStream_t stream) {
    pk_lora_args a = given;
    float *room = a.workspace + ds_floats(a) + dh_floats(a), *const sums = room;
    room += groups_floats(a);
    const int64_t bytes = pk_lora_groups_bytes(&a, 1, true);
    if (int code = pk_lora_groups(&a, 1, room, true, stream)) return code;
    const PkBeside beside = pk_beside_of(a);
    if (beside.count)
        if (int code = project_groups(a, beside, sums, stream)) return code;
    const int splits = pk_lora_dx_splits(a);
    float *const parts = room + bytes / 4;
    if (int code = pk_lora_dx(a, parts, stream)) return code;
    Sum s = {parts, ds, a.a, a.dx, a.K, static_cast<int>(a.M), static_cast<int>(a.r), splits,
             static_cast<int>(a.a_dtype), pk_dropout_of(a), beside.count ? sums : nullptr, beside.count,
             static_cast<int>(a.blocksize)};
    if (a.adapters) { /* what they add is one more part */
        if (int code = pk_lora_expand(a, ds, true, parts + splits * a.M * a.K, stream)) return code;
        s.r = 0, s.splits += 1;
    }
    auto kernel = sum_kernel<T>;
    const dim3 grid(static_cast<unsigned>((a.K + 4 * THREADS - 1) / (4 * THREADS)),
                    static_cast<unsigned>((a.M + 3) / 4));
    PK_LAUNCH(kernel, grid, THREADS, stream, s);
    return pk_cuda_check(cudaGetLastError(), what);
}

template <typename T> void launch_outer(const Outer &o, cudaStream_t stream) {
    const bool routed = o.routes.adapters != nullptr;
    if (routed && o.M == 0) return; /* no blocks; the caller has zeros there */
    auto kernel = routed ? outer_kernel<T, true> : outer_kernel<T, false>;
    const int64_t wide = 4 * OUTER_THREADS;
    const dim3 grid(static_cast<unsigned>((o.C + wide - 1) / wide), (o.r + RT - 1) / RT, routed ? o.M : 1);
    PK_LAUNCH(kernel, grid, OUTER_THREADS, stream, o);
}

template <typename T> int backward(const pk_lora_args &a, cudaStream_t stream) {
    const int M = static_cast<int>(a.M), r = static_cast<int>(a.r);
    float *const ds = a.workspace;
    if (a.r > 0 && a.M > 0)
        if (int code = pk_lora_project_backward(a, ds, stream)) return code;
    pk_lora_args product = a;
    if (a.gain && a.N > 0 && (a.dgain || dh_floats(a))) {
        T *const dh = dh_floats(a) ? reinterpret_cast<T *>(a.workspace + ds_floats(a)) : nullptr;
        auto kernel = gain_kernel<T>;
        PK_LAUNCH(kernel, static_cast<unsigned>((a.N + THREADS - 1) / THREADS), THREADS, stream,
                  static_cast<const T *>(a.dy), a.gain, static_cast<const T *>(a.h), dh, a.dgain, M, a.N);
        product.dy = dh;
    }
    if (a.dx && a.M > 0 && a.K > 0)
        if (int code = launch_dx<T>(product, ds, stream)) return code;
    if (a.r == 0) return PK_OK;
    const bool stack = a.adapters != nullptr; /* of a and b by rows, both */
    const float scaling = stack ? 1.0f : static_cast<float>(a.scaling);
    const PkRoutes routes = pk_routes_of(a);
    if (a.da && a.K > 0)
        launch_outer<T>({a.x, ds, a.da, a.K, 1, a.K, M, r, static_cast<int>(a.a_dtype), 1.0f, pk_dropout_of(a), nullptr,
                         routes, false}, stream);
    if (a.db && a.N > 0)
        launch_outer<T>({a.dy, a.s, a.db, a.N, stack ? 1 : a.r, stack ? a.N : 1, M, r, static_cast<int>(a.b_dtype),
                         scaling, {nullptr, 0, 1.0f}, a.gain, routes, stack}, stream);
    return pk_cuda_check(cudaGetLastError(), what);
}
} // namespace

int64_t pk_lora_backward_workspace(const pk_lora_args &a) {
    const int64_t parts = a.dx ? (pk_lora_dx_splits(a) + (a.adapters ? 1 : 0)) * a.M * a.K : 0;
    return 4 * (parts + ds_floats(a) + dh_floats(a) + groups_floats(a)) +
           (a.dx ? pk_lora_groups_bytes(&a, 1, true) : 0);
}

int pk_lora_backward(const pk_lora_args &a, cudaStream_t stream) {
    return a.x_dtype == PK_BF16 ? backward<__nv_bfloat16>(a, stream) : backward<__half>(a, stream);
}
