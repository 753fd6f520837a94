// From selected units to who is asked for what; the launcher, and what each table is: plan.py.
//
// Letters: Q queries, G branches, N = Q * G items, K units of an item, W ranks, B tokens of a block,
// U tokens of a unit. An item is a thread block, or, while SMs are idle, a cluster of blocks that take
// parts of its units. A block sorts its units by holder in shared memory, once; whatever follows walks
// them in that order. What items must know of one another goes through small matrices (W, N), and
// through one bit per (unit, query) in `listers`: from its unit's bits an item knows how many list it
// (the fair share), whether it is the first of them (a unit is counted, and fetched, by its first
// lister), and with the ways at hand whether it is the first that fetches. So counts and shares are
// exact, and the order of all lists follows from the input alone.
//
// All wait for all at a gate in memory (1) after bits and counts, (2) after the shares; then every block
// decides for every holder itself, which costs less than another exchange; (3) only where a holder's items are
// partly fetched, and (4) only where units are fetched. Items that are more than are resident take one
// launch for each stage instead. Loops are not unrolled where that only adds code: it runs once a
// launch, from a cold instruction cache.

#include "decide.cuh"

__forceinline__ u32 mix(u32 id, u32 generation) {  // coverage.py defines it
    u32 x = id * 0x9E3779B1u + generation * 0x85EBCA77u + 0x165667B1u;
    x = (x ^ (x >> 15)) * 0x2C1B3C6Du;
    x = (x ^ (x >> 12)) * 0x297A2D39u;
    return x ^ (x >> 15);
}

// Wait for the other parts of this item; their shared memory shows what they wrote before.
template <class F>
__forceinline__ void sync_parts() {
    if constexpr (F::PARTS > 1) cluster_arrive(), cluster_wait();
    else __syncthreads();
}

// What lies there in the shared memory of a part of this item.
template <class F, class V>
__forceinline__ V* of_part(V* here, int part) {
    if constexpr (F::PARTS > 1) return of_block(here, part);
    else return here;
}

// Publish this block's writes and count its arrival; `wait` takes the ticket. The gate's upper half counts
// how often all have arrived, its lower half is zero between: block 0 adds what the others leave to
// be carried, so it never needs to be reset.
template <class F>
__forceinline__ u64 arrive(const StepArgs& s) {
    __syncthreads();
    u64 ticket = 0;
    if (F::TOGETHER == GRID && threadIdx.x == 0)
        ticket = add_release(s.gate, blockIdx.x ? 1 : (1ull << 32) + 1 - gridDim.x);
    return ticket;
}

template <class F>
__forceinline__ void wait(const StepArgs& s, u64 ticket) {
    if constexpr (F::TOGETHER == GRID) {
        if (threadIdx.x == 0)
            while (load_acquire(s.gate) >> 32 == ticket >> 32) {}
        __syncthreads();
    }
}

template <class F>
struct Shared {
    Column columns[F::W + 1];
    u32 fetchers[F::W * F::WORDS];  // bits of the queries of this item's branch that fetch there
    u32 flags;
    int starts[F::W + 2];  // of each holder's units in sorted order; those without a holder come last
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
__forceinline__ void load_listers(const StepArgs& s, int unit, u32* bits) {
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
__forceinline__ void clear_listers(const StepArgs& s, int unit) {
    u32* at = s.listers + (long)(unit / F::U) * F::WORDS;
    if constexpr (F::WORDS == 1) *at = 0;
    if constexpr (F::WORDS == 2) *(u64*)at = 0;
#pragma unroll
    for (int word = 0; word + 4 <= F::WORDS; word += 4) *(uint4*)(at + word) = {0, 0, 0, 0};
}

template <class F>
__global__ void __launch_bounds__(F::T, F::PARTS > 1 ? 1 : 1024 / F::T) plan(const __grid_constant__ StepArgs s) {
    constexpr int PER = F::PER, B = F::B, U = F::U, G = F::G, W = F::W, WORDS = F::WORDS;
    constexpr int STAGES = F::STAGES;
    constexpr bool together = STAGES == ALL;
    SHARED_BYTES;
    Shared<F>& m = *(Shared<F>*)shared;

    let_next_begin();
    const int item = blockIdx.x / F::PARTS, part = blockIdx.x % F::PARTS, query = item / G;
    const int first_unit = warp() * 32 * PER + lane(), first_of_part = part * F::CAPACITY;
    const int num_units = min(max(s.K - first_of_part, 0), F::CAPACITY);
    const long row = (long)item * s.K, own_row = row + first_of_part;
    Column* const all_parts = of_part<F>(m.columns, 0);
    const bool shared_units = !(together && F::TOGETHER == ALONE) && s.N > G;
    int hidden_from = 0, hidden_to = 0;
    if (s.hidden) hidden_from = s.hidden[item * 2], hidden_to = s.hidden[item * 2 + 1];

    // Of a number that each part has for a holder, the sums over the parts before this one and over all.
    auto sum_parts = [&](int h, int Column::*count, int& earlier, int& total) {
        int before = 0, sum = 0;
        for (int other = 0; other < F::PARTS; ++other) {
            const Column* theirs = of_part<F>(m.columns, other);
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
        __syncthreads();  // all reads of `totals` of an earlier call are over
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

    u32 firsts = 0, alone = 0;  // bits of units that no earlier item, or no other item, lists
    if (shared_units && (STAGES & SHARE)) {
        constexpr bool ahead = PER * WORDS <= 32;  // as many registers at most
        u32 bits[ahead ? PER : 1][WORDS];
        each([&](int j, int, int unit, int h) {
            if (ahead && h < W && h != s.rank) load_listers<F>(s, unit, bits[j]);
        });
        each([&](int j, int, int unit, int h) {
            bool remote = h < W && h != s.rank;
            u32 listers = 0, earlier = 0, share = 0;
            if (remote) {
                u32* these = bits[ahead ? j : 0];
                if (!ahead) load_listers<F>(s, unit, these);
#pragma unroll
                for (int word = 0; word < WORDS; ++word)
                    listers += __popc(these[word]), earlier |= these[word] & earlier_listers(word);
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
                int slot = s.records[key].y;  // -1 where this rank owns what it does not have yet
                bool there = slot >= 0 && offset < s.fill[slot];
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
__global__ void __launch_bounds__(F::T) decide(const __grid_constant__ StepArgs s) {
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
