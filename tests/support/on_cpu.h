// CUDA C++ on a CPU, for tests: every thread is a fiber, and what threads wait for lets others run.
// Fibers take turns in an order drawn from a seed, and warps and blocks fall behind, some of them far, so a
// missing barrier shows in some of the orders. Shared memory is poisoned when a block ends.

#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#define QROAM_ON_CPU
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define SHARED_BYTES unsigned char* shared = on_cpu::block->shared.data()

using std::max;
using std::min;
typedef unsigned long long u64;

struct alignas(16) int4 {
    int x, y, z, w;
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace on_cpu {

struct Barrier {
    int arrived = 0, phase = 0;

    int arrive(int all) {
        int now = phase;
        if (++arrived == all) arrived = 0, ++phase;
        return now;
    }
};

struct Warp {
    Barrier barrier;
    int operation[32];
    u64 values[32];
};

struct Block;

struct Cluster {
    Barrier barrier;
    std::vector<Block*> blocks;
};

struct Block {
    std::vector<unsigned char> shared;
    std::vector<Warp> warps;
    Barrier barrier;
    Cluster* cluster;
    int index;
};

struct Fiber {
    ucontext_t context;
    char* stack;
    Block* block;
    int thread, cluster_phase = 0;
    bool done = false;
};

struct Index {
    unsigned x;
};

constexpr int STACK = 1 << 16, GUARD = 64;
inline ucontext_t scheduler;
inline Fiber* fiber;
inline Block* block;
inline Index thread_index, block_index, block_size, grid_size;
inline int cluster_size;
inline const void* step;
inline void (*kernel)(const void* step);

inline void yield() { swapcontext(&fiber->context, &scheduler); }

inline void join(Barrier& barrier, int all) {
    int phase = barrier.arrive(all);
    while (barrier.phase == phase) yield();
}

// Every lane's value; all lanes must ask for the same operation.
inline void exchange(int operation, u64 value, u64* all) {
    Warp& warp = block->warps[thread_index.x / 32];
    int lane = thread_index.x % 32;
    warp.values[lane] = value, warp.operation[lane] = operation;
    join(warp.barrier, 32);
    for (int i = 0; i < 32; ++i) {
        if (warp.operation[i] != operation) abort();
        all[i] = warp.values[i];
    }
    join(warp.barrier, 32);
}

template <class V>
V shuffled(int operation, V value, int from) {
    u64 bits = 0, all[32];
    memcpy(&bits, &value, sizeof(V));
    exchange(operation, bits, all);
    V found;
    memcpy(&found, &all[from >= 0 && from < 32 ? from : (int)(thread_index.x % 32)], sizeof(V));
    return found;
}

inline void enter() {
    kernel(step);
    fiber->done = true;
    swapcontext(&fiber->context, &scheduler);
}

// Run a grid to its end. Returns 0, 1 for a deadlock, 2 for writes behind the shared memory.
inline int run(
    int blocks, int threads, int cluster, long shared_bytes, unsigned seed
) {
    std::vector<Cluster> clusters(blocks);
    std::vector<Block> all(blocks);
    std::vector<Fiber> fibers(blocks * threads);
    block_size = {(unsigned)threads}, grid_size = {(unsigned)blocks};
    cluster_size = cluster;
    for (int b = 0; b < blocks; ++b) {
        all[b].shared.assign(shared_bytes + GUARD, 0xA5);
        all[b].warps.resize(threads / 32);
        all[b].cluster = &clusters[b / cluster];
        clusters[b / cluster].blocks.push_back(&all[b]);
        all[b].index = b;
    }
    std::vector<int> turns;
    for (int i = 0; i < blocks * threads; ++i) {
        Fiber& f = fibers[i];
        f.block = &all[i / threads], f.thread = i % threads;
        f.stack = (char*)malloc(STACK);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack, f.context.uc_stack.ss_size = STACK;
        makecontext(&f.context, enter, 0);
        turns.push_back(i);
    }
    auto random = [&] { return seed ^= seed << 13, seed ^= seed >> 17, seed ^= seed << 5; };
    std::vector<int> asleep(blocks + blocks * threads / 32), running(blocks, threads);
    int left = turns.size();
    for (int round = 0; left; ++round) {
        if (round > 100000) return 1;
        for (int i = turns.size() - 1; seed && i > 0; --i)
            std::swap(turns[i], turns[random() % (i + 1)]);
        for (int& until : asleep)
            if (seed && until <= round && random() % 24 == 0)
                until = round + 1 + random() % (random() % 4 ? 4 : 60);
        for (int i : turns) {
            Fiber& f = fibers[i];
            if (f.done || asleep[i / threads] > round || asleep[blocks + i / 32] > round) continue;
            fiber = &f, block = f.block;
            thread_index = {(unsigned)f.thread}, block_index = {(unsigned)f.block->index};
            swapcontext(&scheduler, &f.context);
            if (!f.done) continue;
            --left;
            std::vector<unsigned char>& memory = f.block->shared;
            if (--running[i / threads] == 0) std::fill(memory.begin(), memory.end() - GUARD, 0xA5);
        }
    }
    for (Fiber& f : fibers) free(f.stack);
    for (Block& b : all)
        for (int i = 0; i < GUARD; ++i)
            if (b.shared[shared_bytes + i] != 0xA5) return 2;
    return 0;
}

}  // namespace on_cpu

#define threadIdx on_cpu::thread_index
#define blockIdx on_cpu::block_index
#define blockDim on_cpu::block_size
#define gridDim on_cpu::grid_size

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }
template <class V> V __ldcg(const V* at) { return *at; }
template <class V> V __ldg(const V* at) { return *at; }
template <class V, class A> V atomicOr(V* at, A bits) { V old = *at; *at = old | bits; return old; }
template <class V, class A> V atomicAdd(V* at, A value) { V old = *at; *at = old + value; return old; }

inline void __syncthreads() { on_cpu::join(on_cpu::block->barrier, on_cpu::block_size.x); }
inline void __syncwarp() { u64 all[32]; on_cpu::exchange(1, 0, all); }

inline unsigned __ballot_sync(unsigned, int flag) {
    u64 all[32];
    unsigned who = 0;
    on_cpu::exchange(2, flag != 0, all);
    for (int i = 0; i < 32; ++i) who |= (unsigned)all[i] << i;
    return who;
}

inline unsigned __match_any_sync(unsigned, int value) {
    u64 all[32];
    unsigned who = 0;
    on_cpu::exchange(3, (unsigned)value, all);
    for (int i = 0; i < 32; ++i) who |= (unsigned)(all[i] == (unsigned)value) << i;
    return who;
}

template <class V> V __reduce_add_sync(unsigned, V value) {
    u64 all[32];
    unsigned sum = 0;
    on_cpu::exchange(4, (unsigned)value, all);
    for (int i = 0; i < 32; ++i) sum += (unsigned)all[i];
    return (V)sum;
}

template <class V> V __shfl_sync(unsigned, V value, int from) {
    return on_cpu::shuffled(5, value, from & 31);
}
template <class V> V __shfl_up_sync(unsigned, V value, int far) {
    return on_cpu::shuffled(6, value, (int)(threadIdx.x % 32) - far);
}
template <class V> V __shfl_xor_sync(unsigned, V value, int far) {
    return on_cpu::shuffled(7, value, (int)(threadIdx.x % 32) ^ far);
}

inline u64 add_release(u64* gate, u64 step) { return atomicAdd(gate, step); }
inline u64 load_acquire(u64* gate) { on_cpu::yield(); return *gate; }
inline void cluster_arrive() {
    on_cpu::fiber->cluster_phase = on_cpu::block->cluster->barrier.arrive(
        on_cpu::block_size.x * on_cpu::cluster_size);
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() {
    while (on_cpu::block->cluster->barrier.phase == on_cpu::fiber->cluster_phase) on_cpu::yield();
}
inline void prefetch(const void*) {}
inline void let_next_begin() {}

template <class V> V* of_block(V* here, int rank) {
    unsigned char* own = on_cpu::block->shared.data();
    return (V*)(on_cpu::block->cluster->blocks[rank]->shared.data() + ((unsigned char*)here - own));
}
