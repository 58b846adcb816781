/* lora_linear for at most 8 rows of x: bound by the bytes of W, so every byte is loaded once, 16 at a time, and looked
 * up once. A warp owns 32 rows of W and 128 columns a step. Lane (g, t) = (lane / 4, lane % 4) holds 32 neighbouring
 * codes, 16 bytes, of the rows g, g + 8, g + 16, g + 24. A byte's entry in the pair table is a word of two 16-bit
 * values, which is an operand of mma.sync as it is, whatever order the columns are in, as long as x's fragment has the
 * same one. So the tensor cores do what would be an unpacking and M multiply-adds for each element.
 *
 * 32 neighbouring elements that start at a multiple of 32 lie in one block of the format, also where blocks straddle
 * rows. For the sums to stay apart per block, x has two of the eight columns of B for each t: columns 2t and 2t + 1
 * hold two rows of x at the k of lanes t, and zeros at those of the others. The sums that lane (g, t) receives are then
 * those of its own 32 codes, and its own scale multiplies them: once per 32 elements. Where two (four) neighbouring t
 * always lie in one block they share four (eight) columns, for so many rows of x. Twice as many rows take two SETS
 * of columns; rows beyond that, which no usual shape has, read W again.
 *
 * The table has a copy per lane (32 KB): a lane reads its own bank, so no look-up conflicts with another. */
#include "lora_gemv_parts.cuh"

namespace {
using namespace gemv;

__device__ const uint4 zeros[4] = {}; /* what lanes without a row of x multiply by */

template <typename T, int SETS, bool NESTED>
__global__ void __launch_bounds__(THREADS, SETS == 1 ? 2 : 1)
    gemv_kernel(const __grid_constant__ Call c, const __grid_constant__ PkTable values) {
    __shared__ uint4 table[256 * 8]; /* 32 words for each byte; later the sums of the warps */
    __shared__ float code[NESTED ? 256 : 1];
    __shared__ PkRoute routes[TEAM];
    __shared__ unsigned arrived_last;
    const int which = c.blocks.of(blockIdx.x);
    const Layer &l = c.layer[which];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int64_t n0 = static_cast<int64_t>(blockIdx.x - c.blocks.first[which]) * ROWS;
    const int first = blockIdx.y * c.steps,
              last = static_cast<int>(min((c.K + STEP - 1) / STEP, int64_t(first) + c.steps));
    const float offset = NESTED ? *l.scales.offset : 0.0f;

    const uint8_t *rows[4];
    int64_t element[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) { /* rows past the end repeat the last one */
        element[i] = min(n0 + g + 8 * i, l.N - 1) * c.K;
        rows[i] = l.packed + element[i] / 2;
    }
    const int K = static_cast<int>(c.K);
    uint4 next[4];
    PkRawScale next_scale[4];
    auto fetch = [&](int step) { /* past the end of a row: its last codes again; x is zero there */
        const int k = min(step * STEP + 32 * t, K - 32);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            next[i] = pk_load_stream16(rows[i] + k / 2);
            next_scale[i] =
                pk_fetch_scale<NESTED>(l.scales, static_cast<uint32_t>((element[i] + k) >> l.scales.block_shift));
        }
    };
    fetch(min(first + warp, last - 1));
    {
        const uint32_t w = pk_pack<T>(values.value[threadIdx.x / 16], values.value[threadIdx.x % 16]);
#pragma unroll
        for (int k = 0; k < 8; ++k) table[threadIdx.x * 8 + ((k + threadIdx.x) & 7)] = {w, w, w, w};
        if (NESTED) code[threadIdx.x] = l.scales.nested_code[threadIdx.x];
        const int member = static_cast<int>(threadIdx.x);
        if (c.routes.adapters && member < c.M) /* now: at the end somebody would wait for it */
            routes[member] = pk_route(c.routes, pk_adapter(c.routes, member));
    }
    __syncthreads();

    const char *const entries = reinterpret_cast<const char *>(table);
    const uint32_t own = 4u * lane;
    auto look_up = [&](uint32_t word, int byte) { /* 128 bytes an entry */
        const uint32_t at = byte == 0 ? word << 7 : word >> (8 * byte - 7);
        return *reinterpret_cast<const uint32_t *>(entries + pk_and_or(at, 0x7f80u, own));
    };
    const int columns = 2 << c.share; /* of B for 2^share t */
    const char *x_rows[SETS];         /* NULL: this lane's column of B is zero at its k */
#pragma unroll
    for (int j = 0; j < SETS; ++j) {
        const int m = columns * j + g % columns;
        x_rows[j] = g / columns == t >> c.share && m < c.M
                        ? reinterpret_cast<const char *>(static_cast<const T *>(c.x) + m * c.K)
                        : nullptr;
    }
    float sums[2][SETS][4] = {};
    for (int step = first + warp; step < last; step += WARPS) {
        const int k = step * STEP + 32 * t;
        uint32_t w[4][4];
        float scale[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            w[i][0] = next[i].x, w[i][1] = next[i].y, w[i][2] = next[i].z, w[i][3] = next[i].w;
            scale[i] = pk_finish_scale<NESTED>(next_scale[i], code, offset);
            if (k >= K) scale[i] = 0.0f; /* 0 times the infinite scale of a block that is counted already is no 0 */
        }
        fetch(min(step + WARPS, last - 1));
        const char *from[SETS];
#pragma unroll
        for (int j = 0; j < SETS; ++j)
            from[j] = x_rows[j] && k < K ? x_rows[j] + 2 * k : reinterpret_cast<const char *>(zeros);
        float part[2][SETS][4] = {};
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            uint32_t x[SETS][4];
#pragma unroll
            for (int j = 0; j < SETS; ++j) {
                /* past L1: nothing says that it is younger than x where this launch began before another ended */
                const uint4 v = pk_load_fresh16(reinterpret_cast<const uint4 *>(from[j] + 16 * q));
                x[j][0] = v.x, x[j][1] = v.y, x[j][2] = v.z, x[j][3] = v.w;
            }
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int tile = 0; tile < 2; ++tile) {
                    const uint32_t upper = w[2 * tile][q], lower = w[2 * tile + 1][q];
                    const uint32_t a[4] = {look_up(upper, 2 * half), look_up(lower, 2 * half),
                                           look_up(upper, 2 * half + 1), look_up(lower, 2 * half + 1)};
#pragma unroll
                    for (int j = 0; j < SETS; ++j) {
                        const uint32_t b[2] = {x[j][2 * half], x[j][2 * half + 1]};
                        pk_mma<T>(part[tile][j], a, b);
                    }
                }
        }
#pragma unroll
        for (int tile = 0; tile < 2; ++tile)
#pragma unroll
            for (int j = 0; j < SETS; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[tile][j][e] += scale[2 * tile + e / 2] * part[tile][j][e];
    }

    pk_wait_for_previous(); /* here s begins to be there, and the counters */
    pk_release_next();
    __syncthreads(); /* the table's place is free */
    float *const shared = reinterpret_cast<float *>(table);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int j = 0; j < SETS; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float v = sums[tile][j][e] * c.unscale;
                if (c.share < 1) v += __shfl_xor_sync(0xffffffffu, v, 1);
                if (c.share < 2) v += __shfl_xor_sync(0xffffffffu, v, 2);
                if (t >> c.share == 0)
                    shared[(warp * ROWS + 16 * tile + 8 * (e / 2) + g) * TEAM + columns * j + 2 * t + e % 2] = v;
            }
    __syncthreads();
    const int row = row_of(c), member = member_of(c);
    float sum = 0.0f;
    if (member < c.M)
        for (int i = 0; i < WARPS; ++i) sum += shared[(i * ROWS + row) * TEAM + member];
    const int64_t n = n0 + row;
    if (c.arrived && !add_parts(c, l, &arrived_last, n, member, sum)) return;
    if (!c.routes.adapters)
        finish<T>(c, l, n, member, sum);
    else if (n < l.N && member < c.M)
        finish<T, 8>(l, routes[member], n, member, sum);
}

/* Any K and any alignment, element by element: for shapes that no model has. A warp has a row of W. */
template <typename T>
__global__ void __launch_bounds__(THREADS)
    any_kernel(const __grid_constant__ Call c, const __grid_constant__ PkTable values) {
    __shared__ float table[16], code[256];
    const int lane = threadIdx.x % 32, which = c.blocks.of(blockIdx.x);
    const Layer &l = c.layer[which];
    if (threadIdx.x < 16) table[threadIdx.x] = values.value[threadIdx.x];
    code[threadIdx.x] = pk_scale_code(l.scales, static_cast<int>(threadIdx.x));
    const float offset = pk_scale_offset(l.scales);
    pk_wait_for_previous();
    pk_release_next();
    __syncthreads();
    const int64_t n = static_cast<int64_t>(blockIdx.x - c.blocks.first[which]) * WARPS + threadIdx.x / 32;
    float sums[TEAM] = {};
    for (int64_t k = lane; k < c.K && n < l.N; k += 32) {
        const int64_t e = n * c.K + k;
        const float scale = pk_scale(l.scales, code, offset, e);
        const float w = __fmul_rn(table[(l.packed[e / 2] >> (e % 2 ? 0 : 4)) & 15], scale);
#pragma unroll
        for (int m = 0; m < TEAM; ++m)
            if (m < c.M) sums[m] += w * pk_float(static_cast<const T *>(c.x)[m * c.K + k]);
    }
    float mine = 0.0f;
#pragma unroll
    for (int m = 0; m < TEAM; ++m) {
#pragma unroll
        for (int d = 16; d > 0; d /= 2) sums[m] += __shfl_xor_sync(0xffffffffu, sums[m], d);
        mine = m == lane % TEAM ? sums[m] : mine;
    }
    const int member = lane % TEAM;
    const bool real = lane < TEAM && n < l.N; /* one team of the warp's four */
    if (!c.routes.adapters)
        finish<T>(c, l, real ? n : l.N, member, mine);
    else if (real && member < c.M)
        finish<T, 4>(l, pk_route(c.routes, pk_adapter(c.routes, member)), n, member, mine);
}

bool whole_runs(const pk_lora_args &a) {
    return a.K > 0 && a.K % 32 == 0 && pk_aligned(a.x, 16) && pk_aligned(a.weight, 16);
}

int64_t blocks_of(const pk_lora_args &a, int rows) { return (a.N + rows - 1) / rows; }
int64_t blocks_of(const PkStack &stack, int rows) {
    int64_t blocks = 0;
    for (int i = 0; i < stack.count; ++i) blocks += blocks_of(*stack.layer[i], rows);
    return blocks;
}

/* How many blocks share a row of W: enough blocks for a large GPU, a step for every warp, and the same on every GPU. */
int64_t splits_of(const PkStack &stack) {
    const pk_lora_args &a = *stack.layer[0];
    const int64_t blocks = blocks_of(stack, ROWS), steps = (a.K + STEP - 1) / STEP;
    if (!whole_runs(a) || blocks >= 96 || blocks == 0) return 1;
    const int64_t wanted = (192 + blocks - 1) / blocks, most = steps / WARPS;
    const int64_t splits = most < 1 ? 1 : (wanted < most ? wanted : most);
    const int64_t each = (steps + splits - 1) / splits; /* of the steps; the last have the rest */
    return (steps + each - 1) / each;
}

template <typename T, int SETS>
void launch(const Call &c, const PkTable &table, dim3 grid, bool after, cudaStream_t stream) {
    auto kernel = !c.layer[0].scales.nested_code ? gemv_kernel<T, SETS, false> : gemv_kernel<T, SETS, true>;
    PK_LAUNCH_AFTER(after, kernel, grid, THREADS, 0, stream, c, table);
}

template <typename T> void launch_all(const PkStack &stack, Call &c, bool after, cudaStream_t stream) {
    const pk_lora_args &a = *stack.layer[0];
    if (!whole_runs(a)) {
        auto kernel = any_kernel<T>;
        const unsigned blocks = static_cast<unsigned>(blocks_of(stack, WARPS));
        PK_LAUNCH_AFTER(after, kernel, blocks, THREADS, 0, stream, c, pk_table_of(a));
        return;
    }
    const float factor = pk_table_factor(a.quant_type, a.x_dtype);
    const PkTable table = pk_table_of(a, factor);
    c.unscale = 1.0f / factor;
    const int64_t steps = (c.K + STEP - 1) / STEP, splits = splits_of(stack);
    c.steps = static_cast<int>((steps + splits - 1) / splits);
    const dim3 grid(static_cast<unsigned>(blocks_of(stack, ROWS)), static_cast<unsigned>(splits));
    for (c.share = 2; c.share > 0 && ((32 << c.share) > a.blocksize || c.K % (32 << c.share) != 0);) --c.share;
    const int most = 4 << c.share;
    for (int m = 0; m < a.M; m += most) {
        c.M = static_cast<int>(a.M - m < most ? a.M - m : most);
        c.x = static_cast<const T *>(a.x) + m * a.K;
        for (int i = 0; i < stack.count; ++i) {
            const pk_lora_args &own = *stack.layer[i];
            Layer &l = c.layer[i];
            l.y = static_cast<T *>(own.y) + m * own.N, l.s = own.s + m * own.r;
            l.beside = pk_beside_of(own);
            if (l.beside.count) l.beside.sums += static_cast<int64_t>(m) * l.beside.count;
            l.h = own.gain && own.h ? static_cast<T *>(own.h) + m * own.N : nullptr;
        }
        c.routes.adapters = a.adapters ? a.adapters + m : nullptr;
        if (2 * c.M <= most)
            launch<T, 1>(c, table, grid, after, stream);
        else
            launch<T, 2>(c, table, grid, after, stream);
    }
}
} // namespace

PkNeed pk_lora_gemv_need(const PkStack &stack) {
    const int64_t splits = splits_of(stack);
    if (splits == 1) return {0, 0};
    int64_t outputs = 0;
    for (int i = 0; i < stack.count; ++i) outputs += stack.layer[i]->M * stack.layer[i]->N;
    return {(blocks_of(stack, ROWS) * 4 + 15) / 16 * 16, (splits * outputs * 4 + 15) / 16 * 16};
}

int pk_lora_gemv(const PkStack &stack, PkRoom room, bool after, cudaStream_t stream) {
    const pk_lora_args &first = *stack.layer[0];
    Call c = {};
    c.x = first.x, c.K = first.K, c.M = static_cast<int>(first.M), c.routes = pk_routes_of(first);
    const int64_t splits = splits_of(stack);
    if (splits > 1) c.arrived = room.counters;
    PkBlockCounter counter;
    for (int i = 0; i < stack.count; ++i) {
        const pk_lora_args &a = *stack.layer[i];
        Layer &l = c.layer[i];
        l.packed = static_cast<const uint8_t *>(a.weight), l.y = a.y;
        l.scales = pk_scales_of(a.absmax, a.nested_absmax, a.nested_code, a.offset, a.blocksize, a.nested_blocksize);
        l.s = a.s, l.b = a.b, l.bias = a.bias, l.gain = a.gain, l.h = a.gain ? a.h : nullptr;
        l.N = a.N, l.r = static_cast<int>(a.r), l.scaling = static_cast<float>(a.scaling);
        l.b_dtype = static_cast<int>(a.b_dtype), l.bias_dtype = static_cast<int>(a.bias_dtype);
        l.beside = pk_beside_of(a);
        l.parts = room.parts, room.parts += splits * a.M * a.N;
        counter.add(blocks_of(a, whole_runs(first) ? ROWS : WARPS));
    }
    if (counter.total == 0) return PK_OK;
    c.blocks = counter.blocks;
    if (first.x_dtype == PK_BF16)
        launch_all<__nv_bfloat16>(stack, c, after, stream);
    else
        launch_all<__half>(stack, c, after, stream);
    return PK_OK;
}
