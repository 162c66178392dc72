// Sums and maxima over the threads of a warp or block; the order is fixed, so floating sums are too.
#pragma once
#include "layout.cuh"

const u32 WARP = 32, WARPS = THREADS / WARP, ALL_LANES = 0xffffffff;

// The sum over a warp, in its first lane.
template <class T> __device__ inline T warp_sum(T x) {
    for (u32 step = WARP / 2; step; step /= 2) x += __shfl_down_sync(ALL_LANES, x, step);
    return x;
}

// The maximum over a warp, in its first lane.
template <class T> __device__ inline T warp_max(T x) {
    for (u32 step = WARP / 2; step; step /= 2) {
        const T other = __shfl_down_sync(ALL_LANES, x, step);
        x = other > x ? other : x;
    }
    return x;
}

// Writes the sums over the block of COLUMNS numbers a thread; `warps` is work space.
template <u32 COLUMNS> __device__ inline void block_sums(const double (&own)[COLUMNS], double* warps, double* out) {
#pragma unroll
    for (u32 i = 0; i < COLUMNS; ++i) {
        const double sum = warp_sum(own[i]);
        if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP * COLUMNS + i] = sum;
    }
    __syncthreads();
    if (threadIdx.x < COLUMNS) {
        double sum = 0;
        for (u32 warp = 0; warp < WARPS; ++warp) sum += warps[warp * COLUMNS + threadIdx.x];
        out[threadIdx.x] = sum;
    }
    __syncthreads(); // before the next call writes
}
