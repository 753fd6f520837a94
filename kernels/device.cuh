// What kernels in CUDA C++ share: waiting for other blocks, and sums over a warp.
//
// tests/on_cpu.h stands in for the first part, with fibers for threads.

#pragma once

#ifndef QROAM_ON_CPU

typedef unsigned long long u64;
#define SHARED_BYTES extern __shared__ __align__(16) unsigned char shared[]

__forceinline__ u64 add_release(u64* gate, u64 step) {
    u64 before;
    asm volatile("atom.add.release.gpu.global.u64 %0, [%1], %2;"
                 : "=l"(before) : "l"(gate), "l"(step) : "memory");
    return before;
}

__forceinline__ u64 load_acquire(u64* gate) {
    u64 now;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(now) : "l"(gate) : "memory");
    return now;
}

__forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// Of a block that ends: no other block reads what it wrote.
__forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same place in the shared memory of block `rank` of this cluster.
template <class V>
__forceinline__ V* of_block(V* here, int rank) {
    u64 there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"((u64)here), "r"(rank));
    return (V*)there;
}

__forceinline__ void prefetch(const void* at) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

// As pdl.py has it.
__forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif

typedef unsigned int u32;
typedef unsigned short u16;

constexpr u32 EVERYONE = 0xffffffffu;

__forceinline__ int lane() { return threadIdx.x & 31; }
__forceinline__ int warp() { return threadIdx.x >> 5; }
__forceinline__ u32 lanes_before() { return (1u << lane()) - 1; }

__forceinline__ double sum_of_warp(double value) {
    for (int far = 16; far; far >>= 1) value += __shfl_xor_sync(EVERYONE, value, far);
    return value;
}

// Exclusive prefix sums over the warp's lanes; `total` of all.
__forceinline__ int lanes_scan(int value, int& total) {
    int upto = value;
    for (int far = 1; far < 32; far <<= 1) {
        int other = __shfl_up_sync(EVERYONE, upto, far);
        if (lane() >= far) upto += other;
    }
    total = __shfl_sync(EVERYONE, upto, 31);
    return upto - value;
}
