/* Rows of x grouped by adapter (multi_lora_linear): which adapter a row has, and which rows share it. Nothing is
 * sorted: the block of a row looks through all of them, and those of equal rows agree on one that works for a set of
 * them. So the grid, one block a row, does not depend on values, and a row's sums do not on its neighbours. */
#pragma once
#include "common.cuh"

struct PkRoutes {
    const int64_t *adapters; /* NULL: one adapter for all rows */
    const int64_t *starts, *ranks;
    const float *scalings;
    int64_t S, P;
    int max_rank;
};
inline PkRoutes pk_routes_of(const pk_lora_args &a) {
    return {a.adapters, a.starts, a.ranks, a.scalings, a.S, a.P, static_cast<int>(a.max_rank)};
}

/* An adapter's part of the stack. rank 0: the base alone, as for whatever does not exist. */
struct PkRoute {
    int64_t start;
    int rank;
    float scaling;
};
/* Of row m: its adapter, -1 where there is none. */
__device__ __forceinline__ int64_t pk_adapter(const PkRoutes &routes, int m) {
    const int64_t i = __ldg(routes.adapters + m);
    return i >= 0 && i < routes.S ? i : -1;
}
__device__ __forceinline__ PkRoute pk_route(const PkRoutes &routes, int64_t adapter) {
    if (adapter < 0) return {0, 0, 0.0f};
    const int64_t start = __ldg(routes.starts + adapter), rank = __ldg(routes.ranks + adapter);
    if (rank <= 0 || rank > routes.max_rank || start < 0 || start > routes.P - rank) return {0, 0, 0.0f};
    return {start, static_cast<int>(rank), __ldg(routes.scalings + adapter)};
}

/* Which of M rows, PK_ROUTED_ROWS at most, have `adapter`: bit m % 32 of same[m / 32], in shared memory. For all
 * THREADS threads of a block together; ends with a barrier. */
constexpr int PK_ROUTED_ROWS = 512;
template <int THREADS>
__device__ __forceinline__ void pk_same(const PkRoutes &routes, int M, int64_t adapter, uint32_t *same) {
    for (int first = 0; first < M; first += THREADS) {
        const int m = first + static_cast<int>(threadIdx.x);
        const uint32_t bits = __ballot_sync(0xffffffffu, m < M && pk_adapter(routes, m) == adapter);
        if (threadIdx.x % 32 == 0 && m < M) same[m / 32] = bits;
    }
    __syncthreads();
}

/* How many of them come before row `own`. */
__device__ __forceinline__ int pk_before(const uint32_t *same, int own) {
    int before = __popc(same[own / 32] & ((1u << own % 32) - 1u));
    for (int i = 0; i < own / 32; ++i) before += __popc(same[i]);
    return before;
}

/* They are worked on COUNT at a time. rows: of the set that begins with row `own`, M for those that it lacks; false
 * where no set begins there. */
template <int COUNT>
__device__ __forceinline__ bool pk_set_of(const uint32_t *same, int M, int own, int (&rows)[COUNT]) {
    if (pk_before(same, own) % COUNT) return false;
    int word = own / 32;
    uint32_t bits = same[word] >> own % 32 << own % 32;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        while (!bits && 32 * (word + 1) < M) bits = same[++word];
        rows[i] = bits ? 32 * word + __ffs(static_cast<int>(bits)) - 1 : M;
        bits &= bits - 1;
    }
    return true;
}
