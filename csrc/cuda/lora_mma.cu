/* lora_linear for 8 < M <= 512 rows of x: W decoded into the operands of mma.sync. Chooses the tile and how many blocks
 * share the sums of one tile, and launches lora_mma.cuh. */
#include "lora_mma.cuh"

namespace {
using mma::Problem;
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
    void (*bf16)(Problem);
    void (*f16)(Problem);
};
template <typename C> Shape shape() {
    static_assert(C::BN == mma::ADD_BN && C::COLUMN_THREADS == mma::ADD_THREADS, "what add_kernel takes");
    return {C::BM, C::BN, C::BK, C::QUARTERS, C::COLUMN_THREADS, C::BYTES, mma::kernel<__nv_bfloat16, C>,
            mma::kernel<__half, C>};
}

struct Plan {
    Shape shape;
    int64_t n_tiles, m_tiles;
    PkSplit split;
    int64_t part() const { return static_cast<int64_t>(shape.quarters) * shape.threads * 16; } /* bytes */
    int64_t counters() const { return split.apart ? 0 : (n_tiles * m_tiles * 4 + 15) / 16 * 16; }
    int64_t bytes() const { return split.parts == 1 ? 0 : counters() + n_tiles * m_tiles * split.parts * part(); }
};

Plan plan(const pk_lora_args &a, bool general) {
    const bool small = pk_small_gpu(), halves = a.blocksize < 64 || a.K % 64;
    /* the tile that costs least: decoding its part of W costs about as much as the products with 32 rows of x */
    int rows = 16;
    for (int BM = 32; BM <= (small ? 64 : 128); BM *= 2)
        if (pk_ceil_div(a.M, BM) * (BM + 32) <= pk_ceil_div(a.M, rows) * (rows + 32)) rows = BM;
    Plan out;
    out.shape = general      ? shape<TileAny>()
                : halves     ? shape<Halves32>()
                : rows == 16 ? shape<Tile16>()
                : rows == 32 ? (small ? shape<Tile32Small>() : shape<Tile32>())
                : rows == 64 ? (small ? shape<Tile64Small>() : shape<Tile64>())
                             : shape<Tile128>();
    out.n_tiles = pk_ceil_div(a.N, out.shape.BN), out.m_tiles = pk_ceil_div(a.M, out.shape.BM);
    const int64_t step = pk_step_clocks(out.shape.BM, out.shape.BN, out.shape.BK, small);
    out.split = pk_splits({out.n_tiles * out.m_tiles, pk_ceil_div(a.K, out.shape.BK), step, out.part()}, false);
    return out;
}

/* Rows that cp.async cannot take 16 bytes at a time, or offsets beyond 32 bits. */
bool is_general(const pk_lora_args &a) {
    return a.K % 32 || !pk_aligned(a.x, 16) || !pk_aligned(a.weight, 16) || a.N * (a.K / 2) > UINT32_MAX - (1 << 20);
}
} // namespace

const char *pk_lora_mma_refuses(const pk_lora_args &a) {
    if (a.N * a.K / 32 >= int64_t(1) << 31) return "W has 2^36 elements or more";
    if (a.M * a.K * 2 > UINT32_MAX - (1 << 20)) return "x has 4 GB or more";
    return nullptr;
}

int64_t pk_lora_mma_workspace(const pk_lora_args &a) { /* whatever the alignment will be */
    const int64_t usual = plan(a, false).bytes(), general = plan(a, true).bytes();
    return usual > general ? usual : general;
}

int pk_lora_mma(const pk_lora_args &a, const float *start, cudaStream_t stream) {
    const char *what = "lora_linear (mma)";
    if (const char *why = pk_lora_mma_refuses(a)) return pk_fail(PK_ERR_ARGUMENT, "%s: %s", what, why);
    const bool general = is_general(a);
    const Plan todo = plan(a, general);
    if (todo.bytes() > a.workspace_bytes || (todo.split.parts > 1 && !pk_aligned(a.workspace, 16)))
        return pk_fail(PK_ERR_ARGUMENT, "%s: needs %lld bytes of workspace, 16-byte aligned; got %lld", what,
                       static_cast<long long>(todo.bytes()), static_cast<long long>(a.workspace_bytes));
    Problem p = {};
    p.x = static_cast<const uint8_t *>(a.x), p.packed = static_cast<const uint8_t *>(a.weight);
    p.scales = pk_scales_of(a.absmax, a.nested_absmax, a.nested_code, a.offset, a.blocksize, a.nested_blocksize);
    p.b = a.b, p.bias = a.bias, p.s = a.s, p.start = start, p.y = static_cast<uint16_t *>(a.y);
    p.gain = a.gain, p.h = a.gain ? static_cast<uint16_t *>(a.h) : nullptr;
    p.M = static_cast<int>(a.M), p.N = static_cast<int>(a.N), p.K = static_cast<int>(a.K);
    p.r = start ? 0 : static_cast<int>(a.r);
    p.m_tiles = static_cast<int>(todo.m_tiles), p.split = todo.split.parts;
    p.x_row = static_cast<uint32_t>(a.K * 2), p.codes_row = static_cast<uint32_t>(a.K / 2);
    p.last_unit = static_cast<uint32_t>((a.N * a.K - 1) / 32);
    p.shift = pk_log2(a.blocksize) - (general ? 0 : 5);
    p.b_dtype = static_cast<int>(a.b_dtype), p.bias_dtype = static_cast<int>(a.bias_dtype);
    p.scaling = static_cast<float>(a.scaling);
    const float factor = pk_table_factor(a.quant_type, a.x_dtype);
    p.table = pk_table_of(a.table, factor), p.unscale = 1.0f / factor;
    if (p.split > 1) p.partial = reinterpret_cast<float4 *>(reinterpret_cast<char *>(a.workspace) + todo.counters());
    if (p.split > 1 && !todo.split.apart) {
        p.arrived = reinterpret_cast<unsigned *>(a.workspace);
        if (int code = pk_cuda_check(cudaMemsetAsync(p.arrived, 0, todo.counters(), stream), what)) return code;
    }
    const auto kernel = a.x_dtype == PK_BF16 ? todo.shape.bf16 : todo.shape.f16;
    const unsigned tiles = static_cast<unsigned>(todo.n_tiles * todo.m_tiles), split = static_cast<unsigned>(p.split);
    PK_LAUNCH_SHARED(kernel, dim3(tiles, split), mma::THREADS, static_cast<size_t>(todo.shape.bytes), stream, p);
    if (split > 1 && todo.split.apart) {
        const auto add = a.x_dtype == PK_BF16 ? mma::add_kernel<__nv_bfloat16> : mma::add_kernel<__half>;
        PK_LAUNCH(add, dim3(tiles, static_cast<unsigned>(todo.shape.BM / 8)), mma::THREADS, stream, p, todo.shape.BM);
    }
    return pk_cuda_check(cudaGetLastError(), what);
}
