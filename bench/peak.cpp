// What this machine can do at best: float32 FMA and bfloat16 dot products in registers on every thread, and reading
// memory in order. bench/machine.py builds it on the fly as a library, where there is a C++ compiler, so that a process
// can measure it in turns with its own work.
#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef float vec __attribute__((vector_size(64), aligned(4)));  // one register at AVX-512, two at AVX2

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class F> static double in_threads(int n, F f) {
    std::vector<std::thread> all;
    double start = now();
    for (int i = 0; i < n; i++) all.emplace_back(f, i);
    for (auto &t : all) t.join();
    return now() - start;
}

// The second best of seven rates: the best can be a jump of a virtual machine's clock.
template <class F> static double second_best(F rate) {
    std::vector<double> rates;
    for (int trial = 0; trial < 7; trial++) rates.push_back(rate());
    std::sort(rates.rbegin(), rates.rend());
    return rates[1];
}

static const long STEPS = 4000000;
static volatile float sink;  // what is computed is used

// GFLOP/s of float32 FMA.
extern "C" double pk_peak_f32(int threads) {
    std::vector<float> out(threads * 64);
    double best = second_best([&] {
        double took = in_threads(threads, [&](int id) {
            vec a0 = {}, x = a0 + 0.9999f, y = a0 + 0.5f;  // each chain starts elsewhere, or the compiler makes them one
            vec a1 = a0 + 1, a2 = a0 + 2, a3 = a0 + 3, a4 = a0 + 4, a5 = a0 + 5, a6 = a0 + 6, a7 = a0 + 7, a8 = a0 + 8;
            vec a9 = a0 + 9;
            for (long i = 0; i < STEPS; i++) {  // ten chains hide the latency of two units
                a0 = a0 * x + y; a1 = a1 * x + y; a2 = a2 * x + y; a3 = a3 * x + y; a4 = a4 * x + y;
                a5 = a5 * x + y; a6 = a6 * x + y; a7 = a7 * x + y; a8 = a8 * x + y; a9 = a9 * x + y;
                __asm__ volatile("" : "+v"(x), "+v"(y));
            }
            out[id * 64] = (a0 + a1 + a2 + a3 + a4 + a5 + a6 + a7 + a8 + a9)[0];
        });
        return 2.0 * 16 * 10 * STEPS * threads / took / 1e9;
    });
    for (float v : out) sink = v;
    return best;
}

// GFLOP/s of bfloat16 dot products; 0 where the CPU has no such instruction.
extern "C" double pk_peak_bf16(int threads) {
#ifdef __AVX512BF16__
    std::vector<float> out(threads * 64);
    double best = second_best([&] {
        double took = in_threads(threads, [&](int id) {
            __m512 a[12];
            for (int i = 0; i < 12; i++) a[i] = _mm512_set1_ps(float(i));
            __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f7f3f7f), y = (__m512bh)_mm512_set1_epi32(0x3f003f00);
            for (long i = 0; i < STEPS; i++) {  // twelve chains: its latency is longer than the FMA's
                for (int j = 0; j < 12; j++) a[j] = _mm512_dpbf16_ps(a[j], x, y);
                __asm__ volatile("" : "+v"(x), "+v"(y));
            }
            for (int i = 1; i < 12; i++) a[0] += a[i];
            out[id * 64] = a[0][0];
        });
        return 4.0 * 16 * 12 * STEPS * threads / took / 1e9;
    });
    for (float v : out) sink = v;
    return best;
#else
    return threads * 0.0;
#endif
}

// GB/s of reading 256 MiB, all threads together.
extern "C" double pk_peak_bytes(int threads) {
    const size_t part = (size_t(64) << 20) / threads / 64 * 64;  // floats of a thread
    std::vector<float> data(part * threads, 1.0f), out(threads * 64);
    double best = second_best([&] {
        double took = in_threads(threads, [&](int id) {
            const float *p = data.data() + id * part;
            vec s0 = {}, s1 = {}, s2 = {}, s3 = {};
            for (size_t i = 0; i + 64 <= part; i += 64) {
                s0 += *(const vec *)(p + i); s1 += *(const vec *)(p + i + 16);
                s2 += *(const vec *)(p + i + 32); s3 += *(const vec *)(p + i + 48);
            }
            out[id * 64] = (s0 + s1 + s2 + s3)[0];
        });
        return 4.0 * part * threads / took / 1e9;
    });
    for (float v : out) sink = v;
    return best;
}
