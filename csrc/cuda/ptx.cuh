/* The one home of inline PTX: asynchronous copies, ldmatrix, mma.sync and a few single instructions, all of sm_80 but
 * for what does nothing before sm_90. csrc/simt/ptx.h has the same functions for the host build. Shared addresses are
 * generic pointers into shared memory, 16-byte aligned where 16 bytes are read or written. All lanes of a warp call
 * pk_ldmatrix_* and pk_mma_* together. */
#pragma once
#include <type_traits>

#include "common.cuh"

#if defined(PK_SIMT)
#include "../simt/ptx.h"
#else

__device__ __forceinline__ uint32_t pk_shared_address(const void *shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

/* 16 bytes from global to shared memory without a register (and past L1); zeros, and no read, when !valid. */
__device__ __forceinline__ void pk_cp_async16(void *shared, const void *global, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(pk_shared_address(shared)), "l"(global),
                 "r"(bytes)
                 : "memory");
}
/* Closes a group of copies; pk_cp_async_wait<N> returns when at most the N youngest groups of this thread are open. */
__device__ __forceinline__ void pk_cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void pk_cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* Four 8x8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8 (16 bytes) and gets, of
 * each matrix, elements 2 (l % 4) and the next one of row l / 4; transposed: of column l / 4. */
__device__ __forceinline__ void pk_ldmatrix_x4(uint32_t (&r)[4], const void *shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(pk_shared_address(shared))
                 : "memory");
}
__device__ __forceinline__ void pk_ldmatrix_x4_trans(uint32_t (&r)[4], const void *shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(pk_shared_address(shared))
                 : "memory");
}
__device__ __forceinline__ void pk_ldmatrix_x2(uint32_t (&r)[2], const void *shared) { /* addresses of lanes 0 to 15 */
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(pk_shared_address(shared))
                 : "memory");
}

/* d [16, 8] += a [16, 16] b [16, 8], float32 sums. With g = lane / 4, t = lane % 4, low half first:
 *   a[0] = a(g, 2t..2t+1)    a[1] = a(g + 8, 2t..)   a[2] = a(g, 2t + 8..)   a[3] = a(g + 8, 2t + 8..)
 *   b[0] = b(2t..2t+1, g)    b[1] = b(2t + 8.., g)
 *   d[0], d[1] = d(g, 2t), d(g, 2t + 1)              d[2], d[3] = d(g + 8, 2t), d(g + 8, 2t + 1) */
__device__ __forceinline__ void pk_mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void pk_mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* a * b + c of the two 16-bit numbers of each word, rounded once. */
template <typename T> __device__ __forceinline__ uint32_t pk_fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    else
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

/* 16 bytes that are read once: they do not displace what L1 holds. */
__device__ __forceinline__ uint4 pk_load_stream16(const void *global) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(global));
    return v;
}

/* threadIdx.x and an axis of blockIdx, read anew: what comes of them needs no register until then. */
__device__ __forceinline__ unsigned pk_thread_again() {
    unsigned v;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(v));
    return v;
}
__device__ __forceinline__ unsigned pk_block_again(int axis) {
    unsigned v;
    if (axis == 0)
        asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(v));
    else
        asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(v));
    return v;
}

/* v, which the compiler keeps from here on, in place of making it anew where it is used. */
__device__ __forceinline__ int pk_fixed(int v) {
    asm volatile("" : "+r"(v));
    return v;
}

/* p += bytes, here and not further up, where both values would be alive, and the loop would end with copies. */
__device__ __forceinline__ void pk_advance(const uint8_t *&p, int64_t bytes) {
    asm volatile("add.s64 %0, %0, %1;" : "+l"(p) : "l"(bytes));
}

/* Loads a value that will not change, here: the compiler would put a plain load off until after the branch that
 * comes before its use. */
__device__ __forceinline__ float pk_load_now(const float *global) {
    float v;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(global));
    return v;
}
__device__ __forceinline__ uint32_t pk_load_now(const uint8_t *global) {
    uint32_t v;
    asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(global));
    return v;
}

/* A value that another block wrote during this launch: read past L1. */
__device__ __forceinline__ float pk_load_fresh(const float *global) { return __ldcg(global); }
__device__ __forceinline__ float4 pk_load_fresh16(const float4 *global) { return __ldcg(global); }
__device__ __forceinline__ uint4 pk_load_fresh16(const uint4 *global) { return __ldcg(global); }

/* In a launch that may begin before the one before it on the stream has ended (PK_LAUNCH_AFTER): waits for its end, and
 * then all that it wrote is there. By every thread, on every path, once. What that one wrote is read after it, by plain
 * loads: ld.global.nc (__ldg, pk_load_stream16, pk_load_now) is for what nobody writes while this launch lasts. Other
 * launches wait for nothing. */
__device__ __forceinline__ void pk_wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/* From here on, once every block has said so or ended, a launch that may begin early may begin. After
 * pk_wait_for_previous, so that it finds all that came before this launch: only this one is still under way. */
__device__ __forceinline__ void pk_release_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Byte i of the result is byte (selector >> 4 i) & 7 of the eight bytes of a (0 to 3) and b (4 to 7). */
__device__ __forceinline__ uint32_t pk_prmt(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}

/* 1 / v, off by one place at most; numbers that are not normal count as zero. */
__device__ __forceinline__ float pk_reciprocal(float v) {
    float out;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
    return out;
}

/* (a & b) | c, in one instruction whatever the compiler makes of its surroundings. */
__device__ __forceinline__ uint32_t pk_and_or(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t out;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}
/* The bits of a where mask has ones, those of b elsewhere: one instruction as well. */
__device__ __forceinline__ uint32_t pk_blend(uint32_t a, uint32_t b, uint32_t mask) {
    uint32_t out;
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(out) : "r"(a), "r"(b), "r"(mask));
    return out;
}
/* A word of shared memory by its address (pk_shared_t), on which the caller may calculate: with a table aligned to its
 * size, pk_and_or makes the address of an entry in one instruction. */
using pk_shared_t = uint32_t;
__device__ __forceinline__ float pk_load_shared(pk_shared_t address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address));
    return v;
}

#endif

/* a * b of the two 16-bit numbers of each word: sm_80 has no such product of bfloat16 but as a sum with -0. */
template <typename T> __device__ __forceinline__ uint32_t pk_mul2(uint32_t a, uint32_t b) {
    return pk_fma2<T>(a, b, 0x80008000u);
}

/* pk_mma_bf16 or pk_mma_f16, by the type of the operands. */
template <typename T>
__device__ __forceinline__ void pk_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        pk_mma_bf16(d, a, b);
    else
        pk_mma_f16(d, a, b);
}
