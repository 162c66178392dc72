// The mask rule TOP: of the coordinates tied at the cut it takes as many as are wanted, evenly spread in row-major
// order. So each needs its ordinal among all ties of the tensor.
#include "pair.cuh"
#include "reduce.cuh"

// Ordinal of the first tie of each tile, by one thread. `next` is where those of this launch start, unless it `begins`
// a span, whose first tie is `first`; and then where those of the next launch will.
extern "C" __global__ void place_ties(const double* sums, u32 tile_count, u32 begins, u64 first, u64* firsts,
                                      u64* next) {
    u64 ordinal = begins ? first : *next;
    for (u32 t = 0; t < tile_count; ++t) {
        firsts[t] = ordinal;
        ordinal += (u64)sums[(u64)t * SUMS + TIES];
    }
    *next = ordinal;
}

// The sum over the threads before this one; `total` receives that over all, `warps` is work space.
__device__ inline u32 sum_before(u32 own, u32* warps, u32& total) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 upto = own;
    for (u32 step = 1; step < WARP; step *= 2) {
        const u32 other = __shfl_up_sync(ALL_LANES, upto, step);
        if (lane >= step) upto += other;
    }
    if (lane == WARP - 1) warps[warp] = upto;
    __syncthreads();
    u32 before = upto - own;
    total = 0;
    for (u32 w = 0; w < WARPS; ++w) {
        if (w < warp) before += warps[w];
        total += warps[w];
    }
    __syncthreads(); // before the next call writes
    return before;
}

// One bit for each of eight neighbours that are tied at the cut.
__device__ inline u32 tied(const u8* base, const u8* tuned, u32 left, u64 tie) {
    u32 bits = 0;
#pragma unroll 1
    for (u32 k = 0; k < 8 && k < left; ++k) {
        const Coordinate c(load<BASE>(base, k), load<TUNED>(tuned, k));
        bits |= (u32)(c.changed && c.size == (Bits)tie) << k;
    }
    return bits;
}

// Each block takes whole tiles; `mask` may be null.
extern "C" __global__ void __launch_bounds__(THREADS)
    take_ties(const Tile* tiles, u32 tile_count, ScanSettings settings, const u8* base, const u8* tuned, u8* mask,
              const u64* firsts, Record* records) {
    __shared__ u32 warps[WARPS];
    for (u32 t = blockIdx.x; t < tile_count; t += gridDim.x) {
        const Tile tile = tiles[t];
        u64 ordinal = firsts[t];
        u32 taken = 0;
        for (u32 row = 0; row < tile.numel; row += THREADS * 8) {
            const u32 start = row + threadIdx.x * 8;
            u32 ties = 0, kept = 0, in_row;
            if (start < tile.numel)
                ties = tied(base + tile.base + (u64)start * BASE::BITS / 8,
                            tuned + tile.tuned + (u64)start * TUNED::BITS / 8, tile.numel - start, settings.tie);
            u64 own = ordinal + sum_before(__popc(ties), warps, in_row);
            for (; ties; ties &= ties - 1, ++own)
                if ((own + 1) * settings.take / settings.ties > own * settings.take / settings.ties)
                    kept |= ties & (~ties + 1);
            if (mask && kept) mask[tile.mask + start / 8] |= (u8)kept;
            taken += __popc(kept);
            ordinal += in_row;
        }
        const u32 sum = warp_sum(taken);
        if (threadIdx.x % WARP == 0 && sum) atomicAdd(&records[tile.record].counts[MASKED], (u64)sum);
    }
}
