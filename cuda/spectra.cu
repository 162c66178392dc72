// Matrices of a pair for the spectra: stored codes become panels of W0 and d, which lie tall, entries are counted by
// magnitude and by score, and squares are added up.
#include "pair.cuh"
#include "reduce.cuh"

const u32 SQUARE = 32; // rows and columns of what is turned at a time
const u32 SCORE_FIELDS = 8;

// W0 and d of one coordinate, cast to the compare format and written in another.
template <class Real> struct Entry {
    Real base, delta;
    __device__ Entry(const u8* base_codes, const u8* tuned_codes, u64 at)
        : base((Real)value<COMPARE>(recode<COMPARE, BASE>(load<BASE>(base_codes + at * (BASE::BITS / 8), 0)))),
          delta((Real)value<COMPARE>(recode<COMPARE, TUNED>(load<TUNED>(tuned_codes + at * (TUNED::BITS / 8), 0))) -
                base) {}
};

// Rows of a block of stored codes as rows of the panel, or, where they are `turned`, as columns: entry (r, c) lies at
// r * line + c of the panel, or at c * line + r. Rows that are turned may be those of several matrices of `line` rows,
// one after the other: row 0 of the block is number `first` of all, and one matrix lies `stride` behind the other.
template <class Real>
__device__ void write_panel(const u8* base, const u8* tuned, u64 rows, u64 columns, u64 line, u32 turned, u64 first,
                            u64 stride, Real* weights, Real* deltas, Real (*held)[SQUARE][SQUARE + 1]) {
    if (!turned) {
        for (u64 i = (u64)blockIdx.x * THREADS + threadIdx.x; i < rows * columns; i += (u64)gridDim.x * THREADS) {
            const Entry<Real> entry(base, tuned, i);
            const u64 to = i / columns * line + i % columns;
            weights[to] = entry.base, deltas[to] = entry.delta;
        }
        return;
    }
    const u64 across = (columns + SQUARE - 1) / SQUARE, squares = across * ((rows + SQUARE - 1) / SQUARE);
    const u32 lane = threadIdx.x % SQUARE, begin = threadIdx.x / SQUARE;
    for (u64 square = blockIdx.x; square < squares; square += gridDim.x) {
        const u64 top = square / across * SQUARE, left = square % across * SQUARE;
        for (u32 k = begin; k < SQUARE; k += THREADS / SQUARE) {
            if (top + k >= rows || left + lane >= columns) continue;
            const Entry<Real> entry(base, tuned, (top + k) * columns + left + lane);
            held[0][k][lane] = entry.base, held[1][k][lane] = entry.delta;
        }
        __syncthreads();
        const u64 row = first + top + lane;
        for (u32 k = begin; k < SQUARE; k += THREADS / SQUARE) {
            if (top + lane >= rows || left + k >= columns) continue;
            const u64 to = row / line * stride + (left + k) * line + row % line;
            weights[to] = held[0][lane][k], deltas[to] = held[1][lane][k];
        }
        __syncthreads(); // before the next square is written
    }
}

// Magnitude of a number as float32; those of two numbers order as they do.
template <class Real> __device__ inline u32 single_bits(Real x) { return __float_as_uint((float)x) & 0x7fffffff; }

// Adds the sum over a warp to a number that all threads share.
__device__ inline void add_up(u64 own, u64* total) {
    const u64 sum = warp_sum(own);
    if (threadIdx.x % WARP == 0 && sum) atomicAdd(total, sum);
}

// The matrix of a stack that a block counts, and the entries of it that a thread takes: as many blocks count each.
struct Share {
    u64 member, first, step;
    __device__ explicit Share(u32 members)
        : member(blockIdx.x / (gridDim.x / members)),
          first((u64)(blockIdx.x % (gridDim.x / members)) * THREADS + threadIdx.x),
          step((u64)(gridDim.x / members) * THREADS) {}
};

// All entries of each matrix, the changed ones, and those that changed by more than a threshold, by the leading 15
// magnitude bits of the base.
template <class Real>
__device__ void add_magnitudes(const Real* base, const Real* delta, u64 numel, u32 members, u32 threshold,
                               u64* counts) {
    const Share share(members);
    base += share.member * numel, delta += share.member * numel, counts += share.member * 3 * BINS;
    for (u64 i = share.first; i < numel; i += share.step) {
        const u32 bin = single_bits(base[i]) >> 16, size = single_bits(delta[i]);
        atomicAdd(&counts[bin], (u64)1);
        if (size) atomicAdd(&counts[BINS + bin], (u64)1);
        if (size > threshold) atomicAdd(&counts[2 * BINS + bin], (u64)1);
    }
}

// Where the scores of a matrix are counted; without bins they are not.
struct Window {
    u32 shift, start, bins, low;
};

// Entries of each matrix by the bin of their score: all, those changed, those above a threshold; of the last two those
// where the base is beyond the cut of the smallest, then those where it is at that cut; and the sum of their chances in
// units of 2^-31. All are integers, so any order gives the same. There is room for so many bins, and one more.
template <class Real>
__device__ void add_scores(const Real* scores, const Real* base, const Real* delta, u64 numel, u32 members,
                           const Window* windows, u32 room, u32 threshold, const u32* chances, u64* counts) {
    const Share share(members);
    const u32 shift = windows[share.member].shift, start = windows[share.member].start;
    const u32 bins = windows[share.member].bins, low = windows[share.member].low;
    if (!bins) return;
    scores += share.member * numel, base += share.member * numel, delta += share.member * numel;
    chances += share.member * BINS, counts += share.member * (room + 1) * SCORE_FIELDS;
    u64 top[SCORE_FIELDS] = {}; // of the scores above all bins, which are most of those that count
    for (u64 i = share.first; i < numel; i += share.step) {
        const u32 code = single_bits(scores[i]) >> shift;
        if (code < start) continue;
        const u32 weight = single_bits(base[i]) >> 16, size = single_bits(delta[i]);
        const bool above = size > threshold, beyond = weight > low, tied = weight == low;
        const u64 own[SCORE_FIELDS] = {1,               size != 0,    above,         size && beyond,
                                       above && beyond, size && tied, above && tied, chances[weight]};
        if (code - start < bins) {
            for (u32 k = 0; k < SCORE_FIELDS; ++k)
                if (own[k]) atomicAdd(&counts[(u64)(code - start) * SCORE_FIELDS + k], own[k]);
        } else {
            for (u32 k = 0; k < SCORE_FIELDS; ++k) top[k] += own[k];
        }
    }
    for (u32 k = 0; k < SCORE_FIELDS; ++k) add_up(top[k], &counts[(u64)bins * SCORE_FIELDS + k]);
}

// Sums of the squares in each column of matrices, of so many rows of it at a time. They do not depend on the grid, and the
// square of a float is exact.
template <class Real>
__device__ void add_squares(const Real* values, u64 rows, u64 columns, u64 matrices, u64 rows_of_sum, double* sums) {
    const u64 parts = (rows + rows_of_sum - 1) / rows_of_sum, all = matrices * parts * columns;
    for (u64 i = (u64)blockIdx.x * THREADS + threadIdx.x; i < all; i += (u64)gridDim.x * THREADS) {
        const u64 part = i / columns, first = part % parts * rows_of_sum;
        const u64 stop = first + rows_of_sum < rows ? first + rows_of_sum : rows;
        const Real* column = values + part / parts * rows * columns + i % columns;
        double sum = 0;
        for (u64 row = first; row < stop; ++row) {
            const double value = column[row * columns];
            sum += value * value;
        }
        sums[i] = sum;
    }
}

// Each for panels of float and of double.
#define KERNELS_OF(REAL, BITS)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        panel_float##BITS(const u8* base, const u8* tuned, u64 rows, u64 columns, u64 line, u32 turned, u64 first,     \
                          u64 stride, REAL* weights, REAL* deltas) {                                                   \
        __shared__ REAL held[2][SQUARE][SQUARE + 1];                                                                   \
        write_panel(base, tuned, rows, columns, line, turned, first, stride, weights, deltas, held);                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        magnitudes_float##BITS(const REAL* base, const REAL* delta, u64 numel, u32 members, u32 threshold,             \
                               u64* counts) {                                                                          \
        add_magnitudes(base, delta, numel, members, threshold, counts);                                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        scores_float##BITS(const REAL* scores, const REAL* base, const REAL* delta, u64 numel, u32 members,            \
                           const Window* windows, u32 room, u32 threshold, const u32* chances, u64* counts) {          \
        add_scores(scores, base, delta, numel, members, windows, room, threshold, chances, counts);                    \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        squares_float##BITS(const REAL* values, u64 rows, u64 columns, u64 matrices, u64 rows_of_sum, double* sums) {  \
        add_squares(values, rows, columns, matrices, rows_of_sum, sums);                                               \
    }
KERNELS_OF(float, 32)
KERNELS_OF(double, 64)
