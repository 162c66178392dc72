// The scan: everything that is known of a pair after one read of it.
#include "hot.cuh"
#include "pair.cuh"
#include "reduce.cuh"

typedef Wider<BASE, TUNED>::Format Common;

const bool WIDE = COMPARE::BITS > 16;
const bool ROUNDS = !same_format<Wider<BASE, COMPARE>::Format, COMPARE>; // the base may lie between values of COMPARE
const bool ABSORBS = ROUNDS || !same_format<Wider<TUNED, COMPARE>::Format, COMPARE>; // or the tuned side may
const u32 HOT_DELTA = COMPARE::BITS == 64 ? (1023 - 150) * 16 : (127 - 31) * 128;

// What one thread found.
struct Own {
    u64 counts = 0; // of a tile: sixteen bits for each Count up to OFF_GRID, since registers are short
    u32 zeros = 0; // too many coordinates may be zero to count them with atomics
    u32 ties = 0;
    Bits largest = 0; // |d|
    double sums[TIES] = {};
};

static_assert(TILE / THREADS < 1 << 16 && OFF_GRID < 4, "a count of a tile does not fit into sixteen bits");

// Add the counts of a tile to those of the block.
__device__ inline void add_counts(Own& own, Hot& hot) {
#pragma unroll
    for (u32 i = 0; i <= OFF_GRID; ++i) {
        const u32 sum = warp_sum((u32)(own.counts >> 16 * i) & 0xffff);
        if (threadIdx.x % WARP == 0 && sum) atomicAdd(&hot.counts[i], sum);
    }
    own.counts = 0;
}

__device__ inline bool stored_equal(BASE::Code x, TUNED::Code y) {
    const Common::Code a = recode<Common, BASE>(x), b = recode<Common, TUNED>(y);
    return a == b || (magnitude<Common>(a) | magnitude<Common>(b)) == 0;
}

__device__ inline bool off_grid(BASE::Code x, COMPARE::Code a) {
    return ROUNDS && magnitude<BASE>(x) <= BASE::INFINITE && (double)value<BASE>(x) != (double)value<COMPARE>(a);
}

// Squares of d as stored, where that is finite, and of what the cast hides of them.
__device__ inline void measure_stored(BASE::Code x, TUNED::Code y, bool changed, Own& own) {
    if (!ABSORBS) return;
    const double d = (double)value<TUNED>(y) - (double)value<BASE>(x);
    if (magnitude_bits(d) >= F64::INFINITE) return;
    own.sums[STORED_SQUARE] += d * d;
    if (!changed) own.sums[ABSORBED_SQUARE] += d * d;
}

// Whether the mask rule takes a changed coordinate; which of those tied at the cut of TOP, ties.cu decides.
__device__ inline bool chosen(const Coordinate& c, const ScanSettings& settings) {
    switch (settings.rule) {
    case NONE: return false;
    case BITWISE: return true;
    case ETA: return !c.finite || !c.within(settings.cut_eta);
    default: return c.size > (Bits)settings.cut; // NaN and Inf have the largest patterns
    }
}

// Figures of d, of a changed coordinate where d is finite.
__device__ inline void measure_delta(const Coordinate& c, const ScanSettings& settings, Own& own, Hot& hot,
                                     u64* rows) {
    const double d = c.d;
    own.sums[DELTA] += d;
    own.sums[ABS_DELTA] += fabs(d);
    own.sums[DELTA_SQUARE] += d * d;
    own.sums[BASE_DELTA] += (double)c.v * d;
    own.ties += c.size == (Bits)settings.tie;
    own.largest = c.size > own.largest ? c.size : own.largest;
    if (settings.eta > 0) own.counts += (u64)c.within(settings.eta) << 16 * WITHIN_ETA;
    u32 above = 0;
#pragma unroll
    for (u32 i = 0; i < LIMITS; ++i) above += c.size > (Bits)settings.thresholds[i];
    atomicAdd(&hot.above[above], 1u);
    atomicAdd(&hot.ulp[floor_log2(c.distance())], 1u);
    const u32 bin = (u32)(c.size >> (sizeof(Bits) * 8 - 16));
    if (!count_bin(hot.deltas, HOT_DELTA, bin)) atomicAdd(&rows[DELTAS * BINS + bin], 1ull);
    const u64 low = c.size & 0xffff;
    if (sizeof(Bits) == 4 && low) {
        atomicAdd(&rows[LOW_BITS * BINS + bin], low);
        atomicAdd(&rows[LOW_SQUARES * BINS + bin], low * low);
    }
}

// Count the weight of a coordinate that is not zero.
__device__ inline void measure_weight(u32 bin, bool changed, Hot& hot, u64* rows) {
    if (count_bin(changed ? hot.changed : hot.unchanged, COMPARE::HOT, bin)) return;
    atomicAdd(&rows[WEIGHTS * BINS + bin], 1ull);
    if (changed) atomicAdd(&rows[CHANGED_WEIGHTS * BINS + bin], 1ull);
}

// Returns whether the coordinate belongs to the mask.
__device__ inline bool measure(BASE::Code x, TUNED::Code y, const ScanSettings& settings, Own& own, Hot& hot,
                               u64* rows) {
    const Coordinate c(x, y);
    own.counts += (u64)stored_equal(x, y) << 16 * STORED_EQUAL;
    if (magnitude<BASE>(x) >= BASE::INFINITE) atomicAdd(&hot.counts[NONFINITE_BASE], 1u);
    if (magnitude<TUNED>(y) >= TUNED::INFINITE) atomicAdd(&hot.counts[NONFINITE_TUNED], 1u);
    own.counts += (u64)off_grid(x, c.a) << 16 * OFF_GRID;
    measure_stored(x, y, c.changed, own);
    const u32 bin = c.weight_bin();
    if (bin == 0) {
        ++own.zeros;
        if (c.changed) atomicAdd(&hot.changed_zeros, 1u);
    } else {
        measure_weight(bin, c.changed, hot, rows);
    }
    if (!c.finite) atomicAdd(&hot.counts[NONFINITE_DELTA], 1u);
    else if (WIDE) own.sums[BASE_SQUARE] += (double)c.v * (double)c.v;
    if (!c.changed) return false;
    if (c.finite) measure_delta(c, settings, own, hot, rows);
    else atomicAdd(&rows[LOST_WEIGHTS * BINS + bin], 1ull);
    return chosen(c, settings);
}

// Add what the block found to a record and its histograms, and forget it; all threads are done counting.
__device__ inline void hand_over(Own& own, Hot& hot, Record* record, u64* rows) {
    flush_weights(hot, rows + WEIGHTS * BINS + COMPARE::HOT, rows + CHANGED_WEIGHTS * BINS + COMPARE::HOT);
    flush(&hot.changed_zeros, 1, rows + CHANGED_WEIGHTS * BINS);
    flush(hot.deltas, WINDOW, rows + DELTAS * BINS + HOT_DELTA);
    flush(hot.counts, COUNTS, record->counts);
    flush(hot.ulp, 64, record->ulp);
    flush(hot.above, LIMITS + 1, record->above);
    const bool first_lane = threadIdx.x % WARP == 0;
    const u32 zeros = warp_sum(own.zeros);
    if (first_lane && zeros) atomicAdd(&rows[WEIGHTS * BINS], (u64)zeros);
    const Bits largest = warp_max(own.largest);
    if (first_lane) atomicMax(&record->largest, (u64)largest);
    own.zeros = 0;
    own.largest = 0;
    __syncthreads(); // before anyone counts again
}

// Each block takes a run of tiles. `mask` may be null; `rows` holds ROWS * BINS zeros for each record.
extern "C" __global__ void __launch_bounds__(THREADS)
    scan(const Tile* tiles, u32 tile_count, ScanSettings settings, const u8* base, const u8* tuned, u8* mask,
         double* sums, Record* records, u64* rows) {
    __shared__ Hot hot;
    __shared__ double scratch[WARPS * SUMS];
    hot.clear();
    __syncthreads();
    const u32 first = (u32)((u64)tile_count * blockIdx.x / gridDim.x);
    const u32 stop = (u32)((u64)tile_count * (blockIdx.x + 1) / gridDim.x);
    Own own;
    for (u32 t = first; t < stop; ++t) {
        const Tile tile = tiles[t];
        u64* own_rows = rows + (u64)tile.record * (ROWS * BINS);
#pragma unroll
        for (u32 i = 0; i < TIES; ++i) own.sums[i] = 0;
        own.ties = 0;
        for (u32 start = threadIdx.x * 8; start < tile.numel; start += THREADS * 8) {
            u32 bits = 0;
#pragma unroll 1
            for (u32 part = 0; part < 8; part += N) {
                const Neighbours<BASE, N> x(base + tile.base + (u64)(start + part) * BASE::BITS / 8);
                const Neighbours<TUNED, N> y(tuned + tile.tuned + (u64)(start + part) * TUNED::BITS / 8);
#pragma unroll
                for (u32 k = 0; k < N; ++k) {
                    if (start + part + k >= tile.numel) continue;
                    bits |= (u32)measure(x[k], y[k], settings, own, hot, own_rows) << (part + k);
                }
            }
            own.counts += (u64)__popc(bits) << 16 * MASKED;
            if (mask) mask[tile.mask + start / 8] = (u8)bits;
        }
        add_counts(own, hot);
        const double tile_sums[SUMS] = {own.sums[DELTA],         own.sums[ABS_DELTA],       own.sums[DELTA_SQUARE],
                                        own.sums[BASE_DELTA],    own.sums[BASE_SQUARE],     own.sums[STORED_SQUARE],
                                        own.sums[ABSORBED_SQUARE], (double)own.ties};
        block_sums(tile_sums, scratch, sums + (u64)t * SUMS);
        if (t + 1 == stop || tiles[t + 1].record != tile.record)
            hand_over(own, hot, &records[tile.record], own_rows);
    }
}
