/* The end of a tile of lora_mma.cu: its sums on their way to y, and the parts of sums that several blocks share.
 *
 * A part lies in memory as [BM / 4 quarters][threads of a K group] of float4, as its threads have it. It is added by
 * the last block of the tile to arrive or, where that would be much for one SM, by a kernel of its own on all SMs:
 * splits.cuh says which. Both add part after part, from zero, so the bits are the same whoever adds. */
#pragma once
#include "lora_mma_tile.cuh"

namespace mma {
/* Quarter q of the thread's sums: what it writes and reads as one float4. */
template <typename C> __device__ __forceinline__ float (&quarter(typename C::Sums &acc, int q))[4] {
    return acc[q / (C::BM / 8)][q % (C::BM / 8)];
}
__device__ __forceinline__ void add(float (&to)[4], float4 v) {
    to[0] += v.x, to[1] += v.y, to[2] += v.z, to[3] += v.w;
}
__device__ __forceinline__ float4 packed(const float (&v)[4]) { return make_float4(v[0], v[1], v[2], v[3]); }

/* A tile of y in shared memory: rows of BN, and 16 bytes between them. */
template <int BN> constexpr int ROW_BYTES = (BN + 8) * 2;

/* One quarter's 8 rows of y from `row` on, of columns `column` and 8 further, into shared memory. */
template <typename T, int BN>
__device__ __forceinline__ void place_rows(char *shared, const float (&v)[4], int row, int column, int t) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
        at<uint16_t>(shared, (row + 2 * t + j % 2) * ROW_BYTES<BN> + (column + j / 2 * 8) * 2) =
            static_cast<uint16_t>(pk_pack<T>(v[j], 0.0f));
}

/* From there to y, 16 bytes a thread where y's rows allow it. */
template <int BN>
__device__ __forceinline__ void store_rows(const Problem &p, uint16_t *y, char *shared, int rows, int n0, int m0) {
    const bool wide = p.N % 8 == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0;
    for (int c = static_cast<int>(threadIdx.x); c < rows * BN / 8; c += THREADS) {
        const int row = c / (BN / 8), n = c % (BN / 8) * 8;
        if (m0 + row >= p.M || n0 + n >= p.N) continue;
        uint16_t *to = y + static_cast<int64_t>(m0 + row) * p.N + n0 + n;
        if (wide) {
            *reinterpret_cast<uint4 *>(to) = at<uint4>(shared, row * ROW_BYTES<BN> + n * 2);
        } else {
            for (int k = 0; k < 8 && n0 + n + k < p.N; ++k)
                to[k] = at<uint16_t>(shared, row * ROW_BYTES<BN> + (n + k) * 2);
        }
    }
}

/* Hands over this part's sums; true in the last block of the tile to arrive, which gets the sum of all parts. Nobody is
 * the last where a kernel of its own adds. holds: the thread has sums; place: of the thread in its group. */
template <typename C>
__device__ __forceinline__ bool add_parts(const Problem &p, char *shared, typename C::Sums &acc, bool holds,
                                          int place) {
    constexpr int STEP = C::COLUMN_THREADS, PART = C::QUARTERS * STEP;
    const int tile = static_cast<int>(blockIdx.x), part = static_cast<int>(blockIdx.y);
    float4 *parts = p.partial + static_cast<int64_t>(tile) * p.split * PART + place;
    if (holds)
#pragma unroll
        for (int q = 0; q < C::QUARTERS; ++q) parts[part * PART + q * STEP] = packed(quarter<C>(acc, q));
    if (!p.arrived) return false;
    __syncthreads();
    if (threadIdx.x == 0) {
        /* Release and acquire, as PTX has them: a fence, an atomic and a fence of one thread. The barriers bring the
         * block's writes before the first and its reads behind the second; fences of the others would order nothing
         * against this thread's atomic. */
        __threadfence();
        at<unsigned>(shared, 0) = atomicAdd(p.arrived + tile, 1u);
        __threadfence();
    }
    __syncthreads();
    const bool last = at<unsigned>(shared, 0) + 1 == static_cast<unsigned>(p.split);
    __syncthreads(); /* the memory is used again */
    if (!last || !holds) return last;
#pragma unroll
    for (int q = 0; q < C::QUARTERS; ++q)
#pragma unroll
        for (int j = 0; j < 4; ++j) quarter<C>(acc, q)[j] = 0.0f;
    for (int from = 0; from < p.split; ++from)
#pragma unroll
        for (int q = 0; q < C::QUARTERS; ++q)
            add(quarter<C>(acc, q), pk_load_fresh16(parts + from * PART + q * STEP));
    return true;
}

/* y, and h, from the parts of a tile of BM rows and ADD_BN columns (blockIdx.x), 8 rows of it a block (blockIdx.y): of
 * each part a thread has one float4. Launched to begin when the kernel that writes the parts has ended. */
constexpr int ADD_BN = 128, ADD_THREADS = 128; /* of a tile with two K groups: the threads of one */
template <typename T>
__global__ void __launch_bounds__(THREADS) add_kernel(const __grid_constant__ Problem p, int BM) {
    __shared__ __align__(16) char shared[8 * ROW_BYTES<ADD_BN>];
    const int tile = static_cast<int>(blockIdx.x), mt = static_cast<int>(blockIdx.y);
    const int i = static_cast<int>(threadIdx.x) / ADD_THREADS, place = static_cast<int>(threadIdx.x) % ADD_THREADS;
    const int n0 = tile / p.m_tiles * ADD_BN, m0 = tile % p.m_tiles * BM + 8 * mt;
    if (m0 >= p.M) return;
    const int64_t part = BM / 4 * ADD_THREADS;
    const float4 *from = p.partial + tile * p.split * part + (i * (BM / 8) + mt) * ADD_THREADS + place;
    float v[4] = {};
#pragma unroll 4
    for (int k = 0; k < p.split; ++k) add(v, from[k * part]);

    const int column = place / 32 * 32 + place % 32 / 4 + 16 * i, n = n0 + column;
#pragma unroll 1
    for (uint16_t *to = p.h ? p.h : p.y;; to = p.y) { /* first h, where it is asked for, then y */
        if (to == p.y) {
            float bias[2] = {};
            if (p.bias) pk_load_column<2>(p.bias, p.bias_dtype, n, 8, n < p.N ? (p.N - n + 7) / 8 : 0, bias);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float gain = p.gain && n + j / 2 * 8 < p.N ? __ldg(p.gain + n + j / 2 * 8) : 1.0f;
                v[j] = v[j] * gain + bias[j / 2];
            }
        }
        place_rows<T, ADD_BN>(shared, v, 0, column, place % 4);
        __syncthreads();
        store_rows<ADD_BN>(p, to, shared, 8, n0, m0);
        if (to == p.y) break;
        __syncthreads(); /* the memory is used again */
    }
}
} // namespace mma
