// Histograms of which a window of the usual bins is kept in shared memory, where many threads can count into the same
// bin at once; the rest is counted in global memory, where that would be slow, but those bins are rarely met.
#pragma once
#include "layout.cuh"

const u32 WINDOW = 3072; // bins: 24 binades of bfloat16 or float32

struct Hot {
    u32 unchanged[WINDOW], changed[WINDOW], deltas[WINDOW]; // the first two by weight: each coordinate is in one of them
    u32 changed_zeros;
    u32 counts[COUNTS];
    u32 ulp[64];
    u32 above[LIMITS + 1];

    __device__ void clear() {
        for (u32 i = threadIdx.x; i < sizeof(Hot) / 4; i += THREADS) ((u32*)this)[i] = 0;
    }
};

// Returns whether a bin is in a window that starts at bin `first`, and counts there.
__device__ inline bool count_bin(u32* window, u32 first, u32 bin) {
    const u32 place = bin - first; // what lies before the window wraps to beyond it
    if (place >= WINDOW) return false;
    atomicAdd(&window[place], 1u);
    return true;
}

// Move counts to global memory.
__device__ inline void flush(u32* counts, u32 size, u64* out) {
    for (u32 i = threadIdx.x; i < size; i += THREADS) {
        if (counts[i]) atomicAdd(&out[i], (u64)counts[i]);
        counts[i] = 0;
    }
}

// The same for weights: all of them, and the changed ones.
__device__ inline void flush_weights(Hot& hot, u64* all, u64* changed) {
    for (u32 i = threadIdx.x; i < WINDOW; i += THREADS) {
        const u32 moved = hot.changed[i], sum = hot.unchanged[i] + moved;
        if (sum) atomicAdd(&all[i], (u64)sum);
        if (moved) atomicAdd(&changed[i], (u64)moved);
        hot.unchanged[i] = hot.changed[i] = 0;
    }
}
