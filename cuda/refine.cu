// A further pass: where a cut falls inside a bin of unequal values, the 16 bits below those that are known.
#include "pair.cuh"
#include "reduce.cuh"

// Add one to the bin of what follows a prefix; `rows` holds LOW_BINS for each prefix.
__device__ inline void count_below(u64 bits, u32 shift, const u64* prefixes, u32 count, u32 stride, u64* rows) {
    const u64 known = bits >> shift;
    for (u32 i = 0; i < count; ++i)
        if (known == prefixes[i]) atomicAdd(&rows[(u64)i * stride * LOW_BINS + (bits >> (shift - 16) & 0xffff)], 1ull);
}

__device__ inline void refine_coordinate(const Coordinate& c, const Search& search, u32* above, double* tails,
                                         u64* rows) {
    u64* weight_rows = rows + (u64)search.delta_count * LOW_BINS;
    const u64 weight = magnitude<COMPARE>(c.a);
    count_below(weight, search.shift, search.weights, search.weight_count, 2, weight_rows);
    if (!c.changed) return;
    count_below(weight, search.shift, search.weights, search.weight_count, 2, weight_rows + LOW_BINS);
    if (!c.finite) return;
    count_below(c.size, search.shift, search.deltas, search.delta_count, 1, rows);
    const double square = (double)c.d * (double)c.d;
    u32 thresholds = 0;
#pragma unroll
    for (u32 i = 0; i < LIMITS; ++i) thresholds += c.size > (Bits)search.thresholds[i];
    atomicAdd(&above[thresholds], 1u);
#pragma unroll
    for (u32 i = 0; i < TAILS; ++i)
        if (c.size > (Bits)search.tails[i]) tails[i] += square;
}

// Each block takes a run of tiles of one pair. `sums` receives the tails of each tile in a row; `rows` holds LOW_BINS
// zeros for each open cut of |d|, then twice as many for each of the base: all coordinates, and the changed ones.
extern "C" __global__ void __launch_bounds__(THREADS)
    refine(const Tile* tiles, u32 tile_count, Search search, const u8* base, const u8* tuned, double* sums,
           Record* record, u64* rows) {
    __shared__ u32 above[LIMITS + 1];
    __shared__ double scratch[WARPS * TAILS];
    if (threadIdx.x <= LIMITS) above[threadIdx.x] = 0;
    __syncthreads();
    const u32 first = (u32)((u64)tile_count * blockIdx.x / gridDim.x);
    const u32 stop = (u32)((u64)tile_count * (blockIdx.x + 1) / gridDim.x);
    for (u32 t = first; t < stop; ++t) {
        const Tile tile = tiles[t];
        double tails[TAILS] = {};
        for (u32 start = threadIdx.x * N; start < tile.numel; start += THREADS * N) {
            const Neighbours<BASE, N> x(base + tile.base + (u64)start * BASE::BITS / 8);
            const Neighbours<TUNED, N> y(tuned + tile.tuned + (u64)start * TUNED::BITS / 8);
#pragma unroll
            for (u32 k = 0; k < N; ++k) {
                if (start + k >= tile.numel) continue;
                refine_coordinate(Coordinate(x[k], y[k]), search, above, tails, rows);
            }
        }
        block_sums(tails, scratch, sums + (u64)t * SUMS);
    }
    __syncthreads();
    if (threadIdx.x <= LIMITS && above[threadIdx.x]) atomicAdd(&record->above[threadIdx.x], (u64)above[threadIdx.x]);
}
