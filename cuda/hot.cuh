// Histograms of which a window of the usual bins is kept in shared memory, where many threads can count into the same
// bin at once; the rest is counted in global memory, where that would be slow, but those bins are rarely met.
#pragma once
#include "layout.cuh"

const u32 WINDOW = 3072; // bins: 24 binades of bfloat16 or float32

struct Hot {
    u32 weights[WINDOW], deltas[WINDOW];
    u32 counts[COUNTS];
    u32 ulp[64];
    u32 above[LIMITS + 1];

    __device__ void clear() {
        for (u32 i = threadIdx.x; i < sizeof(Hot) / 4; i += THREADS) ((u32*)this)[i] = 0;
    }
};

// `window` starts at bin `first` of `row`.
__device__ inline void count_bin(u32* window, u32 first, u64* row, u32 bin) {
    const u32 place = bin - first; // what lies before the window wraps to beyond it
    if (place < WINDOW) atomicAdd(&window[place], 1u);
    else atomicAdd(&row[bin], 1ull);
}

// Move counts to global memory.
__device__ inline void flush(u32* counts, u32 size, u64* out) {
    for (u32 i = threadIdx.x; i < size; i += THREADS) {
        if (counts[i]) atomicAdd(&out[i], (u64)counts[i]);
        counts[i] = 0;
    }
}
