/* Chooses the instruction set level at run time, and keeps the last error text of each thread. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#if defined(PK_X86)
#include <cpuid.h>
#endif

static thread_local char last_error[512] = "";

int pk_fail(int code, const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(last_error, sizeof last_error, format, list);
    va_end(list);
    return code;
}

namespace {
struct Level {
    const char *name;
    const PkTable *table;
    bool (*supported)();
    bool (*pays)(); // used unless asked for by name
};

bool yes() { return true; }

#if defined(PK_X86)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

// __builtin_cpu_supports knows "avx512bf16" only in newer compilers, and F16C in none that is old: ask the CPU.
unsigned cpuid(unsigned leaf, unsigned sub, int reg) {
    unsigned r[4] = {0, 0, 0, 0};
    if (!__get_cpuid_count(leaf, sub, &r[0], &r[1], &r[2], &r[3])) return 0;
    return r[reg];
}
bool has_f16c() { return (cpuid(1, 0, 2) >> 29) & 1; }
bool supports_avx2() { return has_avx2() && has_f16c(); }
bool supports_avx512() {
    return supports_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
// with VBMI, which look-ups of nested scales use; only Cooper Lake has bf16 without it
bool supports_avx512bf16() { return supports_avx512() && ((cpuid(7, 1, 0) >> 5) & 1) && ((cpuid(7, 0, 2) >> 1) & 1); }

// vdpbf16ps does twice the work of a float32 FMA on AMD (Zen 4 and later: measured 234 against 117 GFLOP/s a core), but
// half of it on Intel's Xeons, where the float32 kernels win.
bool bf16_dot_pays() { return cpuid(0, 0, 1) == 0x68747541; /* "Auth"enticAMD */ }
#endif

const Level levels[] = {
    {"scalar", &pk_scalar::table, yes, yes},
#if defined(PK_X86)
    {"avx2", &pk_avx2::table, supports_avx2, yes},
    {"avx512", &pk_avx512::table, supports_avx512, yes},
    {"avx512bf16", &pk_avx512bf16::table, supports_avx512bf16, bf16_dot_pays},
#endif
};
const int level_count = sizeof levels / sizeof levels[0];

const Level *current = nullptr;

const Level *best_level() {
    const Level *best = &levels[0];
    for (int i = 1; i < level_count; ++i)
        if (levels[i].supported() && levels[i].pays()) best = &levels[i];
    return best;
}
} // namespace

static const Level *level_in_use() {
    const Level *level = __atomic_load_n(&current, __ATOMIC_ACQUIRE);
    if (!level) {
        level = best_level();
        __atomic_store_n(&current, level, __ATOMIC_RELEASE);
    }
    return level;
}

const PkTable *pk_table() { return level_in_use()->table; }

extern "C" {
int pk_abi_version(void) { return PK_ABI_VERSION; }
const char *pk_last_error(void) { return last_error; }

const char *pk_cpu_level(void) { return level_in_use()->name; }

const char *pk_cpu_levels(void) {
    static thread_local char text[64];
    text[0] = 0;
    for (int i = 0; i < level_count; ++i)
        if (levels[i].supported()) {
            if (text[0]) strcat(text, ",");
            strcat(text, levels[i].name);
        }
    return text;
}

int pk_cpu_set_level(const char *name) {
    if (!name || !*name) {
        __atomic_store_n(&current, best_level(), __ATOMIC_RELEASE);
        return PK_OK;
    }
    for (int i = 0; i < level_count; ++i)
        if (!strcmp(levels[i].name, name)) {
            if (!levels[i].supported())
                return pk_fail(PK_ERR_LEVEL, "this CPU lacks the level %s; it has %s", name, pk_cpu_levels());
            __atomic_store_n(&current, &levels[i], __ATOMIC_RELEASE);
            return PK_OK;
        }
    return pk_fail(PK_ERR_LEVEL, "unknown level %.40s; this CPU and build have %s", name, pk_cpu_levels());
}
}

const float pk_nf4_table[16] = {-1.0f,
                                -0.6961928009986877f,
                                -0.5250730514526367f,
                                -0.39491748809814453f,
                                -0.28444138169288635f,
                                -0.18477343022823334f,
                                -0.09105003625154495f,
                                0.0f,
                                0.07958029955625534f,
                                0.16093020141124725f,
                                0.24611230194568634f,
                                0.33791524171829224f,
                                0.44070982933044434f,
                                0.5626170039176941f,
                                0.7229568362236023f,
                                1.0f};
const float pk_fp4_table[16] = {0.0f,  0.0052083334885537624f,  0.6666666865348816f,  1.0f,
                                0.3333333432674408f, 0.5f, 0.1666666716337204f, 0.25f,
                                0.0f,  -0.0052083334885537624f, -0.6666666865348816f, -1.0f,
                                -0.3333333432674408f, -0.5f, -0.1666666716337204f, -0.25f};
