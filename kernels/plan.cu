// From selected units to who is asked for what; the launcher, and what each table is: plan.py.
//
// Letters: Q queries, G branches, N = Q * G items, K units of an item, W ranks, B tokens of a block,
// U tokens of a unit. A thread block is an item. It sorts its units by holder in shared memory, once;
// whatever follows walks them in that order. What items must know of one another goes through small
// matrices (N, W), and through one bit per (unit, query) in `listers`: from its unit's bits an item
// knows how many list it (the fair share), whether it is the first of them (a unit is counted, and
// fetched, by its first lister), and with the ways at hand whether it is the first that fetches. So
// counts and shares are exact, and the order of all lists follows from the input alone.
//
// All wait for all (1) after bits and counts, (2) after the shares; then every block decides for every
// holder itself, which costs less than to ask; (3) only where a holder's items are partly fetched, and
// (4) only where units are fetched. Up to 8 blocks are one cluster and wait in hardware; more wait at
// a gate in memory; more than are resident take one launch for each stage instead. Loops are not
// unrolled where that only adds code: it runs once a launch, from a cold instruction cache.

#ifndef QROAM_ON_CPU  // tests/on_cpu.h runs this file with fibers for threads

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

// Of who leaves: what it wrote is nobody's concern.
__forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");
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

#endif

typedef unsigned int u32;
typedef unsigned short u16;

enum Way { NOTHING = 0, LOCAL = 1, ROUTE = 2, FETCH = 4 };
enum Mode { AUTO, ALWAYS_ROUTE, ALWAYS_FETCH, GIVEN };
enum Stage { COUNT = 1, SHARE = 2, FIRST = 4, LIST = 8, PLACE = 16, ALL = 31 };
enum Together { ALONE, GRID };

// What is the same for every launch of a deployment: threads, units of a thread, blocks of an item,
// the sizes that letters
// stand for, words of a unit's bits, forms that may be chosen; then the mode, stages, and how all wait.
template <
    int T_, int PER_, int PARTS_, int B_, int U_, int G_, int W_, int WORDS_, int FORMS_, int MODE_, int STAGES_,
    int TOGETHER_>
struct Fixed {
    static constexpr int T = T_, PER = PER_, PARTS = PARTS_, B = B_, U = U_, G = G_, W = W_, WORDS = WORDS_;
    static constexpr int FORMS = FORMS_, MODE = MODE_, STAGES = STAGES_, TOGETHER = TOGETHER_;
    static constexpr int WARPS = T / 32, CAPACITY = T * PER;
};

constexpr u32 EVERYONE = 0xffffffffu;
constexpr u32 ONE_SHARE = 1u << 28;  // fair shares are rounded to 2**-28 of a unit
constexpr u32 FETCHING = 1, MIXING = 2;
constexpr int MOST_FORMS = 2;
// What is written for each holder: units to fetch, then per form routed pairs, then their units.
enum List { FETCHED, PAIRS, UNITS = PAIRS + MOST_FORMS, LISTS = UNITS + MOST_FORMS };
constexpr int PRICES = 16;  // of one row: two routes of 4, fetch of 5, merge of 2, branches

// What an item asks of a holder; one 16-byte load.
struct alignas(16) Demand {
    int units, first;  // listed, and those of them that no earlier query lists
    double fair;       // each unit divided by the number of queries that list it
};

struct Step {
    const int *units, *hidden;
    const int4* records;
    const int* fill;
    const double *wait_s, *prices;
    int *pairs_units, *unique_units;
    double *fair_units;
    signed char *way;
    int *expected, *items, *units_of, *items_expected, *route_units, *pairs, *listed;
    int *fetch_units, *counts, *place, *local_units, *local_lengths;
    u32 *listers;
    int *seats;
    Demand *demand;  // (W, N)
    int *reps;       // (W, N): units that an item fetches for all
    u64 *gate;
    int rank, N, K, num_keys, first_way;
};

// What is asked of a holder by all items, how, and where its lists start.
struct Column {
    int items, listed, unique;
    int routed[MOST_FORMS], routed_units[MOST_FORMS];  // of items that prefer it
    u64 routed_own[MOST_FORMS];                        // in shares
    int choice, mixed;  // a way for all; if mixed only for items that prefer it, others are fetched
    int way;            // of this item
    int fetchers;       // items that fetch
    int in_all[LISTS], before[LISTS];  // lengths: of all items, of those before this one
    int start[LISTS];                  // where this holder's part of a list begins
    int count, earlier, total;    // of this item's units: in this part, in parts before, in all
    int flagged, flagged_earlier, flagged_total;  // and of those that `rank_flagged` was given
    u32 entries, mix;  // coverage of what this item lists; the first part has all of it
    u32 low, high;     // its shares, in 14 bits and the rest; likewise
};

__forceinline__ int lane() { return threadIdx.x & 31; }
__forceinline__ int warp() { return threadIdx.x >> 5; }
__forceinline__ u32 lanes_before() { return (1u << lane()) - 1; }

__forceinline__ u32 mix(u32 id, u32 generation) {  // reference.mix
    u32 x = id * 0x9E3779B1u + generation * 0x85EBCA77u + 0x165667B1u;
    x = (x ^ (x >> 15)) * 0x2C1B3C6Du;
    x = (x ^ (x >> 12)) * 0x297A2D39u;
    return x ^ (x >> 15);
}

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

// Wait for the other parts of this item; their shared memory shows what they wrote before.
template <class F>
__forceinline__ void sync_parts() {
    if constexpr (F::PARTS > 1) cluster_arrive(), cluster_wait();
    else __syncthreads();
}

// Make this block's writes known and say so; `wait` takes the ticket. The gate's upper half counts
// how often all have arrived, its lower half is zero between: block 0 adds what the others leave to
// be carried, so it never needs to be reset.
template <class F>
__forceinline__ u64 arrive(const Step& s) {
    __syncthreads();
    u64 ticket = 0;
    if (F::TOGETHER == GRID && threadIdx.x == 0)
        ticket = add_release(s.gate, blockIdx.x ? 1 : (1ull << 32) + 1 - gridDim.x);
    return ticket;
}

template <class F>
__forceinline__ void wait(const Step& s, u64 ticket) {
    if constexpr (F::TOGETHER == GRID) {
        if (threadIdx.x == 0)
            while (load_acquire(s.gate) >> 32 == ticket >> 32) {}
        __syncthreads();
    }
}

// The closed form of the cost model, product by product in its order, without contraction.
__forceinline__ double route_s(
    const double* p, int form, double wait_s, double items, double units
) {
    const double* line = p + 4 * form;
    double used = items > 0 ? 1.0 : 0.0, weights = items < p[15] ? items : p[15];
    return used * (line[0] + wait_s) + items * line[1] + units * line[2] + weights * line[3];
}

__forceinline__ double fetch_s(
    const double* p, double mixed, double items, double units, double unique
) {
    double used = items > 0 ? 1.0 : 0.0, found = unique > 0 ? 1.0 : 0.0;
    return used * (p[8] + mixed * p[13]) + items * (p[9] + mixed * p[14]) + units * p[10]
        + unique * p[11] + found * p[12];
}

// Whether routing an item adds less than fetching its fair share, all else equal. `route` and `fetch`
// are the prices of all items.
__forceinline__ bool prefers_route(
    const double* p, int form, double wait_s, const Column& c, double route, double fetch,
    const Demand& d
) {
    double items = c.items - 1, units = c.listed - d.units, others = c.unique - d.fair;
    route -= route_s(p, form, wait_s, items, units);
    fetch -= fetch_s(p, 0, items, units, others > 0 ? others : 0.0);
    return route < fetch;
}

// For each form, what the items of each holder ask that would rather be routed. A warp takes 32 items
// of a holder.
template <class F>
__forceinline__ void prefer(const Step& s, const double* p, Column* columns) {
    const int groups = (s.N + 31) / 32;
#pragma unroll 1
    for (int task = warp(); task < F::W * F::FORMS * groups; task += F::WARPS) {
        int n = task % groups * 32 + lane(), f = task / groups % F::FORMS;
        int h = task / groups / F::FORMS;
        Column& c = columns[h];
        if (h == s.rank || c.items < 2) continue;  // one item is a mix of nothing
        double wait_s = s.wait_s ? s.wait_s[h] : 0.0;
        double route = route_s(p, f, wait_s, c.items, c.listed);
        double fetch = fetch_s(p, 0, c.items, c.listed, c.unique);
        Demand d = {0, 0, 0.0};
        if (n < s.N) d = s.demand[h * s.N + n];
        bool routed = d.units > 0 && prefers_route(p, f, wait_s, c, route, fetch, d);
        int items = __popc(__ballot_sync(EVERYONE, routed));
        int units = __reduce_add_sync(EVERYONE, routed ? d.units : 0);
        // Units that nobody else lists, at least: a multiple of 2**-28, so that sums are exact.
        double own = routed && 2 * d.fair > d.units ? 2 * d.fair - d.units : 0.0;
        own = sum_of_warp(own);
        if (lane() == 0 && items) {
            atomicAdd(&c.routed[f], items);
            atomicAdd(&c.routed_units[f], units);
            atomicAdd(&c.routed_own[f], (u64)(own * ONE_SHARE));
        }
    }
    __syncthreads();
}

// A holder's choice: the cheapest of fetch all, route all, and the marginal mixes.
template <class F>
__forceinline__ void choose(const Step& s, const double* p, int holder, Column& c) {
    double wait_s = s.wait_s ? s.wait_s[holder] : 0.0;
    double fetch = fetch_s(p, 0, c.items, c.listed, c.unique < c.listed ? c.unique : c.listed);
    int choice = FETCH, mixed = 0, home = s.first_way;
    double route = 0;
#pragma unroll 1
    for (int f = 0; f < F::FORMS; ++f) {
        double here = route_s(p, f, wait_s, c.items, c.listed);
        if (f == 0 || here < route) route = here, home = s.first_way + f;
    }
    if (F::MODE == ALWAYS_ROUTE || (F::MODE == AUTO && route < fetch)) choice = home;
    if (F::MODE == AUTO && c.items > 1) {
        double best = route < fetch ? route : fetch;
#pragma unroll 1
        for (int f = 0; f < F::FORMS; ++f) {
            double items = c.routed[f], left = c.listed - c.routed_units[f];
            double unique = c.unique - (double)c.routed_own[f] / ONE_SHARE;
            double both = route_s(p, f, wait_s, items, c.routed_units[f])
                + fetch_s(p, items > 0 ? 1.0 : 0.0, c.items - items, left,
                          unique < left ? unique : left);
            if (both < best) best = both, choice = s.first_way + f, mixed = 1;
        }
    }
    c.choice = choice, c.mixed = mixed;
}

template <class F>
__forceinline__ int way_of(
    const Step& s, const double* p, const Column& c, int n, int holder, const Demand& d
) {
    if (d.units == 0) return NOTHING;
    if (holder == s.rank) return LOCAL;
    if (F::MODE == GIVEN) return s.way[n * F::W + holder];
    if (!c.mixed) return c.choice;
    double wait_s = s.wait_s ? s.wait_s[holder] : 0.0;
    int form = c.choice - s.first_way;
    double route = route_s(p, form, wait_s, c.items, c.listed);
    double fetch = fetch_s(p, 0, c.items, c.listed, c.unique);
    return prefers_route(p, form, wait_s, c, route, fetch, d) ? c.choice : FETCH;
}

// What is asked of every holder, and the row of prices for so many of them.
template <class F>
__forceinline__ const double* ask(const Step& s, Column* columns, const int* unique_units) {
#pragma unroll 1
    for (int h = warp(); h < F::W; h += F::WARPS) {
        int items = 0, listed = 0, unique = 0;
#pragma unroll 4
        for (int n = lane(); n < s.N; n += 32) {
            Demand d = s.demand[h * s.N + n];
            items += d.units > 0, listed += d.units, unique += d.first;
        }
        Column& c = columns[h];
        items = __reduce_add_sync(EVERYONE, items), listed = __reduce_add_sync(EVERYONE, listed);
        unique = unique_units ? unique_units[h] : __reduce_add_sync(EVERYONE, unique);
        if (lane() == 0) c.items = items, c.listed = listed, c.unique = unique;
    }
    __syncthreads();
    int holders = 0;
    for (int first = 0; first < F::W; first += 32) {
        int h = first + lane();
        holders += __popc(__ballot_sync(EVERYONE, h < F::W && h != s.rank && columns[h].items > 0));
    }
    return s.prices + (holders ? holders - 1 : 0) * PRICES;
}

// Choose for every holder; the row of prices that this takes.
template <class F>
__forceinline__ const double* choose_all(const Step& s, Column* columns, const int* unique_units) {
    const double* p = ask<F>(s, columns, unique_units);
    if (F::MODE == AUTO) prefer<F>(s, p, columns);
    if (int h = threadIdx.x; F::MODE != GIVEN && h < F::W && h != s.rank) choose<F>(s, p, h, columns[h]);
    __syncthreads();
    return p;
}

// Decide for every holder, and count what is routed and fetched, in all and by items before this
// one. `flags` tells whether anything is fetched, and whether of some holder by some items only.
template <class F>
__forceinline__ void decide_columns(
    const Step& s, int item, Column* columns, u32* fetchers, u32* flags
) {
    const double* p = choose_all<F>(s, columns, nullptr);
    const int groups = (s.N + 31) / 32;
#pragma unroll 1
    for (int task = warp(); task < F::W * groups; task += F::WARPS) {
        int h = task / groups, n = task % groups * 32 + lane(), earlier = n < item;
        Column& c = columns[h];
        Demand d = {0, 0, 0.0};
        if (n < s.N) d = s.demand[h * s.N + n];
        int way = way_of<F>(s, p, c, n, h, d);
        if (n == item) c.way = way;
        if (h == s.rank) continue;
        auto add = [&](int list, int amount) {
            int all = __reduce_add_sync(EVERYONE, amount);
            int before = __reduce_add_sync(EVERYONE, earlier ? amount : 0);
            if (lane() == 0 && all) atomicAdd(&c.in_all[list], all), atomicAdd(&c.before[list], before);
        };
        u32 fetching = __ballot_sync(EVERYONE, way == FETCH);
        u32 asking = __ballot_sync(EVERYONE, d.units > 0);
#pragma unroll
        for (int f = 0; f < F::FORMS; ++f) {
            bool routed = d.units > 0 && way == s.first_way + f;
            if (fetching == asking) break;
            add(PAIRS + f, routed), add(UNITS + f, routed ? d.units : 0);
        }
        if (fetching) {
            // If all of them fetch, a unit's first lister is the first to fetch it.
            add(FETCHED, way == FETCH ? d.first : 0);
            if (way == FETCH && n % F::G == item % F::G)
                atomicOr(&fetchers[h * F::WORDS + n / F::G / 32], 1u << (n / F::G % 32));
            if (lane() == 0) atomicAdd(&c.fetchers, __popc(fetching));
        }
    }
    __syncthreads();
    if (int h = threadIdx.x; h < F::W && columns[h].fetchers)
        atomicOr(flags, columns[h].fetchers < columns[h].items ? FETCHING | MIXING : FETCHING);
    __syncthreads();
}

// What is fetched of every holder, where its items had to agree on who fetches what.
template <class F>
__forceinline__ void count_fetched(const Step& s, int item, Column* columns) {
#pragma unroll 1
    for (int h = warp(); h < F::W; h += F::WARPS) {
        int fetched = 0, before = 0;
#pragma unroll 4
        for (int n = lane(); n < s.N; n += 32) {
            int reps = s.reps[h * s.N + n];
            fetched += reps, before += n < item ? reps : 0;
        }
        fetched = __reduce_add_sync(EVERYONE, fetched), before = __reduce_add_sync(EVERYONE, before);
        Column& c = columns[h];
        if (lane() == 0) c.in_all[FETCHED] = fetched, c.before[FETCHED] = before;
    }
    __syncthreads();
}

// Where each holder's part of each list starts.
template <class F>
__forceinline__ void place_columns(Column* columns) {
#pragma unroll 1
    for (int list = warp(); list < LISTS; list += F::WARPS) {
        int carried = 0, total;
        for (int first = 0; first < F::W; first += 32) {
            Column& c = columns[first + lane() < F::W ? first + lane() : F::W];  // the last is nobody's
            c.start[list] = carried + lanes_scan(c.in_all[list], total), carried += total;
        }
    }
    __syncthreads();
}

template <class F>
struct Shared {
    Column columns[F::W + 1];
    u32 fetchers[F::W * F::WORDS];  // bits of the queries of this item's branch that fetch there
    u32 flags;
    int starts[F::W + 2];  // of each holder's units in sorted order; nobody's come last
    int counts[F::WARPS][F::W + 1];
    int totals[F::WARPS];
    u32 shares[32 * F::WORDS + 1];  // of a unit that so many list
    int ids[F::CAPACITY];
    u32 mixes[F::CAPACITY];  // of a sorted unit's coverage; later places, in the row's order
    u16 entries[F::CAPACITY], holders[F::CAPACITY];
    u16 at[F::CAPACITY];          // where in the row a sorted unit stood
    u16 before[F::CAPACITY + 1];  // flagged units before it
};

// The bits of a unit's listers, in as few accesses as they take.
template <class F>
__forceinline__ void load_listers(const Step& s, int unit, u32* bits) {
    const u32* at = s.listers + (long)(unit / F::U) * F::WORDS;
    if constexpr (F::WORDS == 1) bits[0] = __ldcg(at);
    if constexpr (F::WORDS == 2) {
        u64 both = __ldcg((const u64*)at);
        bits[0] = (u32)both, bits[1] = (u32)(both >> 32);
    }
#pragma unroll
    for (int word = 0; word + 4 <= F::WORDS; word += 4) {
        uint4 four = __ldcg((const uint4*)(at + word));
        bits[word] = four.x, bits[word + 1] = four.y;
        bits[word + 2] = four.z, bits[word + 3] = four.w;
    }
}

template <class F>
__forceinline__ void clear_listers(const Step& s, int unit) {
    u32* at = s.listers + (long)(unit / F::U) * F::WORDS;
    if constexpr (F::WORDS == 1) *at = 0;
    if constexpr (F::WORDS == 2) *(u64*)at = 0;
#pragma unroll
    for (int word = 0; word + 4 <= F::WORDS; word += 4) *(uint4*)(at + word) = {0, 0, 0, 0};
}

template <class F>
__global__ void __launch_bounds__(F::T, F::PARTS > 1 ? 1 : 1024 / F::T) plan(const __grid_constant__ Step s) {
    constexpr int PER = F::PER, B = F::B, U = F::U, G = F::G, W = F::W, WORDS = F::WORDS;
    constexpr int STAGES = F::STAGES;
    constexpr bool together = STAGES == ALL;
    SHARED_BYTES;
    Shared<F>& m = *(Shared<F>*)shared;

    const int item = blockIdx.x / F::PARTS, part = blockIdx.x % F::PARTS, query = item / G;
    const int first_unit = warp() * 32 * PER + lane(), first_of_part = part * F::CAPACITY;
    const int num_units = min(max(s.K - first_of_part, 0), F::CAPACITY);
    const long row = (long)item * s.K, own_row = row + first_of_part;
    Column* const all_parts = F::PARTS > 1 ? of_block(m.columns, 0) : m.columns;
    const bool shared_units = !(together && F::TOGETHER == ALONE) && s.N > G;
    int hidden_from = 0, hidden_to = 0;
    if (s.hidden) hidden_from = s.hidden[item * 2], hidden_to = s.hidden[item * 2 + 1];

    // Of a number that each part has for a holder, the sums over the parts before this one and over all.
    auto sum_parts = [&](int h, int Column::*count, int& earlier, int& total) {
        int before = 0, sum = 0;
        for (int other = 0; other < F::PARTS; ++other) {
            const Column* theirs = F::PARTS > 1 ? of_block(m.columns, other) : m.columns;
            before += other < part ? theirs[h].*count : 0, sum += theirs[h].*count;
        }
        earlier = before, total = sum;
    };

    // Holders, and the place of each unit among those of its holder.
    int id[PER], holder[PER], rank_in[PER], entries[PER];
    u32 mixes[PER];
#pragma unroll
    for (int j = 0; j < PER; ++j) {
        int k = first_unit + 32 * j;
        id[j] = k < num_units ? s.units[own_row + k] : -1;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < (int)sizeof(m.columns) / 4; i += F::T) ((u32*)m.columns)[i] = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < W * WORDS; i += F::T) m.fetchers[i] = 0;
#pragma unroll 1
    for (int h = lane(); h <= W; h += 32) m.counts[warp()][h] = 0;
    if (threadIdx.x == 0) m.flags = 0;
    if (shared_units && (STAGES & SHARE))
#pragma unroll 1
        for (u32 listers = threadIdx.x; listers <= 32 * WORDS; listers += F::T)
            m.shares[listers] = (ONE_SHARE + listers / 2) / (listers ? listers : 1);
    if (F::MODE != GIVEN && (STAGES & (FIRST | LIST)))
        if (int h = threadIdx.x; h < W) prefetch(s.prices + h * PRICES);
#pragma unroll
    for (int j = 0; j < PER; ++j) {
        int key = id[j] / B;
        int4 found = {-1, -1, 0, 0};  // owner, slot, generation, tokens
        if (id[j] >= 0 && key < s.num_keys) found = __ldg(s.records + key);
        holder[j] = found.y >= 0 ? s.rank : (u32)found.x < W ? found.x : W;
        entries[j] = 0, mixes[j] = 0;
        if (STAGES & COUNT) {
            int offset = id[j] % B, first = key / G * B;
#pragma unroll 1
            for (int u = offset; u < offset + U && u < found.w; ++u)
                if (first + u < hidden_from || first + u >= hidden_to)
                    entries[j] += 1, mixes[j] += mix(id[j] + u - offset, found.z);
        }
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < PER; ++j) {
        bool listed = first_unit + 32 * j < num_units;
        u32 alike = __match_any_sync(EVERYONE, listed ? holder[j] : W + 1);
        int* count = &m.counts[warp()][holder[j]];
        int earlier = *count;
        rank_in[j] = earlier + __popc(alike & lanes_before());
        __syncwarp();
        if (listed && (alike & lanes_before()) == 0) *count = earlier + __popc(alike);
        __syncwarp();
        if ((STAGES & COUNT) && shared_units && listed && holder[j] < W && holder[j] != s.rank)
            atomicOr(&s.listers[(long)(id[j] / U) * WORDS + query / 32], 1u << (query % 32));
    }
    __syncthreads();
#pragma unroll 1
    for (int h = warp(); h <= W; h += F::WARPS) {
        int count = lane() < F::WARPS ? m.counts[lane()][h] : 0, total;
        int earlier = lanes_scan(count, total);
        if (lane() < F::WARPS) m.counts[lane()][h] = earlier;
        if (lane() == 0) m.starts[h] = total;
    }
    __syncthreads();
    if (warp() == 0) {
        int carried = 0, total;
#pragma unroll 1
        for (int first = 0; first <= W; first += 32) {
            int h = first + lane(), count = h <= W ? m.starts[h] : 0;
            int start = carried + lanes_scan(count, total);
            if (h <= W) m.columns[h].count = count;
            __syncwarp();
            if (h <= W) m.starts[h] = start;
            carried += total;
        }
        if (lane() == 0) m.starts[W + 1] = carried;
    }
    sync_parts<F>();
    if (int h = threadIdx.x; h < W) {
        Column& c = m.columns[h];
        sum_parts(h, &Column::count, c.earlier, c.total);
        if ((STAGES & COUNT) && part == 0) {
            int remote = h != s.rank ? c.total : 0;
            s.pairs_units[item * W + h] = c.total;
            s.fair_units[item * W + h] = remote;  // unless others list the same
            s.demand[h * s.N + item] = {c.total, remote, (double)remote};
        }
    }
#pragma unroll
    for (int j = 0; j < PER; ++j) {
        int k = first_unit + 32 * j;
        if (k < num_units) {
            int to = m.starts[holder[j]] + m.counts[warp()][holder[j]] + rank_in[j];
            m.ids[to] = id[j], m.holders[to] = holder[j], m.at[to] = k;
            if (STAGES & COUNT) m.mixes[to] = mixes[j], m.entries[to] = entries[j];
        }
    }
    u64 ticket = arrive<F>(s);

    // From here on a thread's units are those at its places in the sorted order.
#pragma unroll
    for (int j = 0; j < PER; ++j) {
        int to = first_unit + 32 * j;
        id[j] = to < num_units ? m.ids[to] : -1, holder[j] = to < num_units ? m.holders[to] : W;
    }
    auto each = [&](auto&& what) {
#pragma unroll
        for (int j = 0; j < PER; ++j) what(j, first_unit + 32 * j, id[j], holder[j]);
    };
    // Sum two numbers of each unit by holder: in sorted order a warp has few different ones.
    auto by_holder = [&](int h, bool some, u32 a, u32 b, u32 Column::*sum_a, u32 Column::*sum_b) {
        u32 left = __ballot_sync(EVERYONE, some);
        while (left) {
            int leader = __ffs(left) - 1, which = __shfl_sync(EVERYONE, h, leader);
            bool among = some && h == which;
            u32 all_a = __reduce_add_sync(EVERYONE, among ? a : 0);
            u32 all_b = __reduce_add_sync(EVERYONE, among ? b : 0);
            if (lane() == leader) {
                atomicAdd(&(all_parts[which].*sum_a), all_a);
                atomicAdd(&(all_parts[which].*sum_b), all_b);
            }
            left &= ~__ballot_sync(EVERYONE, among);
        }
    };
    // How many of the flagged units come before each; flags are bits, one for each of a thread's units.
    auto rank_flagged = [&](u32 flags) {
        int mine = 0, total;
#pragma unroll
        for (int j = 0; j < PER; ++j) {
            u32 who = __ballot_sync(EVERYONE, flags >> j & 1);
            m.before[first_unit + 32 * j] = mine + __popc(who & lanes_before());
            mine += __popc(who);
        }
        __syncthreads();  // nobody reads `totals` of an earlier call any more
        if (lane() == 0) m.totals[warp()] = mine;
        __syncthreads();
        int earlier = lanes_scan(lane() < F::WARPS ? m.totals[lane()] : 0, total);
        earlier = __shfl_sync(EVERYONE, earlier, warp());
#pragma unroll
        for (int j = 0; j < PER; ++j) m.before[first_unit + 32 * j] += earlier;
        if (threadIdx.x == 0) m.before[F::CAPACITY] = total;
        __syncthreads();
        if (int h = threadIdx.x; h < W)
            m.columns[h].flagged = m.before[m.starts[h + 1]] - m.before[m.starts[h]];
        sync_parts<F>();
        if (int h = threadIdx.x; h < W) {
            Column& c = m.columns[h];
            sum_parts(h, &Column::flagged, c.flagged_earlier, c.flagged_total);
        }
    };
    auto earlier_listers = [&](int word) {  // bits of the queries before this one
        return word * 32 + 32 <= query ? ~0u : word * 32 > query ? 0u : (1u << (query % 32)) - 1;
    };

    if (STAGES & COUNT) {
        each([&](int j, int to, int, int h) {
            bool some = h < W;
            u32 all = some ? m.entries[to] : 0;
            by_holder(h, some, all, some ? m.mixes[to] : 0, &Column::entries, &Column::mix);
        });
        sync_parts<F>();
        if (int h = threadIdx.x; h < W && part == 0) {
            s.expected[(item * W + h) * 2] = m.columns[h].entries;
            s.expected[(item * W + h) * 2 + 1] = m.columns[h].mix;
        }
    }
    wait<F>(s, ticket);  // 1

    u32 firsts = 0, alone = 0;  // bits of units that nobody before, or nobody else, lists
    if (shared_units && (STAGES & SHARE)) {
        u32 bits[PER][WORDS];
        each([&](int j, int, int unit, int h) {
            if (h < W && h != s.rank) load_listers<F>(s, unit, bits[j]);
        });
        each([&](int j, int, int unit, int h) {
            bool remote = h < W && h != s.rank;
            u32 listers = 0, earlier = 0, share = 0;
            if (remote) {
#pragma unroll
                for (int word = 0; word < WORDS; ++word)
                    listers += __popc(bits[j][word]), earlier |= bits[j][word] & earlier_listers(word);
                share = m.shares[listers];
                firsts |= (earlier == 0) << j, alone |= (listers == 1) << j;
            }
            by_holder(h, remote, share & 0x3fff, share >> 14, &Column::low, &Column::high);
        });
        rank_flagged(firsts);
        if (int h = threadIdx.x; h < W && part == 0) {
            const Column& c = m.columns[h];
            double fair = ((double)c.high * 16384 + c.low) / ONE_SHARE;
            s.fair_units[item * W + h] = fair;
            s.demand[h * s.N + item] = {c.total, c.flagged_total, fair};
        }
        ticket = arrive<F>(s);
    }
    if (STAGES & LIST) {
        if (threadIdx.x == 0) s.local_lengths[item] = m.columns[s.rank].total;
        each([&](int, int to, int unit, int h) {
            if (h != s.rank) return;
            int local = unit;
            if (s.fill) {
                int key = unit / B, offset = unit % B, entry = key / G * B + offset;
                int slot = s.records[key].y;
                bool there = offset < s.fill[slot];
                if (U == 1) there = there && (entry < hidden_from || entry >= hidden_to);
                local = there ? slot * B + offset : -1;
            }
            s.local_units[row + m.columns[h].earlier + to - m.starts[h]] = local;
        });
    }
    if (shared_units && (STAGES & SHARE)) wait<F>(s, ticket);  // 2

    if (STAGES & (FIRST | LIST)) {
        decide_columns<F>(s, item, m.columns, m.fetchers, &m.flags);
    } else if (STAGES & PLACE) {
        if (int h = threadIdx.x; h < W) m.columns[h].way = s.way[item * W + h];
        __syncthreads();
    }
    const bool fetching = m.flags & FETCHING;
    const bool mixing = shared_units && (together ? m.flags & MIXING : fetching);
    // A unit's first lister may route it; then the first that fetches it counts and seats it.
    u32 chosen = 0;
    int seat[PER];
#pragma unroll
    for (int j = 0; j < PER; ++j) seat[j] = -1;
    if (mixing || fetching) {
        each([&](int j, int, int unit, int h) {
            if (h == W || h == s.rank || m.columns[h].way != FETCH) return;
            bool first = !shared_units || (firsts >> j & 1);
            if (mixing) {
                u32 clash = 0, bits[WORDS];
                load_listers<F>(s, unit, bits);
#pragma unroll
                for (int word = 0; word < WORDS; ++word)
                    clash |= bits[word] & earlier_listers(word) & m.fetchers[h * WORDS + word];
                first = clash == 0;
            }
            if (first) chosen |= 1u << j;
        });
    }
    if (mixing) {
        rank_flagged(chosen);
        if (STAGES & FIRST)
            if (int h = threadIdx.x; h < W && part == 0)
                s.reps[h * s.N + item] = m.columns[h].flagged_total;
        if (together) wait<F>(s, arrive<F>(s));  // 3
        if (STAGES & LIST) count_fetched<F>(s, item, m.columns);
    }

    if (STAGES & LIST) {
        place_columns<F>(m.columns);
        if (int h = threadIdx.x; h < W && part == 0) {
            const Column& c = m.columns[h];
            if (F::MODE != GIVEN) s.way[item * W + h] = c.way;
#pragma unroll
            for (int f = 0; f < F::FORMS; ++f) {
                if (h != s.rank && c.way == s.first_way + f) {
                    int pair = f * W * s.N + c.start[PAIRS + f] + c.before[PAIRS + f];
                    s.items[pair] = item;
                    s.units_of[pair] = c.total;
                    const int* expected = s.expected + (item * W + h) * 2;
                    s.items_expected[pair * 2] = together ? c.entries : expected[0];
                    s.items_expected[pair * 2 + 1] = together ? c.mix : expected[1];
                }
                if (item == s.N - 1) {
                    s.pairs[f * W + h] = c.in_all[PAIRS + f];
                    s.listed[f * W + h] = c.in_all[UNITS + f];
                }
            }
            if (item == s.N - 1) s.counts[h] = c.in_all[FETCHED], s.unique_units[h] = c.unique;
        }
        each([&](int j, int to, int unit, int h) {
            if (h == W || h == s.rank) return;
            const Column& c = m.columns[h];
            int form = c.way == FETCH ? -1 : c.way - s.first_way, place = to - m.starts[h];
            if (form >= 0 && form < F::FORMS)
                s.route_units[form * s.N * s.K + c.start[UNITS + form] + c.before[UNITS + form]
                              + c.earlier + place] = unit;
            if (chosen >> j & 1) {
                // Where nothing was mixed, what is flagged is still first listers.
                seat[j] = c.start[FETCHED] + c.before[FETCHED]
                    + (shared_units ? c.flagged_earlier + m.before[to] - m.before[m.starts[h]]
                                    : c.earlier + place);
                s.fetch_units[seat[j]] = unit;
                if (shared_units && !(together && alone >> j & 1)) s.seats[unit / U] = seat[j];
            }
        });
    }
    const bool seats = together && shared_units && fetching;  // others' are asked for
    if (seats) ticket = arrive<F>(s);
    if (shared_units && (STAGES & PLACE))  // everyone has read them
        each([&](int j, int, int unit, int h) {
            if (h == W || h == s.rank) return;
            if (!together) s.listers[(long)(unit / U) * WORDS + query / 32] = 0;
            else if (firsts >> j & 1) clear_listers<F>(s, unit);
        });
    if (seats) wait<F>(s, ticket);  // 4
    if (STAGES & (shared_units ? PLACE : LIST)) {
        each([&](int j, int to, int unit, int h) {
            if (h < W && h != s.rank && m.columns[h].way == FETCH && seat[j] < 0)
                seat[j] = __ldcg(&s.seats[unit / U]);
            if (to < num_units) m.mixes[m.at[to]] = seat[j];
        });
        __syncthreads();
#pragma unroll
        for (int j = 0; j < PER; ++j)
            if (int k = first_unit + 32 * j; k < num_units) s.place[own_row + k] = m.mixes[k];
    }
    // Others may still read this block's memory.
    if constexpr (F::PARTS > 1) cluster_arrive_relaxed(), cluster_wait();
}

// The decision alone, with the number of different units at hand.
template <class F>
__global__ void __launch_bounds__(F::T) decide(const __grid_constant__ Step s) {
    SHARED_BYTES;
    Column* columns = (Column*)shared;
#pragma unroll 1
    for (int i = threadIdx.x; i < (int)sizeof(Column) / 4 * F::W; i += F::T) ((u32*)columns)[i] = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < s.N * F::W; i += F::T)
        s.demand[i % F::W * s.N + i / F::W] = {s.pairs_units[i], 0, s.fair_units[i]};
    __syncthreads();
    const double* p = choose_all<F>(s, columns, s.unique_units);
#pragma unroll 1
    for (int i = threadIdx.x; i < s.N * F::W; i += F::T) {
        int n = i / F::W, h = i % F::W;
        s.way[i] = way_of<F>(s, p, columns[h], n, h, s.demand[h * s.N + n]);
    }
}
