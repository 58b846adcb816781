/* cp.async: the data is there when the thread that asked for it has waited for its group, and no sooner. Until then the
 * destination holds NaN; what one wait completes lands in an order drawn from the seed. */
#include <vector>

#include "machine.h"

namespace simt {
namespace {
struct Copy {
    char *to;
    const char *from; /* NULL: zeros */
    uint32_t group;
};
struct Queue {
    std::vector<Copy> copies;
    uint32_t groups = 0; /* closed ones */
} queues[MOST_THREADS];

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

void cp_async16(void *shared, const void *global, bool valid) {
    const unsigned me = current();
    if (reinterpret_cast<uintptr_t>(shared) % 16 || (valid && reinterpret_cast<uintptr_t>(global) % 16))
        fail(cudaErrorMisalignedAddress, "thread %u: cp.async of 16 bytes from %p to %p, not 16-byte aligned", me, global,
             shared);
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
} // namespace simt
