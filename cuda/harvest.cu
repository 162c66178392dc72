// The bins that are not empty, so that a histogram of which little is used costs little to bring home.
#include "layout.cuh"

// Writes each bin that is not zero, in any order; `found` is how many there are.
extern "C" __global__ void __launch_bounds__(THREADS) harvest(const u64* bins, u64 size, Bin* used, u32* found) {
    for (u64 i = (u64)blockIdx.x * THREADS + threadIdx.x; i < size; i += (u64)gridDim.x * THREADS) {
        if (!bins[i]) continue;
        used[atomicAdd(found, 1u)] = {(u32)i, (u32)bins[i], (u32)(bins[i] >> 32)};
    }
}
