/* The kernel of lora_mma.cu: its start, main loop and end. lora_mma_tile.cuh says how it is laid out. */
#pragma once
#include "lora_mma_parts.cuh"

namespace mma {
/* Elements column to column + 3 of one row of a [rows, r] matrix times `factor`, each as a sum of two bfloat16, 16 bits
 * of it, as one thread's part of fragments: {high 0, 1}, {high 2, 3}, {low 0, 1}, {low 2, 3}. */
__device__ __forceinline__ uint4 halves(const void *p, int dtype, int row, int rows, int column, int r, float factor) {
    float v[4];
    pk_load_column<4>(p, dtype, static_cast<int64_t>(row) * r + column, 1, row < rows ? r - column : 0, v);
    uint32_t high[2], low[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float first = __fmul_rn(v[2 * i], factor), second = __fmul_rn(v[2 * i + 1], factor);
        high[i] = pk_pack<__nv_bfloat16>(first, second);
        low[i] = pk_pack<__nv_bfloat16>(__fsub_rn(first, __uint_as_float(high[i] << 16)),
                                        __fsub_rn(second, __uint_as_float(high[i] & 0xffff0000u)));
    }
    return {high[0], high[1], low[0], low[1]};
}

struct Factors {
    const float *s;
    const void *b;
    int r, b_dtype;
    float scaling;
};

/* sums += scaling * s b^T of s [M, r] and b [N, r], in three products of the halves: float32 adapters lose nothing that
 * shows in a 16-bit y. s goes through `room` of shared memory as fragments, so that it is split once for all warps. */
template <typename C>
__device__ __forceinline__ void start(const Problem &p, const Factors &f, char *room, typename C::Sums &acc, int group,
                                      int n, int m0) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int r0 = 0; r0 < f.r; r0 += 16 * C::WK) { /* 16 for each group */
#pragma unroll 1
        for (int i = warp; i < C::BM / 8 * C::WK; i += THREADS / 32)
            at<uint4>(room, (i * 32 + lane) * 16) = halves(f.s, PK_F32, m0 + 8 * (i / C::WK) + g, p.M,
                                                           r0 + 16 * (i % C::WK) + 4 * t, f.r, f.scaling);
        uint32_t high[2][4], low[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint4 v = halves(f.b, f.b_dtype, n + 8 * i, p.N, r0 + 16 * group + 4 * t, f.r, 1.0f);
            high[i / 2][i % 2] = v.x, high[i / 2][i % 2 + 2] = v.y;
            low[i / 2][i % 2] = v.z, low[i / 2][i % 2 + 2] = v.w;
        }
        __syncthreads();
#pragma unroll
        for (int mt = 0; mt < C::BM / 8; ++mt) {
            const uint4 v = at<uint4>(room, ((mt * C::WK + group) * 32 + lane) * 16);
            const uint32_t h[2] = {v.x, v.y}, l[2] = {v.z, v.w};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                pk_mma_bf16(acc[i][mt], low[i], h);
                pk_mma_bf16(acc[i][mt], high[i], l);
                pk_mma_bf16(acc[i][mt], high[i], h);
            }
        }
        __syncthreads();
    }
}

/* sums += p.start. */
template <typename C>
__device__ __forceinline__ void start_from(const Problem &p, typename C::Sums &acc, int n, int m0) {
    const int m = m0 + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int mt = 0; mt < C::BM / 8; ++mt)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int row = m + 8 * mt + j;
            const float *from = p.start + static_cast<int64_t>(row) * p.N + n;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (row < p.M && n + 8 * i < p.N) acc[i / 2][mt][i % 2 * 2 + j] += from[8 * i];
        }
}

/* first, second += W x^T over 8 of a thread's elements, so 32 of k: fragments of two steps of 16, of two 16-row
 * parts of W, and 8 rows of x. */
template <typename T>
__device__ __forceinline__ void product(char *shared, float (&first)[4], float (&second)[4],
                                        const uint32_t (&fragments)[2][2][4], int x) {
    const uint4 v = at<uint4>(shared, x);
    const uint32_t b[2][2] = {{v.x, v.y}, {v.z, v.w}};
#pragma unroll
    for (int step = 0; step < 2; ++step)
        pk_mma<T>(first, fragments[step][0], b[step]), pk_mma<T>(second, fragments[step][1], b[step]);
}

/* acc += W x^T over one group of 64 elements, scaled as C says. codes: offset of the thread's own; x: of its own, in
 * each half of 32. */
template <typename T, typename C>
__device__ __forceinline__ void multiply_sums(char *shared, typename C::Sums &acc, int codes, const int (&x)[2],
                                              const float (&scale)[4], uint32_t copy) {
    uint32_t a[2][2][2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const Words words = at<Words>(shared, codes + i * (2 * LINE));
#pragma unroll
        for (int byte = 0; byte < 8; ++byte)
            a[byte / 4][byte / 2 % 2][i / 2][i % 2 + byte % 2 * 2] =
                look_up(shared, byte < 4 ? words.x : words.y, byte % 4, copy);
    }
#pragma unroll
    for (int mt = 0; mt < C::BM / 8; ++mt) {
        float part[2][4] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h) product<T>(shared, part[0], part[1], a[h], x[h] + mt * 1024);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) acc[i][mt][j] += scale[2 * i + j / 2] * part[i][j];
    }
}
template <typename T, typename C, typename S> /* S: uint32_t, a pair of 16-bit scales, or RunScale */
__device__ __forceinline__ void multiply_weights(char *shared, typename C::Sums &acc, int codes, const int (&x)[2],
                                         const S (&scale)[4], uint32_t copy) {
    Words words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = at<Words>(shared, codes + i * (2 * LINE));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        uint32_t a[2][2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int byte = 0; byte < 4; ++byte) {
                const uint32_t pair = look_up(shared, h ? words[i].y : words[i].x, byte, copy);
                uint32_t factor;
                if constexpr (C::GENERAL)
                    factor = pk_pack<T>(scale[i].of(8 * h + 2 * byte), scale[i].of(8 * h + 2 * byte + 1));
                else
                    factor = scale[i];
                a[byte / 2][i / 2][i % 2 + byte % 2 * 2] = pk_mul2<T>(pair, factor);
            }
#pragma unroll
        for (int mt = 0; mt < C::BM / 8; ++mt) product<T>(shared, acc[0][mt], acc[1][mt], a, x[h] + mt * 1024);
    }
}

/* y = gain * h + bias, from h; a gain that is absent is 1. n: the thread's first column of y. */
template <typename C>
__device__ __forceinline__ void finish(const Problem &p, typename C::Sums &acc, int n) {
    float bias[4] = {};
    if (p.bias) pk_load_column<4>(p.bias, p.bias_dtype, n, 8, n < p.N ? (p.N - n + 7) / 8 : 0, bias);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float gain = p.gain && n + 8 * i < p.N ? __ldg(p.gain + n + 8 * i) : 1.0f;
#pragma unroll
        for (int mt = 0; mt < C::BM / 8; ++mt)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float &v = acc[i / 2][mt][i % 2 * 2 + j];
                v = v * gain + bias[i];
            }
    }
}

/* The tile goes through shared memory to y. */
template <typename T, typename C>
__device__ __forceinline__ void store(const Problem &p, uint16_t *y, char *shared, typename C::Sums &acc, int n0,
                                      int m0, bool holds, int column, int t) {
    if (holds) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int mt = 0; mt < C::BM / 8; ++mt) place_rows<T, C::BN>(shared, acc[i][mt], 8 * mt, column + 16 * i, t);
    }
    __syncthreads();
    store_rows<C::BN>(p, y, shared, C::BM, n0, m0);
}

/* The sums of the second group of warps to the first. place: of the thread in its group. */
template <typename C>
__device__ __forceinline__ void add_groups(char *shared, typename C::Sums &acc, int group, int place) {
    constexpr int STEP = C::COLUMN_THREADS * 16;
    if (group == 1)
#pragma unroll
        for (int q = 0; q < C::QUARTERS; ++q) at<float4>(shared, q * STEP + place * 16) = packed(quarter<C>(acc, q));
    __syncthreads();
    if (group == 0)
#pragma unroll
        for (int q = 0; q < C::QUARTERS; ++q) add(quarter<C>(acc, q), at<float4>(shared, q * STEP + place * 16));
    __syncthreads();
}

/* The work of a thread. */
template <typename C> struct Place {
    int lane, g, t, warp, group, part, n0, m0, n; /* n and n + 8, + 16, + 24 are its columns of y */
    __device__ __forceinline__ Place(const Problem &p, unsigned tid, unsigned tile, unsigned part)
        : lane(tid % 32), g(lane / 4), t(lane % 4), warp(tid / 32 % (8 / C::WK)), group(tid / C::COLUMN_THREADS),
          part(part), n0(tile / p.m_tiles * C::BN), m0(tile % p.m_tiles * C::BM), n(n0 + warp * 32 + g) {}
};

/* Adds the low-rank term, or what stands for it, and what groups of integers have beside the sums. room: of shared
 * memory. */
template <typename C>
__device__ __forceinline__ void add_low_rank(const Problem &p, char *room, typename C::Sums &acc, const Place<C> &at) {
    if (at.part != 0) return;
#pragma unroll 1
    for (int i = p.beside.count ? 0 : 1; i < 2; ++i) /* one text for both */
        start<C>(p, i == 0 ? Factors{p.beside.sums, p.beside.c, p.beside.count, PK_F32, 1.0f}
                           : Factors{p.s, p.b, p.r, p.b_dtype, p.scaling}, room, acc, at.group, at.n, at.m0);
    if (p.start && at.group == 0) start_from<C>(p, acc, at.n, at.m0);
}

/* From the sums to y. */
template <typename T, typename C>
__device__ __forceinline__ void end_tile(const Problem &p, char *shared, typename C::Sums &acc, const Place<C> &at) {
    const int place = static_cast<int>(threadIdx.x) % C::COLUMN_THREADS, column = at.warp * 32 + at.g;
    const bool holds = at.group == 0;
    if constexpr (C::WK > 1) add_groups<C>(shared, acc, at.group, place);
    if (p.split > 1 && !add_parts<C>(p, shared, acc, holds, place)) return;
    /* first h, where it is asked for, then y: one text for both */
#pragma unroll 1
    for (uint16_t *to = p.h ? p.h : p.y;; to = p.y) {
        if (to == p.y && (p.gain || p.bias)) finish<C>(p, acc, at.n);
        store<T, C>(p, to, shared, acc, at.n0, at.m0, holds, column, at.t);
        if (to == p.y) break;
        __syncthreads(); /* the memory is used again */
    }
}

/* The projection of a block. */
template <typename C> __device__ __forceinline__ int which_of(const Stack &stack, unsigned block) {
    return C::FULL ? 0 : stack.blocks.of(block);
}

template <typename T, typename C>
__global__ void __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Stack stack) {
    PK_DYNAMIC_SHARED(char, shared);
#if defined(__CUDA_ARCH__)
    if constexpr (C::WHERE == LARGE && small_memory(__CUDA_ARCH__ / 10)) return __trap();
#endif
    const int tid = static_cast<int>(threadIdx.x), which = which_of<C>(stack, blockIdx.x);
    const Problem &p = stack.each[which];
    const Place<C> place(p, threadIdx.x, blockIdx.x - stack.blocks.first[which], blockIdx.y);
    if constexpr (C::GENERAL) pk_wait_for_previous(); /* x comes by plain loads, here and there */
    const int g = place.g, t = place.t, warp = place.warp, group = place.group, part = place.part, n0 = place.n0;
    const int all_steps = (p.K + C::BK - 1) / C::BK;
    const int begin = static_cast<int>(static_cast<int64_t>(all_steps) * part / p.split);
    const int steps = static_cast<int>(static_cast<int64_t>(all_steps) * (part + 1) / p.split) - begin;

    const int first = begin * C::BK, end = min(p.K, (begin + steps) * C::BK); /* of k */
    Loader<C> loader(p, n0, place.m0, first, end);
    for (int i = 0; i < C::STAGES - 1; ++i) {
        loader.load(p, shared, i, steps, n0, first);
        pk_cp_async_commit();
    }
    const float offset = pk_scale_offset(p.scales) * p.unscale;
    at<float>(shared, C::SCALE_CODE + 4 * tid) = pk_scale_code(p.scales, tid) * p.unscale;
    fill_table<T>(shared, p.table);
    ScaleLoader<C> scales(p, n0 + warp * 32, first + GROUP * group, end);
    if constexpr (!C::GENERAL)
#pragma unroll
        for (int i = 0; i < scales.AHEAD; ++i) scales.fetch(p, stack.each[0], i);

    typename C::Sums acc = {};
    const int codes =
        pk_fixed((group * (C::BN / 4) + warp * 8 + g / 4) * LINE + HOLE + (g % 4 ^ 2 * group) * 32 + t * 8);
    const int x = pk_fixed(C::X + (group * C::BM + g) * 128 + (2 * t ^ (g & 1) ^ 4 * group) * 16);
    const int x_halves[2] = {x, C::FULL ? x ^ 16 : pk_fixed(x ^ 16)};
    const uint32_t copy = static_cast<uint32_t>(pk_fixed(place.lane * 4));
    for (int left = steps; left > 0; left -= C::ROUND) {
#pragma unroll(C::GENERAL ? 1 : C::ROUND)
        for (int s = 0; s < C::ROUND; ++s) {
            if (s > 0 && left <= s) break;
            pk_cp_async_wait<C::STAGES - 2>();
            __syncthreads(); /* stage s is there, and nobody reads stage s - 1 any more */
            const int stage_x[2] = {x_halves[0] + s % C::STAGES * C::X_STAGE,
                                    x_halves[1] + s % C::STAGES * C::X_STAGE};
            const int stage_codes = codes + s % C::STAGES * (C::CODES * LINE), k0 = first + (steps - left) * C::BK;
            loader.load(p, shared, s + C::STAGES - 1, left, n0, k0);
            pk_cp_async_commit();
            std::conditional_t<C::GENERAL, RunScale, std::conditional_t<C::SCALING == SUMS, float, uint32_t>> scale[4];
            if constexpr (C::GENERAL) {
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    scale[j] = run_scale(p, &at<float>(shared, C::SCALE_CODE), offset, place.n + 8 * j,
                                         k0 + s * C::BK + GROUP * group + 16 * t);
            } else {
                scales.template take<T>(shared, offset, s, scale);
                scales.fetch(p, stack.each[0], s + scales.AHEAD);
            }
            if (s == C::ROUND - 1) loader.advance(), scales.advance();
            if constexpr (C::SCALING == SUMS)
                multiply_sums<T, C>(shared, acc, stage_codes, stage_x, scale, copy);
            else
                multiply_weights<T, C>(shared, acc, stage_codes, stage_x, scale, copy);
        }
    }
    pk_cp_async_wait<0>();
    __syncthreads();
    if constexpr (!C::GENERAL) pk_wait_for_previous(); /* here s begins to be there, and the counters */
    pk_release_next();
    /* known anew: the loop needs the registers */
    const int again = which_of<C>(stack, pk_block_again(0));
    const Problem &own = stack.each[again];
    const Place<C> at(own, pk_thread_again(), pk_block_again(0) - stack.blocks.first[again], pk_block_again(1));
    add_low_rank<C>(own, shared, acc, at);
    end_tile<T, C>(own, shared, acc, at);
}
} // namespace mma
