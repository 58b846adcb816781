/* Kernels that each hold one bug, for tests/test_simt.py: with BUG what the stand-in of csrc/simt has to find, without it
 * the correct twin, which has to pass. They read `in` and write `out`, blocks of 64 threads unless said. */
#include "cuda/ptx.cuh"

#include <string.h>

namespace {
constexpr int N = 64, COUNTER = 12 * N - 1;

/* ---- races in shared and global memory -------------------------------------------------------------------------- */
template <bool BUG> __global__ void missing_barrier(const float *in, float *out) {
    __shared__ float tile[N];
    /* a function of the kernel's, beside its shared variable in the symbol table */
    const auto other = [](unsigned i) __attribute__((noinline)) { return (i + 33) % N; };
    tile[threadIdx.x] = in[threadIdx.x];
    if (!BUG) __syncthreads();
    out[threadIdx.x] = tile[other(threadIdx.x)];
}

/* the tile is written again while others may still read it */
template <bool BUG> __global__ void missing_second_barrier(const float *in, float *out) {
    __shared__ float tile[N];
    float sum = 0.0f;
    for (int round = 0; round < 2; ++round) {
        tile[threadIdx.x] = in[round * N + threadIdx.x];
        __syncthreads();
        sum += tile[N - 1 - threadIdx.x];
        if (!BUG) __syncthreads();
    }
    out[threadIdx.x] = sum;
}

template <bool BUG> __global__ void two_writers(const float *in, float *out) {
    __shared__ float sum[N];
    sum[BUG ? threadIdx.x / 2 : threadIdx.x] = in[0]; /* the same value: a race all the same */
    __syncthreads();
    out[threadIdx.x] = sum[BUG ? threadIdx.x / 2 : threadIdx.x];
}

/* bytes of one word: no race, though the words are shared; the bug overlaps them */
template <bool BUG> __global__ void bytes_of_a_word(const float *in, float *out) {
    __shared__ uint8_t code[N + 1];
    code[threadIdx.x] = static_cast<uint8_t>(in[threadIdx.x]);
    if (BUG) code[threadIdx.x + 1] = 0;
    __syncthreads();
    out[threadIdx.x] = code[threadIdx.x];
}

template <bool BUG> __global__ void missing_warp_barrier(const float *in, float *out) {
    __shared__ float tile[N];
    tile[threadIdx.x] = in[threadIdx.x];
    if (!BUG) __syncwarp();
    out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

/* a warp barrier orders nothing between warps */
template <bool BUG> __global__ void warp_barrier_for_a_block(const float *in, float *out) {
    __shared__ float tile[N];
    tile[threadIdx.x] = in[threadIdx.x];
    if (BUG)
        __syncwarp();
    else
        __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x ^ 32];
}

/* shuffles bring lanes together, and order no memory */
template <bool BUG> __global__ void shuffle_for_a_barrier(const float *in, float *out) {
    __shared__ float tile[N];
    tile[threadIdx.x] = in[threadIdx.x];
    const float v = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 2);
    if (!BUG) __syncwarp();
    out[threadIdx.x] = tile[threadIdx.x ^ 1] + v;
}

template <bool BUG> __global__ void half_a_warp(const float *in, float *out) {
    __shared__ float tile[N];
    tile[threadIdx.x] = in[threadIdx.x];
    const unsigned half = threadIdx.x % 32 / 16;
    __syncwarp(half ? 0xffff0000u : 0xffffu);
    out[threadIdx.x] = tile[BUG ? threadIdx.x ^ 16 : threadIdx.x ^ 8];
}

template <bool BUG> __global__ void atomic_and_plain(const float *in, float *out) {
    __shared__ int count;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    atomicAdd(&count, static_cast<int>(in[threadIdx.x]));
    if (!BUG) __syncthreads();
    out[threadIdx.x] = static_cast<float>(count);
}

/* two blocks */
template <bool BUG> __global__ void overlapping_blocks(const float *in, float *out) {
    if (!BUG || threadIdx.x < N - 1) out[blockIdx.x * (BUG ? N - 2 : N) + threadIdx.x] = in[threadIdx.x];
}
template <bool BUG> __global__ void in_place(const float *in, float *out) {
    out[blockIdx.x * N + threadIdx.x] = (BUG ? out : in)[(blockIdx.x * N + threadIdx.x + 1) % (2 * N)];
}

/* the last block to arrive sums what the others handed over; pk_planted has zeroed the counter. BEFORE, AFTER: who makes
 * a fence before and after the atomic of thread 0 */
enum Who { NOBODY, THE_ONE, EVERYBODY };
template <Who BEFORE, Who AFTER, bool BARRIER = true>
__device__ __forceinline__ void hand_over(const float *in, float *out, int &arrived) {
    out[(blockIdx.x + 1) * N + threadIdx.x] = in[blockIdx.x * N + threadIdx.x];
    if (BEFORE == EVERYBODY) __threadfence();
    if (BARRIER) __syncthreads();
    if (threadIdx.x == 0) {
        if (BEFORE == THE_ONE) __threadfence();
        arrived = atomicAdd(reinterpret_cast<int *>(out) + COUNTER, 1);
        if (AFTER == THE_ONE) __threadfence();
    }
    __syncthreads();
    if (arrived != static_cast<int>(gridDim.x) - 1) return;
    if (AFTER == EVERYBODY) __threadfence();
    float sum = 0.0f;
    for (unsigned block = 0; block < gridDim.x; ++block) sum += out[(block + 1) * N + N - 1 - threadIdx.x];
    out[threadIdx.x] = sum;
}
template <bool BUG> __global__ void handed_over_without_fence(const float *in, float *out) {
    __shared__ int arrived;
    hand_over<BUG ? NOBODY : THE_ONE, THE_ONE>(in, out, arrived);
}
template <bool BUG> __global__ void handed_over_before_the_barrier(const float *in, float *out) {
    __shared__ int arrived;
    hand_over<THE_ONE, THE_ONE, !BUG>(in, out, arrived);
}
/* each thread's fence, then a barrier, then the atomic: no release pattern of PTX */
template <bool BUG> __global__ void handed_over_by_fences_of_others(const float *in, float *out) {
    __shared__ int arrived;
    hand_over<BUG ? EVERYBODY : THE_ONE, THE_ONE>(in, out, arrived);
}
template <bool BUG> __global__ void handed_over_and_taken_without_fence(const float *in, float *out) {
    __shared__ int arrived;
    hand_over<THE_ONE, BUG ? NOBODY : THE_ONE>(in, out, arrived);
}
template <bool BUG> __global__ void handed_over_and_taken_by_fences_of_others(const float *in, float *out) {
    __shared__ int arrived;
    hand_over<THE_ONE, BUG ? EVERYBODY : THE_ONE>(in, out, arrived);
}

template <bool BUG> __global__ void unwritten_shared(const float *in, float *out) {
    __shared__ float tile[N];
    if (!BUG || threadIdx.x != 5) tile[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = tile[N - 1 - threadIdx.x];
}

/* ---- barriers and warps ------------------------------------------------------------------------------------------ */
template <bool BUG> __global__ void divergent_barrier(const float *in, float *out) {
    if (BUG && threadIdx.x >= 32) {
        out[threadIdx.x] = in[threadIdx.x];
        __syncthreads();
        return;
    }
    __syncthreads();
    out[threadIdx.x] = in[threadIdx.x];
}

/* a thread that has returned is not waited for; one that waits elsewhere is */
template <bool BUG> __global__ void missed_barrier(const float *in, float *out) {
    out[threadIdx.x] = in[threadIdx.x];
    if (threadIdx.x < 40) {
        if (BUG && threadIdx.x >= 32) __syncwarp();
        return;
    }
    __syncthreads();
}

template <bool BUG> __global__ void missing_lane(const float *in, float *out) {
    float v = in[threadIdx.x];
    if (!BUG || threadIdx.x != 7) v = __shfl_xor_sync(0xffffffffu, v, 1);
    __syncthreads();
    out[threadIdx.x] = v;
}

template <bool BUG> __global__ void returned_lane(const float *in, float *out) {
    out[threadIdx.x] = in[threadIdx.x];
    if (threadIdx.x % 32 >= 30) return; /* xor 2 of lanes 28 and 29: they read from those who are gone */
    if (BUG || threadIdx.x % 32 < 28) out[threadIdx.x] = __shfl_xor_sync(BUG ? ~0u : 0x0fffffffu, in[threadIdx.x], 2);
}

template <bool BUG> __global__ void not_in_the_mask(const float *in, float *out) {
    out[threadIdx.x] = static_cast<float>(__ballot_sync(BUG ? 0x7fffffffu : ~0u, in[threadIdx.x] > 8.0f) & 0xffffu);
}

template <bool BUG> __global__ void two_masks(const float *in, float *out) {
    const unsigned mask = BUG && threadIdx.x % 2 ? 0xffffffffu : (threadIdx.x % 2 ? 0xaaaaaaaau : 0x55555555u);
    const float v = __shfl_xor_sync(mask, in[threadIdx.x], 2);
    __syncthreads();
    out[threadIdx.x] = v;
}

/* ---- cp.async ---------------------------------------------------------------------------------------------------- */
template <bool BUG> __global__ void async_not_waited(const float *in, float *out) {
    __shared__ __align__(16) float tile[4 * N];
    pk_cp_async16(tile + 4 * threadIdx.x, in + 4 * threadIdx.x, threadIdx.x % 2 == 0);
    pk_cp_async_commit();
    if (!BUG) pk_cp_async_wait<0>();
    __syncthreads();
    for (int k = 0; k < 4; ++k) out[k * N + threadIdx.x] = tile[k * N + threadIdx.x];
}

template <bool BUG> __global__ void async_waits_for_too_few(const float *in, float *out) {
    PK_DYNAMIC_SHARED(float, tile);
    for (int stage = 0; stage < 3; ++stage) {
        pk_cp_async16(tile + 4 * (stage * N + threadIdx.x), in + 4 * (stage * N + threadIdx.x), true);
        pk_cp_async_commit();
    }
    pk_cp_async_wait<BUG ? 2 : 1>(); /* the first two stages are read */
    __syncthreads();
    for (int k = 0; k < 8; ++k) out[k * N + threadIdx.x] = tile[k * N + threadIdx.x];
}

template <bool BUG> __global__ void async_not_committed(const float *in, float *out) {
    __shared__ __align__(16) float tile[4 * N];
    pk_cp_async16(tile + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
    if (!BUG) pk_cp_async_commit();
    pk_cp_async_wait<0>();
    __syncthreads();
    out[threadIdx.x] = tile[4 * (N - 1 - threadIdx.x)];
}

/* waited for, but only the thread that waited may read without a barrier */
template <bool BUG> __global__ void async_without_barrier(const float *in, float *out) {
    __shared__ __align__(16) float tile[4 * N];
    pk_cp_async16(tile + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
    pk_cp_async_commit();
    pk_cp_async_wait<0>();
    out[threadIdx.x] = tile[BUG ? threadIdx.x : 4 * threadIdx.x];
}

/* a buffer of the pipeline is filled again while others read it */
template <bool BUG> __global__ void async_reuses_too_early(const float *in, float *out) {
    __shared__ __align__(16) float tile[2][4 * N];
    float sum = 0.0f;
    pk_cp_async16(tile[0] + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
    pk_cp_async_commit();
    for (int k = 0; k < 3; ++k) {
        pk_cp_async_wait<0>();
        __syncthreads();
        if (k < 2)
            pk_cp_async16(tile[(BUG ? 0 : k + 1) % 2] + 4 * threadIdx.x, in + 4 * ((k + 1) * N + threadIdx.x), true);
        pk_cp_async_commit();
        sum += tile[BUG ? 0 : k % 2][4 * (N - 1 - threadIdx.x)];
    }
    out[threadIdx.x] = sum;
}

template <bool BUG> __global__ void async_misaligned(const float *in, float *out) {
    __shared__ __align__(16) float tile[4 * N + 4];
    pk_cp_async16(tile + 4 * threadIdx.x + (BUG ? 1 : 0), in + 4 * threadIdx.x, true);
    pk_cp_async_commit();
    pk_cp_async_wait<0>();
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x + (BUG ? 1 : 0)];
}

/* ---- addresses --------------------------------------------------------------------------------------------------- */
template <bool BUG> __global__ void global_read_overrun(const float *in, float *out) {
    out[threadIdx.x] = in[threadIdx.x + (BUG ? 12 * N - 1 : 0)]; /* `in` has 12 N elements */
}
template <bool BUG> __global__ void global_write_overrun(const float *in, float *out) {
    out[threadIdx.x + (BUG ? 12 * N - 1 : 0)] = in[threadIdx.x];
}
template <bool BUG> __global__ void async_read_overrun(const float *in, float *out) {
    __shared__ __align__(16) float tile[4 * N];
    /* without the bug the address of thread 63 is as far out, and not read */
    pk_cp_async16(tile + 4 * threadIdx.x, in + 8 * N + 4 * (threadIdx.x + 1), BUG || threadIdx.x < N - 1);
    pk_cp_async_commit();
    pk_cp_async_wait<0>();
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x];
}
template <bool BUG> __global__ void shared_overrun(const float *in, float *out) {
    __shared__ float tile[N], other[N];
    other[threadIdx.x] = in[threadIdx.x];
    tile[threadIdx.x + (BUG ? 1 : 0)] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = tile[N - 1 - threadIdx.x] + other[N - 1 - threadIdx.x];
}
template <bool BUG> __global__ void dynamic_shared_overrun(const float *in, float *out) { /* 12 N floats */
    PK_DYNAMIC_SHARED(float, tile);
    float *mine = tile + 11 * N + (BUG ? 1 : 0) + threadIdx.x;
    *mine = in[threadIdx.x];
    out[threadIdx.x] = *mine;
}
template <bool BUG> __global__ void misaligned_vector(const float *in, float *out) {
    const float4 *v = reinterpret_cast<const float4 *>(in + 4 * threadIdx.x + (BUG ? 2 : 0));
    out[threadIdx.x] = v->x + v->y + v->z + v->w;
}

/* ---- order ------------------------------------------------------------------------------------------------------- */
template <bool BUG> __global__ void order_dependent(const float *in, float *out) {
    __shared__ int next;
    if (threadIdx.x == 0) next = 0;
    __syncthreads();
    const int ticket = atomicAdd(&next, 1); /* no race, and whoever comes first gets the first place */
    out[BUG ? ticket : threadIdx.x] = in[threadIdx.x];
}

/* ---- launches that overlap: each after launched_before, of two blocks as well, from sm_90 on ---------------------- */
constexpr int WRITTEN = 4 * N, SEEN = 6 * N, READ = 8 * N; /* by launched_before */
__global__ void launched_before(const float *in, float *out) {
    const unsigned i = blockIdx.x * N + threadIdx.x;
    out[WRITTEN + i] = in[i];
    out[SEEN + i] = out[READ + i] == 7.0f ? 1.0f : 0.0f;
}

template <bool BUG> __global__ void reads_before_the_wait(const float *, float *out) {
    if (!BUG) pk_wait_for_previous();
    const float *v = out + WRITTEN + N - 1 - threadIdx.x;
    const float sum = v[0] + v[N];
    if (BUG) pk_wait_for_previous();
    pk_release_next();
    out[blockIdx.x * N + threadIdx.x] = sum;
}

template <bool BUG> __global__ void writes_before_the_wait(const float *in, float *out) {
    const unsigned i = blockIdx.x * N + threadIdx.x;
    if (!BUG) pk_wait_for_previous();
    out[READ + i] = 7.0f;
    if (BUG) pk_wait_for_previous();
    out[i] = in[i];
}

template <bool BUG> __global__ void read_only_after_the_wait(const float *in, float *out) {
    const float before = __ldg(in + threadIdx.x); /* nobody writes it */
    pk_wait_for_previous();
    const float *v = out + WRITTEN + blockIdx.x * N + threadIdx.x;
    out[blockIdx.x * N + threadIdx.x] = before + (BUG ? __ldg(v) : *v);
}

template <bool BUG> __global__ void returns_without_waiting(const float *in, float *out) {
    out[blockIdx.x * N + threadIdx.x] = in[threadIdx.x];
    if (BUG && threadIdx.x == 5) return;
    pk_wait_for_previous();
}

template <bool BUG> __global__ void releases_before_it_waits(const float *in, float *out) {
    if (BUG) pk_release_next();
    pk_wait_for_previous();
    if (!BUG) pk_release_next();
    out[blockIdx.x * N + threadIdx.x] = in[threadIdx.x];
}

struct Case {
    const char *name;
    void (*kernel[2])(const float *, float *);
    unsigned blocks;
    bool after;
};
#define CASE(name, blocks) {#name, {name<false>, name<true>}, blocks, false}
#define AFTER(name, blocks) {#name, {name<false>, name<true>}, blocks, true}
const Case CASES[] = {
    CASE(missing_barrier, 1), CASE(missing_second_barrier, 1), CASE(two_writers, 1), CASE(bytes_of_a_word, 1),
    CASE(missing_warp_barrier, 1), CASE(warp_barrier_for_a_block, 1), CASE(shuffle_for_a_barrier, 1),
    CASE(half_a_warp, 1), CASE(atomic_and_plain, 1), CASE(overlapping_blocks, 2), CASE(in_place, 2),
    CASE(handed_over_without_fence, 4), CASE(handed_over_before_the_barrier, 4),
    CASE(handed_over_by_fences_of_others, 4), CASE(handed_over_and_taken_without_fence, 4),
    CASE(handed_over_and_taken_by_fences_of_others, 4), CASE(unwritten_shared, 1), CASE(divergent_barrier, 1),
    CASE(missed_barrier, 1), CASE(missing_lane, 1),
    CASE(returned_lane, 1), CASE(not_in_the_mask, 1), CASE(two_masks, 1), CASE(async_not_waited, 1),
    CASE(async_waits_for_too_few, 1), CASE(async_not_committed, 1), CASE(async_without_barrier, 1),
    CASE(async_reuses_too_early, 1), CASE(async_misaligned, 1), CASE(global_read_overrun, 1),
    CASE(global_write_overrun, 1), CASE(async_read_overrun, 1), CASE(shared_overrun, 1),
    CASE(dynamic_shared_overrun, 1), CASE(misaligned_vector, 1), CASE(order_dependent, 1),
    AFTER(reads_before_the_wait, 2), AFTER(writes_before_the_wait, 2), AFTER(read_only_after_the_wait, 2),
    AFTER(returns_without_waiting, 2), AFTER(releases_before_it_waits, 2),
};
} // namespace

/* in, out: 12 * 64 floats. */
extern "C" PK_EXPORT int pk_planted(const char *name, int bug, const float *in, float *out) {
    for (const Case &c : CASES) {
        if (strcmp(c.name, name)) continue;
        auto kernel = c.kernel[bug != 0];
        if (strstr(name, "handed_over")) cudaMemsetAsync(out + COUNTER, 0, sizeof *out, nullptr);
        if (c.after) PK_LAUNCH(launched_before, c.blocks, N, nullptr, in, out);
        PK_LAUNCH_AFTER(c.after, kernel, c.blocks, N, 12 * N * sizeof(float), nullptr, in, out);
        return pk_cuda_check(cudaGetLastError(), name);
    }
    return pk_fail(PK_ERR_ARGUMENT, "no kernel %s", name);
}
