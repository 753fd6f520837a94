// Route or fetch, for every holder: the closed form of the cost model, and what follows from its choice.

#pragma once

#include "device.cuh"

enum Way { NOTHING = 0, LOCAL = 1, ROUTE = 2, FETCH = 4 };
enum PlanMode { AUTO, ALWAYS_ROUTE, ALWAYS_FETCH, GIVEN };
enum Stage { COUNT = 1, SHARE = 2, FIRST = 4, LIST = 8, PLACE = 16, ALL = 31 };
enum Together { ALONE, GRID };

// What is the same for every launch of a deployment: threads, units of a thread, blocks of an item, the
// sizes that letters stand for, words of a unit's bits, forms that may be chosen; then the mode, the
// stages, and how all wait.
template <
    int T_, int PER_, int PARTS_, int B_, int U_, int G_, int W_, int WORDS_, int FORMS_, int MODE_, int STAGES_,
    int TOGETHER_>
struct Fixed {
    static constexpr int T = T_, PER = PER_, PARTS = PARTS_, B = B_, U = U_, G = G_, W = W_, WORDS = WORDS_;
    static constexpr int FORMS = FORMS_, MODE = MODE_, STAGES = STAGES_, TOGETHER = TOGETHER_;
    static constexpr int WARPS = T / 32, CAPACITY = T * PER;
};

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

struct StepArgs {
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
static_assert(sizeof(Column) == 168, "decide.py says how much shared memory that takes");

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
__forceinline__ void prefer(const StepArgs& s, const double* p, Column* columns) {
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
        // A lower bound of the units that no other item lists: a multiple of 2**-28, so that sums are exact.
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
__forceinline__ void choose(const StepArgs& s, const double* p, int holder, Column& c) {
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
    const StepArgs& s, const double* p, const Column& c, int n, int holder, const Demand& d
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
__forceinline__ const double* ask(const StepArgs& s, Column* columns, const int* unique_units) {
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
__forceinline__ const double* choose_all(const StepArgs& s, Column* columns, const int* unique_units) {
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
    const StepArgs& s, int item, Column* columns, u32* fetchers, u32* flags
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
__forceinline__ void count_fetched(const StepArgs& s, int item, Column* columns) {
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
            Column& c = columns[first + lane() < F::W ? first + lane() : F::W];  // the last stands for no rank
            c.start[list] = carried + lanes_scan(c.in_all[list], total), carried += total;
        }
    }
    __syncthreads();
}
