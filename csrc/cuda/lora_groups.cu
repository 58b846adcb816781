/* Weights of integers by group as the kernels of lora_linear take them (groups.cuh): float32 scales, c, and the sums of
 * x over groups, in one launch for all projections of a call. Each call makes them anew: kept, they would take an
 * eighth of the codes' memory at 128 columns a group, and could be those of parts that have changed since. */
#include "groups.cuh"
#include "lora.cuh"

namespace {
constexpr int THREADS = 256, LANES = 4; /* LANES: of a sum */

struct Job { /* of one projection; NULL: not wanted */
    PkGroups parts;
    float *scales, *c;
    int64_t values;    /* of each */
    float *sums;       /* [M, K / size] */
    int64_t size, all; /* columns of a group; M * K / size */
};
struct Jobs {
    Job job[PK_STACK];
    const void *x;
    int x_dtype;
    bool fast; /* x is 16-byte aligned */
};

/* blockIdx.y: a projection's scales and c, or (odd) its sums. */
__global__ void __launch_bounds__(THREADS) groups_kernel(const __grid_constant__ Jobs jobs) {
    const Job &job = jobs.job[blockIdx.y / 2];
    const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (blockIdx.y % 2 == 0) {
        for (int64_t i = first; i < job.values; i += step) {
            const PkGroup group = pk_group(job.parts, i);
            if (job.scales) job.scales[i] = group.scale;
            if (job.c) job.c[i] = __fmaf_rn(group.scale, __fsub_rn(8.0f, group.zero), group.shift);
        }
        return;
    }
    /* lanes of a warp have the same number of rounds */
    for (int64_t at = first - threadIdx.x % 32; at < job.all * LANES; at += step) {
        const int64_t i = (at + threadIdx.x % 32) / LANES;
        float sum = 0.0f;
        for (int64_t k = 8 * (threadIdx.x % LANES); i < job.all && k < job.size; k += 8 * LANES) {
            float v[8];
            pk_load8_as(jobs.x, jobs.x_dtype, i * job.size + k, 8, jobs.fast, v);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum += v[j];
        }
#pragma unroll
        for (int d = LANES / 2; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
        if (threadIdx.x % LANES == 0 && i < job.all) job.sums[i] = sum;
    }
}

int64_t padded(int64_t floats) { return (floats + 3) / 4 * 4; }

/* Room for what is made, taken from `room` in turn: args come to point there. Returns its bytes. */
int64_t lay_out(pk_lora_args *args, int count, float *room, bool backward, Jobs &jobs) {
    int64_t floats = 0;
    const auto take = [&](int64_t wanted) {
        float *const at = room ? room + floats : nullptr;
        floats += padded(wanted);
        return at;
    };
    for (int i = 0; i < count; ++i) {
        pk_lora_args &a = args[i];
        if (a.quant_type != PK_INT4) continue;
        Job &job = jobs.job[i];
        const int64_t groups = a.K / a.blocksize;
        job.parts = pk_groups_of(a);
        const bool beside = a.nested_absmax || a.offset, narrow = a.w_dtype != PK_F32;
        if (narrow || beside) job.values = a.N * groups;
        if (narrow) job.scales = take(job.values), a.absmax = job.scales;
        if (beside) job.c = take(job.values);
        a.nested_absmax = job.c, a.offset = nullptr;
        if (!beside || backward) continue;
        int same = 0; /* a projection with groups as long has the same sums */
        while (same < i && jobs.job[same].size != a.blocksize) ++same;
        if (same == i) job.size = a.blocksize, job.all = a.M * groups, job.sums = take(job.all);
        a.offset = jobs.job[same].sums;
    }
    return floats * 4;
}
} // namespace

int64_t pk_lora_groups_bytes(const pk_lora_args *args, int count, bool backward) {
    Jobs jobs = {};
    pk_lora_args own[PK_STACK];
    for (int i = 0; i < count; ++i) own[i] = args[i];
    return lay_out(own, count, nullptr, backward, jobs);
}

int pk_lora_groups(pk_lora_args *args, int count, float *room, bool backward, cudaStream_t stream) {
    Jobs jobs = {};
    jobs.x = args->x, jobs.x_dtype = static_cast<int>(args->x_dtype), jobs.fast = pk_aligned(args->x, 16);
    if (lay_out(args, count, room, backward, jobs) == 0) return PK_OK;
    int64_t most = 0;
    for (const Job &job : jobs.job) {
        most = job.values > most ? job.values : most;
        most = job.all * LANES > most ? job.all * LANES : most;
    }
    if (most == 0) return PK_OK;
    const dim3 grid(pk_grid((most + THREADS - 1) / THREADS, 1024), static_cast<unsigned>(2 * count));
    PK_LAUNCH(groups_kernel, grid, THREADS, stream, jobs);
    return pk_cuda_check(cudaGetLastError(), "lora_linear");
}
