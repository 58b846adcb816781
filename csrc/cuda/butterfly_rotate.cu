/* Butterfly factors of small blocks, one after another in float32, and what their gradients need. Any block size, any
 * type.
 *
 * A block of threads turns 32 rows of x: a tile of whole groups of `reach` = b 2^(m - 1) features, as far as m
 * factors reach, is transposed on its way into shared memory, so that lanes are rows and a block's elements are the
 * same for a whole warp. A warp takes V columns of one block in a step: V elements of x and V x V of the block, for
 * V V multiply-adds a lane. Between factors nothing leaves the tile. */
#include "butterfly.cuh"

namespace {
constexpr int WARPS = 8, THREADS = 32 * WARPS, LINE = 33; /* floats from one column of a tile to the next */

struct Turn {
    const void *x; /* NULL: rows of identities, one for each group */
    const float *blocks;
    void *y;
    int64_t M, d;
    int b, m, columns; /* of a tile */
    bool shared, transposed, every, fast;
};

/* Columns of block n of factor i: k + (k below half ? low : high). */
struct Places {
    int low, high, half;
    __device__ __forceinline__ Places(int i, int n, int b) {
        half = b / 2;
        low = i ? ((n >> i << (i + 1)) + (n & ((1 << i) - 1))) * half : n * b;
        high = low + (half << i) - half;
    }
    __device__ __forceinline__ int operator()(int k) const { return k + (k < half ? low : high); }
};

/* V neighbouring elements, aligned to their size. */
template <int V> __device__ __forceinline__ void take(const float *p, float *v) {
    if constexpr (V == 4) {
        const float4 raw = __ldg(reinterpret_cast<const float4 *>(p));
        v[0] = raw.x, v[1] = raw.y, v[2] = raw.z, v[3] = raw.w;
    } else if constexpr (V == 2) {
        const float2 raw = __ldg(reinterpret_cast<const float2 *>(p));
        v[0] = raw.x, v[1] = raw.y;
    } else {
        v[0] = __ldg(p);
    }
}

/* V divides b. With `every`, what each factor gives goes to y [m][M][d], else the last's. */
template <typename T, int V> __global__ void __launch_bounds__(THREADS, 4) turn_kernel(const __grid_constant__ Turn c) {
    PK_DYNAMIC_SHARED(float, tiles);
    float *in = tiles, *out = tiles + c.columns * LINE;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, reach = c.b << (c.m - 1), b = c.b;
    const int64_t first = int64_t(blockIdx.y) * c.columns;
    const int columns = static_cast<int>(min(int64_t(c.columns), c.d - first));
    for (int64_t row = int64_t(blockIdx.x) * 32; row < c.M; row += int64_t(gridDim.x) * 32) {
        /* a warp moves 4 rows of 32 columns, which meet no bank twice; or, where four cannot be moved at once, one
         * by one */
        const auto move = [&](auto quad, auto one) {
            if (c.fast) {
                for (int i = warp; i < 8 * ((columns + 31) / 32); i += WARPS) {
                    const int r = i % 8 * 4 + lane / 8, at = i / 8 * 32 + lane % 8 * 4;
                    if (at < columns) quad(r, at);
                }
            } else {
                for (int i = threadIdx.x; i < 32 * columns; i += THREADS) one(i / columns, i % columns);
            }
        };
        const T *const x = static_cast<const T *>(c.x) + row * c.d + first;
        move(
            [&](int r, int at) {
                float v[4] = {};
                if (row + r < c.M) pk_load4(x + r * c.d + at, 4, true, v);
#pragma unroll
                for (int j = 0; j < 4; ++j) in[(at + j) * LINE + r] = v[j];
            },
            [&](int r, int at) {
                float v = 0.0f;
                if (!c.x)
                    v = (first + at) % reach == row + r ? 1.0f : 0.0f;
                else if (row + r < c.M)
                    v = pk_float(x[r * c.d + at]);
                in[at * LINE + r] = v;
            });
        __syncthreads();
        for (int step = 0; step < c.m; ++step) {
            const int i = c.transposed ? step : c.m - 1 - step, across = b / V;
            const int64_t count = c.shared ? 1 : c.d / b, own = c.shared ? 0 : first / b;
            for (int item = warp; item < columns / b * across; item += WARPS) {
                const int n = item / across, c0 = item % across * V;
                const Places place(i, n, b);
                const float *const block = c.blocks + (i * count + own + (c.shared ? 0 : n)) * b * b;
                float sums[V] = {};
                for (int k = 0; k < b; k += V) {
                    float v[V], w[V][V]; /* w[j]: row k + j of the block, or column c0 + j of the transposed one */
#pragma unroll
                    for (int j = 0; j < V; ++j) {
                        v[j] = in[place(k + j) * LINE + lane];
                        take<V>(c.transposed ? block + (c0 + j) * b + k : block + (k + j) * b + c0, w[j]);
                    }
                    if (c.transposed) {
#pragma unroll
                        for (int j = 0; j < V; ++j)
#pragma unroll
                            for (int u = 0; u < V; ++u) sums[j] += v[u] * w[j][u];
                    } else {
#pragma unroll
                        for (int j = 0; j < V; ++j)
#pragma unroll
                            for (int u = 0; u < V; ++u) sums[u] += v[j] * w[j][u];
                    }
                }
#pragma unroll
                for (int u = 0; u < V; ++u) out[place(c0 + u) * LINE + lane] = sums[u];
            }
            __syncthreads();
            float *const other = in;
            in = out, out = other;
            if (!c.every && step + 1 < c.m) continue;
            T *const y = static_cast<T *>(c.y) + ((c.every ? step * c.M : 0) + row) * c.d + first;
            move(
                [&](int r, int at) {
                    float v[4];
#pragma unroll
                    for (int j = 0; j < 4; ++j) v[j] = in[(at + j) * LINE + r];
                    if (row + r < c.M) pk_store4(y + r * c.d + at, 4, true, v);
                },
                [&](int r, int at) {
                    if (row + r < c.M) y[r * c.d + at] = pk_rounded<T>(in[at * LINE + r]);
                });
        }
        __syncthreads();
    }
}

struct Factors {
    const float *inputs, *gradients, *last; /* [m][reach][d], [m][reach][d], [reach][d] */
    float *out;                             /* [m][d / b][b][b] */
    int64_t d;
    int b, m, reach;
    bool transposed;
};

/* The gradient of each factor's blocks from rows of identities that went through them: of what step s took in, which
 * is what step s - 1 gave, times the gradient of what it gave, which is what `last` became on its way back. A thread
 * an element. */
__global__ void __launch_bounds__(THREADS) factor_kernel(const __grid_constant__ Factors c) {
    const int step = blockIdx.y, i = c.transposed ? step : c.m - 1 - step, b = c.b;
    const int64_t e = int64_t(blockIdx.x) * THREADS + threadIdx.x, size = c.reach * c.d;
    if (e >= c.d * b) return;
    const int k = static_cast<int>(e / b % b), column = static_cast<int>(e % b);
    const int64_t n = e / b / b, in_group = c.reach / b, first = n / in_group * c.reach;
    const Places place(i, static_cast<int>(n % in_group), b);
    const float *const g = (step == c.m - 1 ? c.last : c.gradients + (c.m - 2 - step) * size) + first + place(column);
    float sum = 0.0f;
    if (step == 0) {
        sum = g[place(k) * c.d];
    } else {
        const float *const in = c.inputs + (step - 1) * size + first + place(k);
        for (int r = 0; r < c.reach; ++r) sum += in[r * c.d] * g[r * c.d];
    }
    c.out[((i * (c.d / b) + n) * b + (c.transposed ? column : k)) * b + (c.transposed ? k : column)] = sum;
}

int check(const char *what, int64_t d, int64_t b, int64_t m) {
    if (b < 1 || b > PK_REACH || m < 1 || m > 16 || b << (m - 1) > PK_REACH || d % (b << (m - 1)) || (m > 1 && b % 2))
        return pk_fail(PK_ERR_ARGUMENT, "%s: no %lld factors of blocks of %lld in %lld features", what,
                       static_cast<long long>(m), static_cast<long long>(b), static_cast<long long>(d));
    return PK_OK;
}
} // namespace

extern "C" int pk_cuda_butterfly_rotate(const void *x, const float *blocks, int64_t dtype, int64_t M, int64_t d,
                                        int64_t b, int64_t m, int64_t shared, int64_t transposed, int64_t every,
                                        void *y, int64_t device, void *stream) {
    const char *const what = "butterfly_rotate";
    if (int code = pk_rotation_check(what, dtype, M, d)) return code;
    if (int code = check(what, d, b, m)) return code;
    if (M == 0 || d == 0) return PK_OK;
    if (!blocks || !y) return pk_fail(PK_ERR_ARGUMENT, "%s: a pointer is NULL", what);
    if (!x && (dtype != PK_F32 || M != b << (m - 1)))
        return pk_fail(PK_ERR_ARGUMENT, "%s: identities have %lld rows of float32", what,
                       static_cast<long long>(b << (m - 1)));
    if (int code = pk_cuda_use(device, what)) return code;
    Turn c = {x, blocks, y, M, d, static_cast<int>(b), static_cast<int>(m), 0, shared != 0, transposed != 0,
              every != 0, false};
    const int64_t reach = b << (m - 1), wide = reach > 64 ? reach : 64 / reach * reach;
    c.columns = static_cast<int>(wide < d ? wide : d);
    const uintptr_t quad = 4 * static_cast<uintptr_t>(pk_bytes(dtype));
    c.fast = x && d % 4 == 0 && c.columns % 4 == 0 && pk_aligned(x, quad) && pk_aligned(y, quad);
    const int64_t across = pk_ceil(d, c.columns), tall = pk_ceil(M, 32), most = pk_ceil(4 * PK_BLOCKS, across);
    if (across > 65535) return pk_fail(PK_ERR_ARGUMENT, "%s: too many features, %lld", what, static_cast<long long>(d));
    const dim3 grid(pk_grid(tall, most), static_cast<unsigned>(across));
    const size_t bytes = 2 * static_cast<size_t>(c.columns) * LINE * 4;
    const int vector = b % 4 == 0 && pk_aligned(blocks, 16) ? 4 : b % 2 == 0 && pk_aligned(blocks, 8) ? 2 : 1;
    pk_by_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        const auto kernel = vector == 4 ? turn_kernel<T, 4> : vector == 2 ? turn_kernel<T, 2> : turn_kernel<T, 1>;
        PK_LAUNCH_SHARED(kernel, grid, THREADS, bytes, static_cast<cudaStream_t>(stream), c);
    });
    return pk_cuda_check(cudaGetLastError(), what);
}

extern "C" int pk_cuda_butterfly_gradient(const float *inputs, const float *gradients, const float *last, int64_t d,
                                          int64_t b, int64_t m, int64_t transposed, float *dblocks, int64_t device,
                                          void *stream) {
    const char *const what = "butterfly_gradient";
    if (int code = pk_rotation_check(what, PK_F32, 0, d)) return code;
    if (int code = check(what, d, b, m)) return code;
    if (d == 0) return PK_OK;
    if (!inputs || !gradients || !last || !dblocks) return pk_fail(PK_ERR_ARGUMENT, "%s: a pointer is NULL", what);
    if (int code = pk_cuda_use(device, what)) return code;
    const Factors c = {inputs,
                       gradients,
                       last,
                       dblocks,
                       d,
                       static_cast<int>(b),
                       static_cast<int>(m),
                       static_cast<int>(b << (m - 1)),
                       transposed != 0};
    const dim3 grid(static_cast<unsigned>(pk_ceil(d * b, THREADS)), static_cast<unsigned>(m));
    PK_LAUNCH(factor_kernel, grid, THREADS, static_cast<cudaStream_t>(stream), c);
    return pk_cuda_check(cudaGetLastError(), what);
}
