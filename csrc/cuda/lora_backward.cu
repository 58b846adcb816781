/* Backward of lora_linear for few rows: ds = scaling * dy b;  dx = dy W + drop'(ds a);  da = ds^T drop(x);
 * db = scaling * dy^T s. With a gain (no dropout then) dh = gain * dy stands for dy, and dgain = colsum(dy * h): dh is
 * written, rounded, for dy W alone; elsewhere the gain multiplies b and the rows of db. No dense W, no atomics; every sum has one order.
 *
 * dy W goes over the rows of W, so a block's scale differs from term to term: W is decoded to what eager computes with,
 * float32 table times float32 scale, rounded once to x's type. A warp owns 64 columns and takes 16 rows a step: lane
 * (g, t) = (lane / 4, lane % 4) decodes 8 neighbouring columns, one word, of the rows 4t .. 4t + 3, which are column g of
 * eight fragments of mma.sync. A byte's entry in the table is a pair of floats; a copy for each lane of a half-warp keeps
 * look-ups from conflicts. Four warps of a block share its columns and split its rows; their sums meet in shared memory,
 * one warp after the other. */
#include "dropout.cuh"
#include "lora.cuh"
#include "ptx.cuh"
#include "routes.cuh"
#include "scales.cuh"

namespace {
const char *const what = "lora_linear_backward";
constexpr int WARPS = 8, THREADS = 32 * WARPS, WIDE = 2, DEEP = WARPS / WIDE; /* warps side by side, and over the rows */
constexpr int COLUMNS = 64 * WIDE, STEP = 16;

struct Input {
    const void *dy;
    const uint8_t *packed;
    PkScales scales;
    float *parts; /* [splits][M][K] */
    int64_t N, K;
    int M, steps; /* steps of STEP rows of W in a split */
};

/* N % 4 == 0, K % blocksize == 0, both below 2^25; W and dy aligned for the loads. */
template <typename T, int TILES, bool NESTED> /* TILES of 16 rows of dy */
__global__ void __launch_bounds__(THREADS)
    input_kernel(const __grid_constant__ Input in, const __grid_constant__ PkTable values) {
    __shared__ float4 table[256 * 8]; /* 16 pairs for each byte; later the sums of the warps */
    __shared__ float map[NESTED ? 256 : 1];
    static_assert(TILES * 16 * COLUMNS <= 4 * 256 * 8, "the sums fit the table's place");
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    {
        const float even = values.value[threadIdx.x / 16], odd = values.value[threadIdx.x % 16];
#pragma unroll
        for (int i = 0; i < 8; ++i) table[threadIdx.x * 8 + ((i + threadIdx.x) & 7)] = {even, odd, even, odd};
    }
    if (NESTED) map[threadIdx.x] = in.scales.nested_code[threadIdx.x];
    const float offset = NESTED ? *in.scales.offset : 0.0f;
    __syncthreads();
    const char *const entries = reinterpret_cast<const char *>(table);
    const uint32_t own = 8u * (lane % 16);

    const int N = static_cast<int>(in.N), K = static_cast<int>(in.K);
    const int first = (blockIdx.y * in.steps + warp / WIDE) * STEP, last = min(N, (blockIdx.y + 1) * in.steps * STEP);
    /* what does not exist is read from where something does: rows of dy and columns of W past the end repeat the last
     * ones, and nobody reads their sums; rows of W past the end count as zero */
    const int k = min(static_cast<int>(blockIdx.x * COLUMNS + 64 * (warp % WIDE) + 8 * g), K - 8);
    const T *rows[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            rows[i][half] = static_cast<const T *>(in.dy) + min(16 * i + g + 8 * half, in.M - 1) * in.N;
    const int pitch = K / 2, pitch_blocks = K >> in.scales.block_shift; /* bytes and blocks in a row of W */
    const int start = min(first + 4 * t, N - 4);
    const uint8_t *packed = in.packed + int64_t(start) * pitch + k / 2;
    uint32_t block = static_cast<uint32_t>(start) * pitch_blocks + (k >> in.scales.block_shift); /* numel / 32 at most */
    uint32_t next[4];
    PkRawScale next_scale[4];
    const auto fetch = [&] {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            next[i] = __ldg(reinterpret_cast<const uint32_t *>(packed + i * pitch));
            next_scale[i] = pk_fetch_scale<NESTED>(in.scales, block + i * pitch_blocks);
        }
    };
    float sums[TILES][8][4] = {};
    fetch();
    for (int n0 = first; n0 < last; n0 += DEEP * STEP) {
        const int n = n0 + 4 * t;
        const bool real = n < N;
        uint32_t dy[TILES][4], word[4];
        float scale[4];
#pragma unroll
        for (int i = 0; i < TILES; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint2 v = *reinterpret_cast<const uint2 *>(rows[i][half] + (real ? n : N - 4));
                dy[i][half] = real ? v.x : 0, dy[i][half + 2] = real ? v.y : 0;
            }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            word[i] = next[i];
            scale[i] = pk_finish_scale<NESTED>(next_scale[i], map, offset);
            if (!real) scale[i] = 0.0f; /* 0 times a scale that is infinite is no 0 */
        }
        if (n + DEEP * STEP < N) packed += DEEP * STEP * pitch, block += DEEP * STEP * pitch_blocks;
        fetch();
#pragma unroll
        for (int j = 0; j < 4; ++j) { /* byte j: columns 2j, in the high nibble, and 2j + 1 */
            float even[4], odd[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t at = j == 0 ? word[i] << 7 : word[i] >> (8 * j - 7); /* 128 bytes an entry */
                const float2 v = *reinterpret_cast<const float2 *>(entries + pk_and_or(at, 0x7f80u, own));
                even[i] = __fmul_rn(v.x, scale[i]), odd[i] = __fmul_rn(v.y, scale[i]);
            }
            const uint32_t b[2][2] = {{pk_pack<T>(even[0], even[1]), pk_pack<T>(even[2], even[3])},
                                      {pk_pack<T>(odd[0], odd[1]), pk_pack<T>(odd[2], odd[3])}};
#pragma unroll
            for (int i = 0; i < TILES; ++i) pk_mma<T>(sums[i][2 * j], dy[i], b[0]), pk_mma<T>(sums[i][2 * j + 1], dy[i], b[1]);
        }
    }

    __syncthreads(); /* the table's place is free */
    float *const shared = reinterpret_cast<float *>(table);
    for (int turn = 0; turn < DEEP; ++turn) { /* sums[i][0 .. 7][e]: columns 64 (warp % WIDE) + 16t + 8 (e % 2) + 0 .. 7 */
        if (warp / WIDE == turn)
#pragma unroll
            for (int i = 0; i < TILES; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float *const row = shared + (16 * i + g + 8 * (e / 2)) * COLUMNS + 64 * (warp % WIDE) + 16 * t + 8 * (e % 2);
#pragma unroll
                    for (int j = 0; j < 8; ++j) row[j] = turn ? row[j] + sums[i][j][e] : sums[i][j][e];
                }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < in.M * COLUMNS; i += THREADS) {
        const int64_t m = i / COLUMNS, at = static_cast<int64_t>(blockIdx.x) * COLUMNS + i % COLUMNS;
        if (at < in.K) in.parts[(static_cast<int64_t>(blockIdx.y) * in.M + m) * in.K + at] = shared[i];
    }
}

/* Any shape and alignment, element by element: a thread has a column of ANY_ROWS rows of dy. */
constexpr int ANY_ROWS = 8;
template <typename T>
__global__ void __launch_bounds__(THREADS) any_kernel(const __grid_constant__ Input in, const __grid_constant__ PkTable values) {
    __shared__ float table[16], map[256];
    if (threadIdx.x < 16) table[threadIdx.x] = values.value[threadIdx.x];
    map[threadIdx.x] = pk_scale_code(in.scales, static_cast<int>(threadIdx.x));
    const float offset = pk_scale_offset(in.scales);
    __syncthreads();
    const int64_t k = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    const int m0 = blockIdx.z * ANY_ROWS;
    const int64_t last = min(in.N, (int64_t(blockIdx.y) + 1) * in.steps * STEP);
    if (k >= in.K) return;
    float sums[ANY_ROWS] = {};
    for (int64_t n = int64_t(blockIdx.y) * in.steps * STEP; n < last; ++n) {
        const int64_t e = n * in.K + k;
        const float scale = pk_scale(in.scales, map, offset, e);
        const float w = pk_float(pk_rounded<T>(__fmul_rn(table[(in.packed[e / 2] >> (e % 2 ? 0 : 4)) & 15], scale)));
#pragma unroll
        for (int m = 0; m < ANY_ROWS; ++m)
            if (m0 + m < in.M) sums[m] += w * pk_float(static_cast<const T *>(in.dy)[(m0 + m) * in.N + n]);
    }
#pragma unroll
    for (int m = 0; m < ANY_ROWS; ++m)
        if (m0 + m < in.M) in.parts[(int64_t(blockIdx.y) * in.M + m0 + m) * in.K + k] = sums[m];
}

struct Sum {
    const float *parts, *ds;
    const void *a;
    void *dx;
    int64_t K;
    int M, r, splits, a_dtype;
    PkDropout drop;
};

/* dx = sum of the parts + drop'(ds a). A thread has 4 columns of ROWS rows. */
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
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (k + i >= s.K) continue;
            float sum = 0.0f;
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

/* out[c, j] = scale * sum_m drop(z)[m, c] t[m, j]. A thread has 4 columns and RT ranks. ROUTED: over the rows m that have
 * one adapter, to its rows of out; a block for each row, of which the first with an adapter works. */
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

bool whole_words(const pk_lora_args &a) {
    return a.N > 0 && a.N % 4 == 0 && a.K % a.blocksize == 0 && a.N < 1 << 25 && a.K < 1 << 25 &&
           pk_aligned(a.weight, 4) && pk_aligned(a.dy, 8);
}

/* Steps of STEP rows of W in a split, and the splits: blocks for a large GPU, the same number on every GPU, but no more
 * than that the parts, written and read, stay below the bytes of W. */
struct Splits {
    int64_t steps, count;
};
Splits splits_of(const pk_lora_args &a) {
    const int64_t blocks = (a.K + COLUMNS - 1) / COLUMNS, all = (a.N + STEP - 1) / STEP, tall = (a.M + 15) / 16;
    int64_t count = (264 + blocks - 1) / (blocks < 1 ? 1 : blocks);
    for (const int64_t most : {(all + DEEP - 1) / DEEP, a.N / (16 * 16 * tall)}) count = count < most ? count : most;
    if (count < 1) count = 1;
    const int64_t steps = all < 1 ? 1 : (all + count - 1) / count;
    return {steps, all < 1 ? 1 : (all + steps - 1) / steps};
}

/* The workspace: ds, dh, the parts of dx. */
int64_t ds_floats(const pk_lora_args &a) { return a.r > 0 ? (a.M * a.r + 3) / 4 * 4 : 0; }
int64_t dh_floats(const pk_lora_args &a) { return a.gain && a.dx ? (a.M * a.N + 7) / 8 * 4 : 0; }

template <typename T, int TILES>
void launch_input(const Input &in, const PkTable &table, unsigned splits, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>((in.K + COLUMNS - 1) / COLUMNS), splits);
    auto kernel = !in.scales.nested_code ? input_kernel<T, TILES, false> : input_kernel<T, TILES, true>;
    PK_LAUNCH(kernel, grid, THREADS, stream, in, table);
}

template <typename T> int launch_dx(const pk_lora_args &a, const float *ds, cudaStream_t stream) {
    const Splits splits = splits_of(a);
    float *const parts = a.workspace + ds_floats(a) + dh_floats(a);
    Input in = {};
    in.dy = a.dy, in.packed = static_cast<const uint8_t *>(a.weight), in.parts = parts;
    in.scales = pk_scales_of(a.absmax, a.nested_absmax, a.nested_code, a.offset, a.blocksize, a.nested_blocksize);
    in.N = a.N, in.K = a.K, in.M = static_cast<int>(a.M), in.steps = static_cast<int>(splits.steps);
    const PkTable table = a.table ? pk_table_of(a.table) : PkTable{};
    const unsigned count = static_cast<unsigned>(splits.count);
    if (!whole_words(a)) {
        auto kernel = any_kernel<T>;
        const dim3 grid(static_cast<unsigned>((a.K + THREADS - 1) / THREADS), count, (in.M + ANY_ROWS - 1) / ANY_ROWS);
        PK_LAUNCH(kernel, grid, THREADS, stream, in, table);
    } else if (a.M <= 16) {
        launch_input<T, 1>(in, table, count, stream);
    } else if (a.M <= 32) {
        launch_input<T, 2>(in, table, count, stream);
    } else {
        launch_input<T, 4>(in, table, count, stream);
    }
    Sum s = {parts, ds, a.a, a.dx, a.K, in.M, static_cast<int>(a.r), static_cast<int>(splits.count),
             static_cast<int>(a.a_dtype), pk_dropout_of(a)};
    if (a.adapters) { /* what they add is one more part */
        if (int code = pk_lora_expand(a, ds, true, parts + splits.count * a.M * a.K, stream)) return code;
        s.r = 0, s.splits += 1;
    }
    auto kernel = sum_kernel<T>;
    const dim3 grid(static_cast<unsigned>((a.K + 4 * THREADS - 1) / (4 * THREADS)), static_cast<unsigned>((a.M + 3) / 4));
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
        if (int code = pk_lora_project(a, true, ds, stream)) return code;
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
    const int64_t parts = a.dx ? (splits_of(a).count + (a.adapters ? 1 : 0)) * a.M * a.K : 0;
    return 4 * (parts + ds_floats(a) + dh_floats(a));
}

int pk_lora_backward(const pk_lora_args &a, cudaStream_t stream) {
    return a.x_dtype == PK_BF16 ? backward<__nv_bfloat16>(a, stream) : backward<__half>(a, stream);
}
