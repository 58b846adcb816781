/* R = (I + Q) (I - Q)^-1 of small blocks, or its truncated series, and the gradients. A thread has TILE x TILE elements
 * of a block; blocks that leave threads over share a block of threads.
 *
 * The exact form is 2 (I - Q)^-1 - I, inverted in place by Gauss and Jordan in double: for a skew-symmetric Q the
 * matrix I - Q has a positive symmetric part, so no pivots are needed. The matrix stays in registers; a step passes
 * its row and its column on through shared memory, which two steps use in turn, so that it takes one barrier. */
#include "rotate.cuh"

namespace {
constexpr int THREADS = 256, MOST = 64, WEIGHTS = 104; /* size of a block; terms of a series */

struct Call {
    const float *q, *r, *dr;
    float *out;
    int64_t blocks;
    int b, n; /* n: terms, 0 for the exact form */
    float weights[WEIGHTS];
};

/* Which elements of which block a thread has. The sides of a block are rounded up to whole tiles, and filled up with
 * zeros. */
template <int TILE> struct Place {
    int side, line, own, per, i0, j0; /* side: elements; line: from one row to the next in shared memory; per: blocks */
    int64_t block;
    bool live;
    __device__ __forceinline__ Place(const Call &c) {
        const int across = (c.b + TILE - 1) / TILE, group = across * across;
        side = across * TILE, line = side + 1, per = THREADS / group;
        own = threadIdx.x / group;
        i0 = threadIdx.x % group / across * TILE, j0 = threadIdx.x % across * TILE;
        block = int64_t(blockIdx.x) * per + own;
        live = own < per && block < c.blocks;
        own = own < per ? own : 0; /* what the others calculate goes nowhere */
    }
    __device__ __forceinline__ float *matrix(float *shared, int index) const {
        return shared + (index * per + own) * side * line;
    }
};

/* visit(r, s, i, j) for the elements (i, j) of a thread's tile. */
template <int TILE, typename Visit> __device__ __forceinline__ void each(const Place<TILE> &p, Visit visit) {
#pragma unroll
    for (int r = 0; r < TILE; ++r)
#pragma unroll
        for (int s = 0; s < TILE; ++s) visit(r, s, p.i0 + r, p.j0 + s);
}

/* sums += A B; A^T and B^T where turned. */
template <bool TURN_A, bool TURN_B, int TILE>
__device__ __forceinline__ void multiply(const Place<TILE> &p, int b, const float *A, const float *B,
                                         float (&sums)[TILE][TILE]) {
#pragma unroll 2
    for (int k = 0; k < b; ++k) {
        float left[TILE], right[TILE];
#pragma unroll
        for (int i = 0; i < TILE; ++i) {
            left[i] = TURN_A ? A[k * p.line + p.i0 + i] : A[(p.i0 + i) * p.line + k];
            right[i] = TURN_B ? B[(p.j0 + i) * p.line + k] : B[k * p.line + p.j0 + i];
        }
#pragma unroll
        for (int i = 0; i < TILE; ++i)
#pragma unroll
            for (int j = 0; j < TILE; ++j) sums[i][j] += left[i] * right[j];
    }
}

template <int TILE>
__device__ __forceinline__ void load(const Place<TILE> &p, const Call &c, const float *from, float diagonal,
                                     float *to) {
    each(p, [&](int, int, int i, int j) {
        if (!p.live) return;
        const bool in = i < c.b && j < c.b;
        to[i * p.line + j] = (in ? from[(p.block * c.b + i) * c.b + j] : 0.0f) + (in && i == j ? diagonal : 0.0f);
    });
}
template <int TILE>
__device__ __forceinline__ void store(const Place<TILE> &p, const Call &c, float factor, const float (&v)[TILE][TILE]) {
    each(p, [&](int r, int s, int i, int j) {
        if (p.live && i < c.b && j < c.b) c.out[(p.block * c.b + i) * c.b + j] = factor * v[r][s];
    });
}
/* v, and w on the diagonal, for all to see. */
template <int TILE>
__device__ __forceinline__ void keep(const Place<TILE> &p, const float (&v)[TILE][TILE], float *to) {
    each(p, [&](int r, int s, int i, int j) {
        if (p.live) to[i * p.line + j] = v[r][s];
    });
}
template <int TILE> __device__ __forceinline__ void diagonal(const Place<TILE> &p, float w, float (&v)[TILE][TILE]) {
    each(p, [&](int r, int s, int i, int j) { v[r][s] = i == j ? w : 0.0f; });
}

template <int TILE> __global__ void __launch_bounds__(THREADS) cayley_exact_kernel(const __grid_constant__ Call c) {
    PK_DYNAMIC_SHARED(double, lines); /* [step % 2][block][row, column][side] */
    const Place<TILE> p(c);
    double a[TILE][TILE];
    each(p, [&](int r, int s, int i, int j) {
        const bool in = p.live && i < c.b && j < c.b;
        a[r][s] = (i == j ? 1.0 : 0.0) - (in ? static_cast<double>(c.q[(p.block * c.b + i) * c.b + j]) : 0.0);
    });
    for (int step = 0; step < c.b; ++step) {
        double *const row = lines + (step % 2 * p.per + p.own) * 2 * p.side, *const column = row + p.side;
        each(p, [&](int r, int s, int i, int j) {
            if (p.live && i == step) row[j] = a[r][s];
            if (p.live && j == step) column[i] = a[r][s];
        });
        __syncthreads();
        if (!p.live) continue;
        const double inverse = 1.0 / row[step];
        each(p, [&](int r, int s, int i, int j) {
            const double scaled = row[j] * inverse;
            if (i == step)
                a[r][s] = j == step ? inverse : scaled;
            else
                a[r][s] = j == step ? -column[i] * inverse : a[r][s] - column[i] * scaled;
        });
    }
    float out[TILE][TILE];
    each(p, [&](int r, int s, int i, int j) { out[r][s] = static_cast<float>(2.0 * a[r][s] - (i == j ? 1.0 : 0.0)); });
    store(p, c, 1.0f, out);
}

/* By Horner: P_k = w_k I + Q P_{k + 1}. */
template <int TILE> __global__ void __launch_bounds__(THREADS) cayley_series_kernel(const __grid_constant__ Call c) {
    PK_DYNAMIC_SHARED(float, shared);
    const Place<TILE> p(c);
    float *const q = p.matrix(shared, 0), *const power = p.matrix(shared, 1), sums[TILE][TILE];
    load(p, c, c.q, 0.0f, q);
    diagonal(p, c.weights[c.n - 1], sums);
    for (int k = c.n - 2; k >= 0; --k) {
        keep(p, sums, power);
        __syncthreads();
        diagonal(p, c.weights[k], sums);
        if (p.live) multiply<false, false>(p, c.b, q, power, sums);
        __syncthreads();
    }
    store(p, c, 1.0f, sums);
}

/* Exact: dQ = S^T dR S^T / 2 with S = R + I. Series: dQ is the sum of (Q^T)^k dR P_{k + 1}^T, by Horner as well,
 * from the last term on, so that each power is at hand when it is needed: D = dR P^T + Q^T D, then P = w I + Q P. */
template <int TILE> __global__ void __launch_bounds__(THREADS) cayley_backward_kernel(const __grid_constant__ Call c) {
    PK_DYNAMIC_SHARED(float, shared);
    const Place<TILE> p(c);
    float *const left = p.matrix(shared, 0), *const dr = p.matrix(shared, 1), sums[TILE][TILE] = {};
    load(p, c, c.n ? c.q : c.r, c.n ? 0.0f : 1.0f, left);
    load(p, c, c.dr, 0.0f, dr);
    if (c.n) {
        float *const power = p.matrix(shared, 2), *const done = p.matrix(shared, 3), next[TILE][TILE];
        diagonal(p, c.weights[c.n - 1], next);
        for (int k = c.n - 2; k >= 0; --k) {
            keep(p, next, power), keep(p, sums, done);
            __syncthreads();
            diagonal(p, 0.0f, sums), diagonal(p, c.weights[k], next);
            if (p.live) {
                multiply<false, true>(p, c.b, dr, power, sums);
                multiply<true, false>(p, c.b, left, done, sums);
                multiply<false, false>(p, c.b, left, power, next);
            }
            __syncthreads();
        }
        store(p, c, 1.0f, sums);
    } else {
        __syncthreads();
        if (p.live) multiply<true, false>(p, c.b, left, dr, sums);
        __syncthreads();
        keep(p, sums, dr);
        __syncthreads();
        diagonal(p, 0.0f, sums);
        if (p.live) multiply<false, true>(p, c.b, dr, left, sums);
        store(p, c, 0.5f, sums);
    }
}

int launch(const char *what, Call c, int64_t b, const float *weights, int64_t n, bool backward, int64_t device,
           void *stream) {
    if (c.blocks < 0 || b < 1 || b > MOST)
        return pk_fail(PK_ERR_ARGUMENT, "%s: blocks must be of 1 to %d, got %lld", what, MOST,
                       static_cast<long long>(b));
    if (n < 0 || n > WEIGHTS || (n > 0 && !weights))
        return pk_fail(PK_ERR_ARGUMENT, "%s: a series has at most %d weights, got %lld", what, WEIGHTS,
                       static_cast<long long>(n));
    if (c.blocks == 0) return PK_OK;
    if (!c.q || !c.out || (backward && (!c.r || !c.dr))) return pk_fail(PK_ERR_ARGUMENT, "%s: a pointer is NULL", what);
    if (int code = pk_cuda_use(device, what)) return code;
    c.b = static_cast<int>(b), c.n = static_cast<int>(n);
    for (int64_t k = 0; k < n; ++k) c.weights[k] = weights[k];
    const int tile = b <= 16 ? 1 : b <= 32 ? 2 : 4,
              across = static_cast<int>(pk_ceil(b, tile)), per = THREADS / (across * across);
    const size_t side = static_cast<size_t>(across * tile), matrix = per * side * (side + 1) * 4;
    const unsigned grid = static_cast<unsigned>(pk_ceil(c.blocks, per));
    const auto go = [&](auto kernel, size_t bytes) {
        PK_LAUNCH_SHARED(kernel, grid, THREADS, bytes, static_cast<cudaStream_t>(stream), c);
    };
    const auto pick = [&](auto one, auto two, auto four, size_t bytes) {
        go(tile == 1 ? one : tile == 2 ? two : four, bytes);
    };
    if (backward)
        pick(cayley_backward_kernel<1>, cayley_backward_kernel<2>, cayley_backward_kernel<4>, (n ? 4 : 2) * matrix);
    else if (n)
        pick(cayley_series_kernel<1>, cayley_series_kernel<2>, cayley_series_kernel<4>, 2 * matrix);
    else
        pick(cayley_exact_kernel<1>, cayley_exact_kernel<2>, cayley_exact_kernel<4>, per * 4 * side * 8);
    return pk_cuda_check(cudaGetLastError(), what);
}
} // namespace

extern "C" int pk_cuda_cayley(const float *q, int64_t blocks, int64_t b, const float *weights, int64_t n, float *r,
                              int64_t device, void *stream) {
    return launch("cayley", {q, nullptr, nullptr, r, blocks, 0, 0, {}}, b, weights, n, false, device, stream);
}

extern "C" int pk_cuda_cayley_backward(const float *q, const float *r, const float *dr, int64_t blocks, int64_t b,
                                       const float *weights, int64_t n, float *dq, int64_t device, void *stream) {
    return launch("cayley_backward", {q, r, dr, dq, blocks, 0, 0, {}}, b, weights, n, true, device, stream);
}
