/* Pairs of features turned and scaled, and the gradients: bound by memory, so every row is read once. A lane has V
 * neighbouring pairs, the warps of a block take rows in turn, and the factors of the pairs stay in registers. */
#include "rotate.cuh"

namespace {
constexpr int WARPS = 8, THREADS = 32 * WARPS;

struct Call {
    const void *z; /* what is turned: x, or dy */
    const void *x; /* SUMS */
    const float *first, *second;
    void *y;     /* may be NULL with SUMS */
    float *sums; /* [blocks of rows][2][d] */
    int64_t M, d, half, rows; /* rows of a block */
    bool back;
};

/* y_a = a first_a - b second_a, y_b = b first_b + a second_b; back: the transpose. SUMS: of dy times x and of dy
 * times x turned as well. V = 4: half is a multiple of 4, storage aligned to four elements. */
template <typename T, int V, bool SUMS>
__global__ void __launch_bounds__(THREADS) pair_kernel(const __grid_constant__ Call c) {
    __shared__ float shared[SUMS ? WARPS * 4 * V * 32 : 1];
    constexpr int AHEAD = SUMS ? 2 : 4; /* rows asked for at once */
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto place = [&](int l, int v) { /* of the first feature of a pair */
        const int64_t pair = (int64_t(blockIdx.y) * 32 + l) * V + v;
        return pair / c.half * (2 * c.half) + pair % c.half;
    };
    const bool live = (int64_t(blockIdx.y) * 32 + lane) * V < c.d / 2;
    const int64_t at = live ? place(lane, 0) : 0;
    const int64_t first = int64_t(blockIdx.x) * c.rows, last = min(c.M, first + c.rows);
    const auto load = [&](const auto *p, float *v) {
        if constexpr (V == 4)
            pk_load4(p, V, true, v);
        else
            v[0] = pk_float(*p);
    };
    float scale_a[V] = {}, scale_b[V] = {}, from_b[V] = {}, from_a[V] = {};
    if (live && c.y) {
        load(c.first + at, scale_a), load(c.first + at + c.half, scale_b);
        load(c.second + (c.back ? at + c.half : at), from_b), load(c.second + (c.back ? at : at + c.half), from_a);
        const float sign = c.back ? 1.0f : -1.0f;
#pragma unroll
        for (int v = 0; v < V; ++v) from_b[v] *= sign, from_a[v] *= -sign;
    }
    float sums[4 * V] = {};
    if (live) {
        const T *const z = static_cast<const T *>(c.z) + at, *const x = static_cast<const T *>(c.x) + at;
        for (int64_t m0 = first + warp; m0 < last; m0 += AHEAD * WARPS) {
            float a[AHEAD][V], b[AHEAD][V], xa[SUMS ? AHEAD : 1][V], xb[SUMS ? AHEAD : 1][V];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const int64_t m = min(m0 + i * WARPS, last - 1);
                load(z + m * c.d, a[i]), load(z + m * c.d + c.half, b[i]);
                if constexpr (SUMS) load(x + m * c.d, xa[i]), load(x + m * c.d + c.half, xb[i]);
            }
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                if (m0 + i * WARPS >= last) break;
                if constexpr (SUMS)
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                        sums[v] += a[i][v] * xa[i][v], sums[V + v] += b[i][v] * xb[i][v];
                        sums[2 * V + v] -= a[i][v] * xb[i][v], sums[3 * V + v] += b[i][v] * xa[i][v];
                    }
                if (!c.y) continue;
                float ya[V], yb[V];
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    ya[v] = a[i][v] * scale_a[v] + b[i][v] * from_b[v];
                    yb[v] = b[i][v] * scale_b[v] + a[i][v] * from_a[v];
                }
                T *const y = static_cast<T *>(c.y) + (m0 + i * WARPS) * c.d + at;
                if constexpr (V == 4)
                    pk_store4(y, V, true, ya), pk_store4(y + c.half, V, true, yb);
                else
                    *y = pk_rounded<T>(ya[0]), y[c.half] = pk_rounded<T>(yb[0]);
            }
        }
    }
    if constexpr (SUMS)
        pk_add_warps<WARPS>(sums, shared, [&](int i, int l, float sum) {
            if ((int64_t(blockIdx.y) * 32 + l) * V >= c.d / 2) return;
            const int kind = i / V; /* first at a, at b, second at a, at b */
            c.sums[(int64_t(blockIdx.x) * 2 + kind / 2) * c.d + place(l, i % V) + (kind % 2 ? c.half : 0)] = sum;
        });
}

int launch(const char *what, Call c, int64_t dtype, int64_t parts, int64_t device, void *stream) {
    if (int code = pk_rotation_check(what, dtype, c.M, c.d)) return code;
    if (c.half < 1 || c.d % (2 * c.half))
        return pk_fail(PK_ERR_ARGUMENT, "%s: no pairs %lld apart in %lld features", what,
                       static_cast<long long>(c.half), static_cast<long long>(c.d));
    if (c.d == 0 || (c.M == 0 && !c.sums)) return PK_OK;
    if (!c.first || !c.second || (c.M > 0 && !c.z)) return pk_fail(PK_ERR_ARGUMENT, "%s: a pointer is NULL", what);
    if (parts < 1 || parts > INT32_MAX)
        return pk_fail(PK_ERR_ARGUMENT, "%s: parts must be positive, got %lld", what, static_cast<long long>(parts));
    if (int code = pk_cuda_use(device, what)) return code;
    const auto aligned = [&](const void *p) { return pk_aligned(p, 4 * static_cast<uintptr_t>(pk_bytes(dtype))); };
    const bool fast = c.half % 4 == 0 && aligned(c.z) && aligned(c.x) && aligned(c.y) && pk_aligned(c.first, 16) &&
                      pk_aligned(c.second, 16);
    c.rows = pk_ceil(c.M, parts);
    const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(pk_ceil(c.d / 2, fast ? 128 : 32)));
    if (grid.y > 65535)
        return pk_fail(PK_ERR_ARGUMENT, "%s: too many features, %lld", what, static_cast<long long>(c.d));
    pk_by_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        const auto kernel = c.sums ? (fast ? pair_kernel<T, 4, true> : pair_kernel<T, 1, true>)
                                   : (fast ? pair_kernel<T, 4, false> : pair_kernel<T, 1, false>);
        PK_LAUNCH(kernel, grid, THREADS, static_cast<cudaStream_t>(stream), c);
    });
    return pk_cuda_check(cudaGetLastError(), what);
}
int64_t parts_of(int64_t M) { return M > 32 ? pk_ceil(M, 32) : 1; } /* of what needs no sums */
} // namespace

extern "C" int pk_cuda_pair_rotate(const void *x, const float *first, const float *second, int64_t dtype, int64_t M,
                                   int64_t d, int64_t half, void *y, int64_t device, void *stream) {
    if (M > 0 && d > 0 && !y) return pk_fail(PK_ERR_ARGUMENT, "pair_rotate: y is NULL");
    return launch("pair_rotate", {x, nullptr, first, second, y, nullptr, M, d, half, 0, false}, dtype, parts_of(M),
                  device, stream);
}

extern "C" int pk_cuda_pair_rotate_backward(const void *dy, const void *x, const float *first, const float *second,
                                            int64_t dtype, int64_t M, int64_t d, int64_t half, void *dx, float *sums,
                                            int64_t parts, int64_t device, void *stream) {
    if (!dx && !sums) return PK_OK;
    if (sums && M > 0 && d > 0 && !x) return pk_fail(PK_ERR_ARGUMENT, "pair_rotate_backward: x is NULL");
    return launch("pair_rotate_backward", {dy, x, first, second, dx, sums, M, d, half, 0, true}, dtype,
                  sums ? parts : parts_of(M), device, stream);
}
