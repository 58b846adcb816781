/* lora_linear for 8 < M <= 512 rows of x: W decoded into the operands of mma.sync. Chooses the tile and how many blocks
 * share the sums of one tile, and launches lora_mma.cuh. */
#include "lora_mma.cuh"

namespace {
using mma::Problem;
using mma::Stack;
using mma::Tile;
/* 4 stages of x and W, 3 with 128 rows of x. Where memory is short, 3 with 32 rows, 2 with 64, and no larger tile: on
 * those GPUs the tensor cores are the slowest part by far. */
using Tile16 = Tile<16, 2, 4, mma::ANY, mma::SUMS>;
using Tile32 = Tile<32, 2, 4, mma::LARGE, mma::SUMS>;
using Tile64 = Tile<64, 2, 4, mma::LARGE, mma::SUMS>;
using Tile128 = Tile<128, 2, 3, mma::LARGE, mma::WEIGHTS>;
using Tile32Small = Tile<32, 2, 3, mma::SMALL, mma::SUMS>;
using Tile64Small = Tile<64, 2, 2, mma::SMALL, mma::SUMS>;
/* where 64 elements have two scales, which few weights do: one tile for all */
using Halves32 = Tile<32, 2, 3, mma::ANY, mma::HALVES>;
using TileAny = Tile<32, 2, 3, mma::ANY, mma::ELEMENTS>;

/* Launch parameters of the kernel of one tile. */
struct Shape {
    int BM, BN, BK, quarters, threads, bytes;
    void (*bf16)(Stack);
    void (*f16)(Stack);
};
template <typename C> Shape shape() {
    static_assert(C::BN == mma::ADD_BN && C::COLUMN_THREADS == mma::ADD_THREADS, "what add_kernel takes");
    return {C::BM, C::BN, C::BK, C::QUARTERS, C::COLUMN_THREADS, C::BYTES, mma::kernel<__nv_bfloat16, C>,
            mma::kernel<__half, C>};
}

struct Plan {
    Shape shape;
    int64_t tiles, m_tiles; /* tiles: of the whole stack */
    PkSplit split;
    int64_t part() const { return static_cast<int64_t>(shape.quarters) * shape.threads * 16; } /* bytes */
    PkNeed need() const {
        if (split.parts == 1) return {0, 0};
        return {split.apart ? 0 : (tiles * 4 + 15) / 16 * 16, tiles * split.parts * part()};
    }
};

int64_t n_tiles(const pk_lora_args &a, const Plan &plan) { return pk_ceil_div(a.N, plan.shape.BN); }

Plan plan(const PkStack &stack) {
    const pk_lora_args &a = *stack.layer[0];
    const bool small = pk_small_gpu(), halves = a.blocksize < 64 || a.K % 64;
    /* the tile that costs least: decoding its part of W costs about as much as the products with 32 rows of x */
    int rows = 16;
    for (int BM = 32; BM <= (small ? 64 : 128); BM *= 2)
        if (pk_ceil_div(a.M, BM) * (BM + 32) <= pk_ceil_div(a.M, rows) * (rows + 32)) rows = BM;
    Plan out;
    out.shape = pk_lora_mma_general(a) ? shape<TileAny>()
                : halves               ? shape<Halves32>()
                : rows == 16           ? shape<Tile16>()
                : rows == 32           ? (small ? shape<Tile32Small>() : shape<Tile32>())
                : rows == 64           ? (small ? shape<Tile64Small>() : shape<Tile64>())
                                       : shape<Tile128>();
    out.m_tiles = pk_ceil_div(a.M, out.shape.BM), out.tiles = 0;
    for (int i = 0; i < stack.count; ++i) out.tiles += n_tiles(*stack.layer[i], out) * out.m_tiles;
    const int64_t step = pk_step_clocks(out.shape.BM, out.shape.BN, out.shape.BK, small);
    /* of few rows parts are small, and a product is one launch, behind which the next one's start can hide */
    const PkAdds who = a.M <= PK_STACK_ROWS ? PkAdds::LAST : PkAdds::EITHER;
    out.split = pk_splits({out.tiles, pk_ceil_div(a.K, out.shape.BK), step, out.part()}, who);
    return out;
}
} // namespace

/* Rows that cp.async cannot take 16 bytes at a time, or none (W then has no scale to read), or offsets beyond 32
 * bits. */
bool pk_lora_mma_general(const pk_lora_args &a) {
    return a.K == 0 || a.K % 32 || !pk_aligned(a.x, 16) || !pk_aligned(a.weight, 16) ||
           a.N * (a.K / 2) > UINT32_MAX - (1 << 20);
}

const char *pk_lora_mma_refuses(const pk_lora_args &a) {
    if (a.N * a.K / 32 >= int64_t(1) << 31) return "W has 2^36 elements or more";
    if (a.M * a.K * 2 > UINT32_MAX - (1 << 20)) return "x has 4 GB or more";
    return nullptr;
}

PkNeed pk_lora_mma_need(const PkStack &stack) { return plan(stack).need(); }

int pk_lora_mma(const PkStack &stack, const float *start, PkRoom room, bool after, cudaStream_t stream) {
    const Plan todo = plan(stack);
    if (todo.tiles == 0) return PK_OK;
    const float factor = pk_table_factor(stack.layer[0]->quant_type, stack.layer[0]->x_dtype);
    Stack all = {};
    PkBlockCounter counter;
    for (int i = 0; i < stack.count; ++i) {
        const pk_lora_args &a = *stack.layer[i];
        Problem &p = all.each[i];
        p.x = static_cast<const uint8_t *>(a.x), p.packed = static_cast<const uint8_t *>(a.weight);
        p.scales = pk_scales_of(a.absmax, a.nested_absmax, a.nested_code, a.offset, a.blocksize, a.nested_blocksize);
        p.b = a.b, p.bias = a.bias, p.s = a.s, p.start = start, p.y = static_cast<uint16_t *>(a.y);
        p.gain = a.gain, p.h = a.gain ? static_cast<uint16_t *>(a.h) : nullptr;
        p.M = static_cast<int>(a.M), p.N = static_cast<int>(a.N), p.K = static_cast<int>(a.K);
        p.r = start ? 0 : static_cast<int>(a.r), p.beside = pk_beside_of(a);
        p.m_tiles = static_cast<int>(todo.m_tiles), p.split = todo.split.parts;
        p.x_row = static_cast<uint32_t>(a.K * 2), p.codes_row = static_cast<uint32_t>(a.K / 2);
        p.last_unit = static_cast<uint32_t>((a.N * a.K - 1) / 32);
        p.shift = pk_log2(a.blocksize) - (pk_lora_mma_general(a) ? 0 : 5);
        p.b_dtype = static_cast<int>(a.b_dtype), p.bias_dtype = static_cast<int>(a.bias_dtype);
        p.scaling = static_cast<float>(a.scaling);
        p.table = pk_table_of(a, factor), p.unscale = 1.0f / factor;
        if (p.split > 1) p.partial = reinterpret_cast<float4 *>(room.parts);
        if (p.split > 1 && !todo.split.apart) p.arrived = room.counters;
        counter.add(n_tiles(a, todo) * todo.m_tiles);
    }
    all.blocks = counter.blocks;
    const bool bf16 = stack.layer[0]->x_dtype == PK_BF16;
    const auto kernel = bf16 ? todo.shape.bf16 : todo.shape.f16;
    const unsigned tiles = static_cast<unsigned>(todo.tiles);
    const dim3 grid(tiles, static_cast<unsigned>(todo.split.parts));
    PK_LAUNCH_AFTER(after, kernel, grid, mma::THREADS, static_cast<size_t>(todo.shape.bytes), stream, all);
    if (todo.split.apart) { /* of one projection, for few rows have no such split; it begins when all parts are there */
        const auto add = bf16 ? mma::add_kernel<__nv_bfloat16> : mma::add_kernel<__half>;
        const dim3 eights(tiles, static_cast<unsigned>(todo.shape.BM / 8));
        PK_LAUNCH(add, eights, mma::THREADS, stream, all.each[0], todo.shape.BM);
    }
    return PK_OK;
}
