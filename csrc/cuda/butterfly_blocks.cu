/* x [M, d] by block-diagonal matrices [groups, P, P], whatever factors they came from, and x^T dy of each group.
 *
 * The product is for 16-bit x and P a multiple of 16, on mma.sync. A matrix of float32 is two fragments of 16 bits,
 * what it rounds to and the rest, so that about 16 bits of it count; x is exact. The order of k within 16, and of
 * columns, is chosen so that a lane's elements of x and y are 4 neighbours: no shuffle, no ldmatrix, whole sectors. A
 * block has 64 columns, whose fragments lie ready in shared memory for all rows; a warp has 32 rows.
 *
 * The gradient cuts the features into windows of 64 (whole groups, where several fit) and has 64 x 64 sums, of which
 * those within a group count: on mma.sync for 16-bit x, whose products are exact, else 4 x 4 a thread in float32. */
#include "butterfly.cuh"
#include "ptx.cuh"

namespace {
constexpr int WARPS = 8, THREADS = 32 * WARPS, WIDE = 64, TALL = 32 * WARPS; /* columns and rows of a block */

struct Product {
    const void *x;
    const float *r; /* element (k, c) of group n: r[n * group + k * row + c * column] */
    void *y;
    int64_t M, d, group, row, column;
    int P;
};

/* A unit is 8 NT columns, which P is a multiple of. */
template <typename T, int NT>
__global__ void __launch_bounds__(THREADS, 1) block_product_kernel(const __grid_constant__ Product c) {
    constexpr int UNIT = 8 * NT, UNITS = WIDE / UNIT;
    /* float16 has too few exponents: the largest element becomes about 1 */
    constexpr bool SCALED = std::is_same_v<T, __half>;
    PK_DYNAMIC_SHARED(uint4, fragments); /* [unit][k / 16][8 columns][lane]: two words of each half */
    __shared__ unsigned peak;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int steps = c.P / 16, per_unit = steps * NT * 32, in_group = c.P / UNIT;
    const int64_t unit0 = int64_t(blockIdx.y) * UNITS, left = c.d / UNIT - unit0;
    const int units = left < UNITS ? static_cast<int>(left) : UNITS;
    const auto take = [&](int e, float *v) { /* four elements of a column, k rising */
        const int64_t unit = unit0 + e / per_unit, n = unit / in_group;
        const int column = static_cast<int>(unit % in_group) * UNIT + e / 64 % (NT / 2) * 16 + e % 32 / 8 * 4 +
                           e / 32 % 2 * 2 + e / 4 % 2;
        const float *const r = c.r + n * c.group + (e / (32 * NT) % steps * 16 + e % 4 * 4) * c.row + column * c.column;
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = __ldg(r + i * c.row);
    };
    float up = 1.0f, down = 1.0f;
    if constexpr (SCALED) {
        if (threadIdx.x == 0) peak = 0;
        __syncthreads();
        unsigned most = 0;
        for (int e = threadIdx.x; e < units * per_unit; e += THREADS) {
            float v[4];
            take(e, v);
#pragma unroll
            for (int i = 0; i < 4; ++i) most = max(most, __float_as_uint(v[i]) & 0x7fffffffu);
        }
        atomicMax(&peak, most);
        __syncthreads();
        const unsigned exponent = peak >> 23;
        if (exponent > 4 && exponent < 250)
            up = __uint_as_float((254 - exponent) << 23), down = __uint_as_float(exponent << 23);
    }
    for (int e = threadIdx.x; e < units * per_unit; e += THREADS) {
        float v[4], rest[4];
        take(e, v);
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] *= up, rest[i] = v[i] - pk_float(pk_rounded<T>(v[i]));
        fragments[e] = make_uint4(pk_pack<T>(v[0], v[1]), pk_pack<T>(v[2], v[3]), pk_pack<T>(rest[0], rest[1]),
                                  pk_pack<T>(rest[2], rest[3]));
    }
    __syncthreads();
    for (int64_t row = int64_t(blockIdx.x) * TALL + warp * 32; row < c.M; row += int64_t(gridDim.x) * TALL) {
        for (int u = 0; u < units; ++u) {
            const int64_t unit = unit0 + u;
            const T *const x = static_cast<const T *>(c.x) + (row + g) * c.d + unit / in_group * c.P + 4 * t;
            const auto fetch = [&](int step, uint2 (&v)[4]) { /* rows g, g + 8, g + 16, g + 24 */
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    v[i] = row + g + 8 * i < c.M ? *reinterpret_cast<const uint2 *>(x + 8 * i * c.d + 16 * step)
                                                 : make_uint2(0, 0);
            };
            const uint4 *const b = fragments + u * per_unit + lane;
            float sums[2][NT][4] = {};
            uint2 next[4];
            fetch(0, next);
            for (int step = 0; step < steps; ++step) {
                const uint32_t a[2][4] = {{next[0].x, next[1].x, next[0].y, next[1].y},
                                          {next[2].x, next[3].x, next[2].y, next[3].y}};
                if (step + 1 < steps) fetch(step + 1, next);
#pragma unroll
                for (int j = 0; j < NT; ++j) {
                    const uint4 f = b[(step * NT + j) * 32];
                    const uint32_t high[2] = {f.x, f.y}, low[2] = {f.z, f.w};
#pragma unroll
                    for (int i = 0; i < 2; ++i) pk_mma<T>(sums[i][j], a[i], high), pk_mma<T>(sums[i][j], a[i], low);
                }
            }
            T *const y = static_cast<T *>(c.y) + (row + g) * c.d + unit * UNIT + 4 * t;
#pragma unroll
            for (int i = 0; i < 4; ++i) /* sums[i / 2][.][2 (i % 2) ..] */
                if (row + g + 8 * i < c.M)
#pragma unroll
                    for (int j = 0; j < NT; j += 2) {
                        const float *const even = sums[i / 2][j] + i % 2 * 2,
                                    *const odd = sums[i / 2][j + 1] + i % 2 * 2;
                        *reinterpret_cast<uint2 *>(y + 8 * i * c.d + 8 * j) = make_uint2(
                            pk_pack<T>(down * even[0], down * even[1]), pk_pack<T>(down * odd[0], down * odd[1]));
                    }
        }
    }
}

struct Gradient {
    const void *x, *dy;
    float *out; /* element (k, c) of group n: out[part * d * P + n * group + k * row + c] */
    int64_t M, d, rows, group, row; /* rows of a part */
    int P;
};

/* Where a block's windows of columns begin, and how many columns they have. */
struct Windows {
    int64_t k, c, first; /* first: of the group, or of the groups */
    int k_wide, c_wide;
    __device__ __forceinline__ Windows(const Gradient &g) {
        const int across = (g.P + WIDE - 1) / WIDE, span = across > 1 ? g.P : WIDE / g.P * g.P;
        const int64_t end = min(g.d, int64_t(blockIdx.x / (across * across) + 1) * span);
        first = int64_t(blockIdx.x / (across * across)) * span;
        k = first + blockIdx.x / across % across * WIDE, c = first + blockIdx.x % across * WIDE;
        k_wide = static_cast<int>(min(end - k, int64_t(WIDE))), c_wide = static_cast<int>(min(end - c, int64_t(WIDE)));
    }
};

/* P is a multiple of 16. A warp has 16 columns of x and 32 of dy; rows come by cp.async, DEEP of them a stage. */
template <typename T>
__global__ void __launch_bounds__(THREADS) block_gradient_mma_kernel(const __grid_constant__ Gradient c) {
    constexpr int DEEP = 64, LINE = WIDE + 8; /* rows of ldmatrix meet no bank twice */
    __shared__ __align__(16) T tiles[2][2][DEEP * LINE];
    const Windows w(c);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, k0 = warp % 4 * 16, c0 = warp / 4 * 32;
    const int64_t first = int64_t(blockIdx.y) * c.rows, last = min(c.M, first + c.rows);
    const int steps = static_cast<int>((last - first + DEEP - 1) / DEEP);
    bool mine[2]; /* of the two sets of 16 columns those in the group of the 16 of x */
#pragma unroll
    for (int i = 0; i < 2; ++i)
        mine[i] = k0 < w.k_wide && c0 + 16 * i < w.c_wide &&
                  (w.k - w.first + k0) / c.P == (w.c - w.first + c0 + 16 * i) / c.P;
    const auto ask = [&](int step) {
        const int64_t row = first + int64_t(step) * DEEP;
        for (int i = threadIdx.x; i < 2 * DEEP * (WIDE / 8); i += THREADS) {
            const int which = i / (DEEP * (WIDE / 8)), r = i / (WIDE / 8) % DEEP, at = i % (WIDE / 8) * 8;
            const bool valid = row + r < last && at < (which ? w.c_wide : w.k_wide);
            const T *const from =
                static_cast<const T *>(which ? c.dy : c.x) + (row + r) * c.d + (which ? w.c : w.k) + at;
            pk_cp_async16(tiles[step % 2][which] + r * LINE + at, valid ? from : static_cast<const T *>(c.x), valid);
        }
        pk_cp_async_commit();
    };
    float sums[4][4] = {};
    if (steps > 0) ask(0);
    for (int step = 0; step < steps; ++step) {
        if (step + 1 < steps)
            ask(step + 1);
        else
            pk_cp_async_commit();
        pk_cp_async_wait<1>();
        __syncthreads();
        const T *const x = tiles[step % 2][0], *const dy = tiles[step % 2][1];
        if (mine[0] || mine[1])
#pragma unroll
            for (int m = 0; m < DEEP; m += 16) {
                uint32_t a[4];
                pk_ldmatrix_x4_trans(a, x + (m + lane / 16 * 8 + lane % 8) * LINE + k0 + lane / 8 % 2 * 8);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if (!mine[i]) continue;
                    uint32_t b[4];
                    pk_ldmatrix_x4_trans(b,
                                         dy + (m + lane / 8 % 2 * 8 + lane % 8) * LINE + c0 + 16 * i + lane / 16 * 8);
                    const uint32_t even[2] = {b[0], b[1]}, odd[2] = {b[2], b[3]};
                    pk_mma<T>(sums[2 * i], a, even), pk_mma<T>(sums[2 * i + 1], a, odd);
                }
            }
        __syncthreads(); /* the stage is asked for again */
    }
    const int64_t n = (w.k + k0) / c.P, k = w.k + k0 + lane / 4 - n * c.P;
    float *const out = c.out + blockIdx.y * c.d * c.P + n * c.group;
#pragma unroll
    for (int j = 0; j < 4; ++j)
        if (mine[j / 2]) {
            const int64_t column = w.c + c0 + 8 * j + lane % 4 * 2 - n * c.P;
            *reinterpret_cast<float2 *>(out + k * c.row + column) = make_float2(sums[j][0], sums[j][1]);
            *reinterpret_cast<float2 *>(out + (k + 8) * c.row + column) = make_float2(sums[j][2], sums[j][3]);
        }
}

/* Any P. A thread has 4 x 4 sums of one group; where these do not take all threads, several share the rows of a
 * tile. */
template <typename T>
__global__ void __launch_bounds__(THREADS) block_gradient_kernel(const __grid_constant__ Gradient c) {
    constexpr int DEEP = 32, LINE = WIDE + 4;
    __shared__ __align__(16) float tiles[2][DEEP * LINE];
    static_assert(2 * DEEP * LINE >= 16 * THREADS, "the sums fit the tiles' place");
    const Windows w(c);
    const int side = min(c.P, WIDE), across = (side + 3) / 4, squares = max(1, WIDE / c.P) * across * across;
    const int share = THREADS / squares, turn = threadIdx.x / squares, own = threadIdx.x % squares;
    const int group = own / (across * across), k0 = group * c.P + own / across % across * 4,
              c0 = group * c.P + own % across * 4;
    const int64_t first = int64_t(blockIdx.y) * c.rows, last = min(c.M, first + c.rows);
    const bool whole = c.P % 4 == 0;
    float sums[16] = {};
    for (int64_t row = first; row < last; row += DEEP) {
        __syncthreads(); /* nobody needs the last rows any more */
        for (int i = threadIdx.x; i < 2 * DEEP * LINE; i += THREADS) {
            const int which = i / (DEEP * LINE), r = i / LINE % DEEP, at = i % LINE;
            const bool valid = row + r < last && at < (which ? w.c_wide : w.k_wide);
            const T *const from =
                static_cast<const T *>(which ? c.dy : c.x) + (row + r) * c.d + (which ? w.c : w.k) + at;
            tiles[which][i % (DEEP * LINE)] = valid ? pk_float(*from) : 0.0f;
        }
        __syncthreads();
        for (int r = turn; turn < share && r < DEEP; r += share) {
            float v[4], u[4];
            if (whole) {
                pk_load4(tiles[0] + r * LINE + k0, 4, true, v), pk_load4(tiles[1] + r * LINE + c0, 4, true, u);
            } else {
#pragma unroll
                for (int j = 0; j < 4; ++j) v[j] = tiles[0][r * LINE + k0 + j], u[j] = tiles[1][r * LINE + c0 + j];
            }
#pragma unroll
            for (int j = 0; j < 16; ++j) sums[j] += v[j / 4] * u[j % 4];
        }
    }
    __syncthreads();
    float *const shared = tiles[0];
#pragma unroll
    for (int j = 0; j < 16; ++j) shared[j * THREADS + threadIdx.x] = sums[j];
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * squares; i += THREADS) {
        const int j = i / squares, square = i % squares, n = square / (across * across);
        /* in the windows' part of a group */
        const int k = square / across % across * 4 + j / 4, column = square % across * 4 + j % 4;
        if (k >= side || column >= side || n * c.P + k >= w.k_wide || n * c.P + column >= w.c_wide) continue;
        float sum = 0.0f;
        for (int s = 0; s < share; ++s) sum += shared[j * THREADS + s * squares + square];
        const int64_t to = w.first / c.P + n;
        const int64_t above = w.k - w.first, beside = w.c - w.first; /* 0 where a window has whole groups */
        c.out[blockIdx.y * c.d * c.P + to * c.group + (above + k) * c.row + beside + column] = sum;
    }
}

int check(const char *what, int64_t d, int64_t P) {
    if (P < 1 || P > PK_REACH || d % P)
        return pk_fail(PK_ERR_ARGUMENT, "%s: no blocks of %lld in %lld features", what, static_cast<long long>(P),
                       static_cast<long long>(d));
    return PK_OK;
}

template <typename T> void launch_product(const Product &c, cudaStream_t stream) {
    const int NT = c.P % 64 == 0 ? 8 : c.P % 32 == 0 ? 4 : 2;
    const int64_t across = pk_ceil(c.d, WIDE), tall = pk_ceil(c.M, TALL);
    const dim3 grid(pk_grid(tall, pk_ceil(2 * PK_BLOCKS, across)), static_cast<unsigned>(across));
    const auto kernel = NT == 8 ? block_product_kernel<T, 8>
                                : NT == 4 ? block_product_kernel<T, 4> : block_product_kernel<T, 2>;
    PK_LAUNCH_SHARED(kernel, grid, THREADS, static_cast<size_t>(c.P) * WIDE * 4, stream, c);
}
} // namespace

extern "C" int pk_cuda_block_product(const void *x, const float *matrices, int64_t dtype, int64_t M, int64_t d,
                                     int64_t P, int64_t group, int64_t row, int64_t column, void *y, int64_t device,
                                     void *stream) {
    const char *const what = "block_product";
    if (int code = pk_rotation_check(what, dtype, M, d)) return code;
    if (int code = check(what, d, P)) return code;
    if (dtype == PK_F32 || P % 16 || d > 65535 * WIDE || !pk_aligned(x, 8) || !pk_aligned(y, 8))
        return pk_fail(PK_ERR_ARGUMENT, "%s: x must be 16-bit and aligned, and blocks multiples of 16", what);
    if (M == 0 || d == 0) return PK_OK;
    if (!x || !matrices || !y) return pk_fail(PK_ERR_ARGUMENT, "%s: a pointer is NULL", what);
    if (int code = pk_cuda_use(device, what)) return code;
    const Product c = {x, matrices, y, M, d, group, row, column, static_cast<int>(P)};
    if (dtype == PK_BF16)
        launch_product<__nv_bfloat16>(c, static_cast<cudaStream_t>(stream));
    else
        launch_product<__half>(c, static_cast<cudaStream_t>(stream));
    return pk_cuda_check(cudaGetLastError(), what);
}

extern "C" int pk_cuda_block_gradient(const void *x, const void *dy, int64_t dtype, int64_t M, int64_t d, int64_t P,
                                      int64_t group, int64_t row, float *out, int64_t parts, int64_t device,
                                      void *stream) {
    const char *const what = "block_gradient";
    if (int code = pk_rotation_check(what, dtype, M, d)) return code;
    if (int code = check(what, d, P)) return code;
    if (parts < 1 || parts > 65535)
        return pk_fail(PK_ERR_ARGUMENT, "%s: parts must be from 1 to 65535, got %lld", what,
                       static_cast<long long>(parts));
    if (d == 0) return PK_OK;
    if (!out || (M > 0 && (!x || !dy))) return pk_fail(PK_ERR_ARGUMENT, "%s: a pointer is NULL", what);
    if (int code = pk_cuda_use(device, what)) return code;
    const Gradient c = {x, dy, out, M, d, pk_ceil(M, parts), group, row, static_cast<int>(P)};
    const int64_t across = pk_ceil(P, WIDE), span = across > 1 ? P : WIDE / P * P;
    const dim3 grid(static_cast<unsigned>(pk_ceil(d, span) * across * across), static_cast<unsigned>(parts));
    const bool tensor = dtype != PK_F32 && P % 16 == 0 && pk_aligned(x, 16) && pk_aligned(dy, 16) && pk_aligned(out, 8);
    pk_by_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        auto kernel = block_gradient_kernel<T>;
        if constexpr (sizeof(T) == 2)
            if (tensor) kernel = block_gradient_mma_kernel<T>;
        PK_LAUNCH(kernel, grid, THREADS, static_cast<cudaStream_t>(stream), c);
    });
    return pk_cuda_check(cudaGetLastError(), what);
}
