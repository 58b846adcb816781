/* Looking at many small places in memory, none of which is likely to be in the cache: one after the other each costs
 * a trip to memory, asked for together about a tenth of it. */
#include <string.h>

#include "kernels.h"

namespace {
// A width that the compiler knows, and no early exit: no load waits for another.
template <typename T> bool unchanged(const int64_t *addresses, int64_t count, const void *content) {
    T differs = 0;
    for (int64_t i = 0; i < count; ++i) {
        T now, then;
        memcpy(&now, reinterpret_cast<const void *>(addresses[i]), sizeof now);
        memcpy(&then, static_cast<const char *>(content) + i * int64_t(sizeof then), sizeof then);
        differs |= T(now ^ then);
    }
    return !differs;
}
} // namespace

extern "C" {
int pk_cpu_unchanged(const int64_t *addresses, int64_t count, int64_t bytes, const void *content) {
    switch (bytes) {
    case 1: return unchanged<uint8_t>(addresses, count, content);
    case 2: return unchanged<uint16_t>(addresses, count, content);
    case 4: return unchanged<uint32_t>(addresses, count, content);
    case 8: return unchanged<uint64_t>(addresses, count, content);
    }
    return 0;
}
}
