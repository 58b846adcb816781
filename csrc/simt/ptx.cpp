/* The PTX instructions of csrc/cuda/ptx.cuh on the host, with the layouts of their fragments. */
#include "ptx.h"

#include <vector>

namespace simt {
namespace {
/* cp.async: the data is there when the thread that asked for it has waited for its group, and no sooner. Until then the
 * destination holds NaN; what one wait completes lands in an order drawn from the seed. */
struct Copy {
    char *to;
    const char *from; /* NULL: zeros */
    uint32_t group;
};
struct Queue {
    std::vector<Copy> copies;
    uint32_t groups = 0; /* closed ones */
};
using Queues = std::vector<Queue>;
Queues queues(MOST_THREADS);

void land(const Copy &copy, unsigned thread, const void *pc) {
    touch(copy.to, 16, LAND, thread, pc);
    if (copy.from) {
        touch(copy.from, 16, READ, thread, pc);
        memcpy(copy.to, copy.from, 16);
    } else {
        memset(copy.to, 0, 16);
    }
}
} // namespace

void async_block() {
    for (Queue &q : queues) q.copies.clear(), q.groups = 0;
}

std::shared_ptr<void> async_put_aside() {
    auto put_aside = std::make_shared<Queues>(MOST_THREADS);
    put_aside->swap(queues);
    return put_aside;
}

void async_take_up(const std::shared_ptr<void> &put_aside) { queues = *static_cast<Queues *>(put_aside.get()); }

void cp_async16(void *shared, const void *global, bool valid) {
    const unsigned me = current();
    if (reinterpret_cast<uintptr_t>(shared) % 16 || (valid && reinterpret_cast<uintptr_t>(global) % 16))
        fail(cudaErrorMisalignedAddress, "thread %u: cp.async of 16 bytes from %p to %p, not 16-byte aligned", me,
             global, shared);
    if (!is_shared(shared, 16))
        fail(cudaErrorIllegalAddress, "thread %u: cp.async to %p, which is not in shared memory", me, shared);
    touch(shared, 16, ISSUE, me, __builtin_return_address(0));
    if (valid) static_cast<void>(*static_cast<const char volatile *>(global)); /* fails here if it is out of bounds */
    memset(shared, 0xff, 16);
    queues[me].copies.push_back({static_cast<char *>(shared), valid ? static_cast<const char *>(global) : nullptr,
                                 queues[me].groups});
}

void cp_async_commit() { ++queues[current()].groups; }

void cp_async_wait(unsigned open) {
    const unsigned me = current();
    Queue &q = queues[me];
    /* copies are in the order of their groups */
    size_t due = 0;
    while (due < q.copies.size() && q.copies[due].group + open < q.groups) ++due;
    for (size_t left = due; left; --left) {
        const size_t i = draw(static_cast<uint32_t>(left));
        land(q.copies[i], me, __builtin_return_address(0));
        q.copies[i] = q.copies[left - 1];
    }
    q.copies.erase(q.copies.begin(), q.copies.begin() + static_cast<ptrdiff_t>(due));
}

namespace {
struct LdMatrix {
    uint32_t *out;
    const char *row;
    unsigned thread;
    const void *pc;
};
/* Lane i hands over the address of row i % 8 of matrix i / 8 (8 x 8 of 16 bit). Of each matrix lane i gets the elements
 * 2 (i % 4) and 2 (i % 4) + 1 of row i / 4; transposed, those of column i / 4. */
template <int COUNT, bool TRANS> void load_matrices(void *const *part, unsigned) {
    const LdMatrix *lanes[WARP];
    for (unsigned i = 0; i < WARP; ++i) lanes[i] = static_cast<const LdMatrix *>(part[i]);
    for (unsigned i = 0; i < 8 * COUNT; ++i) {
        const LdMatrix &lane = *lanes[i];
        const void *row = lane.row;
        if (!is_shared(row, 16))
            fail(cudaErrorIllegalAddress, "thread %u: ldmatrix from %p, which is not in shared memory", lane.thread,
                 row);
        if (reinterpret_cast<uintptr_t>(row) % 16)
            fail(cudaErrorMisalignedAddress, "thread %u: ldmatrix from %p, which is not 16-byte aligned", lane.thread,
                 row);
    }
    for (unsigned m = 0; m < COUNT; ++m)
        for (unsigned i = 0; i < WARP; ++i) {
            const LdMatrix &lane = *lanes[i];
            uint16_t v[2];
            for (unsigned k = 0; k < 2; ++k) {
                const unsigned r = TRANS ? 2 * (i % 4) + k : i / 4, c = TRANS ? i / 4 : 2 * (i % 4) + k;
                const char *from = lanes[8 * m + r]->row + 2 * c;
                touch(from, 2, READ, lane.thread, lane.pc); /* by the lane that gets it */
                memcpy(&v[k], from, 2);
            }
            lane.out[m] = v[0] | static_cast<uint32_t>(v[1]) << 16;
        }
}

struct Mma {
    float *d;
    const uint32_t *a, *b;
};
float widened(uint32_t half, bool bf16) {
    return bf16 ? __uint_as_float(half << 16) : __half2float(__half{static_cast<uint16_t>(half)});
}
/* m16n8k16, d += a b, in float32, k rising. Lane i, g = i / 4, t = i % 4: a[0..3] hold the pairs (row g, g + 8, g, g
 * + 8; columns from 2t, 2t, 2t + 8, 2t + 8), b[0..1] the pairs (rows from 2t, 2t + 8; column g), d[0..3] (row g, g,
 * g + 8, g + 8; column 2t, 2t + 1, 2t, 2t + 1). */
template <bool BF16> void multiply(void *const *part, unsigned) {
    float a[16][16], b[16][8], d[16][8];
    for (int i = 0; i < 32; ++i) {
        const Mma *lane = static_cast<Mma *>(part[i]);
        const int g = i / 4, t = i % 4;
        for (int k = 0; k < 2; ++k) {
            for (int r = 0; r < 4; ++r)
                a[g + r % 2 * 8][2 * t + r / 2 * 8 + k] = widened(lane->a[r] >> (16 * k) & 0xffffu, BF16);
            for (int r = 0; r < 2; ++r) b[2 * t + r * 8 + k][g] = widened(lane->b[r] >> (16 * k) & 0xffffu, BF16);
        }
        for (int r = 0; r < 4; ++r) d[g + r / 2 * 8][2 * t + r % 2] = lane->d[r];
    }
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k)
            for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    for (int i = 0; i < 32; ++i)
        for (int r = 0; r < 4; ++r) static_cast<Mma *>(part[i])->d[r] = d[i / 4 + r / 2 * 8][2 * (i % 4) + r % 2];
}
} // namespace

void ldmatrix(int count, bool trans, uint32_t *out, const void *row, Where where) {
    LdMatrix mine = {out, static_cast<const char *>(row), current(), __builtin_return_address(0)};
    const Collective run = count == 1   ? (trans ? load_matrices<1, true> : load_matrices<1, false>)
                           : count == 2 ? (trans ? load_matrices<2, true> : load_matrices<2, false>)
                                        : (trans ? load_matrices<4, true> : load_matrices<4, false>);
    collective(trans ? "ldmatrix.trans" : "ldmatrix", where, WHOLE, 0xffffffffu, run, &mine);
}

void mma(bool bf16, float *d, const uint32_t *a, const uint32_t *b, Where where) {
    Mma mine = {d, a, b};
    collective("mma", where, WHOLE, 0xffffffffu, bf16 ? multiply<true> : multiply<false>, &mine);
}
} // namespace simt
