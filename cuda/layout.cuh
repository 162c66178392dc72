// What host and kernels hand each other. ckptdiff/measure/cuda/layout.py holds the same records as NumPy dtypes.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef THREADS
#define THREADS 512
#endif

// Coordinates of a tile, at most. Each tile has its own row of sums, so sums do not depend on the grid.
const u32 TILE = 1 << 15;
const u32 BINS = 1 << 15;     // of a magnitude histogram: the leading 15 bits below the sign
const u32 LOW_BINS = 1 << 16; // of a further pass: the 16 bits below those that are known
const u32 LIMITS = 8;         // thresholds or prefixes of one pass, at most
const u32 TAILS = 4;          // sums over the largest |d| in one pass, at most

// Consecutive coordinates of one tensor pair. Offsets are in bytes; those of base and tuned are multiples of 16, and
// what follows the last coordinate up to a multiple of eight coordinates may be read, whatever it holds.
struct Tile {
    u64 base, tuned, mask;
    u32 numel, record;
};

enum Count { STORED_EQUAL, WITHIN_ETA, MASKED, OFF_GRID, NONFINITE_BASE, NONFINITE_TUNED, NONFINITE_DELTA, COUNTS };
enum Sum { DELTA, ABS_DELTA, DELTA_SQUARE, BASE_DELTA, BASE_SQUARE, STORED_SQUARE, ABSORBED_SQUARE, TIES, SUMS };
enum Rule { NONE, BITWISE, ABOVE, ETA, TOP };
enum Kept { EQUAL_CODES, CHANGED_VALUES, WITHIN_STEPS, KEPT };
enum Row { WEIGHTS, CHANGED_WEIGHTS, LOST_WEIGHTS, DELTAS, LOW_BITS, LOW_SQUARES, ROWS };

// The figures of one tensor pair, or of the part of it at hand; all are integers, so any order gives the same.
struct Record {
    u64 counts[COUNTS];
    u64 largest;           // bits of |d|, which order as the values do
    u64 ulp[64];           // by floor(log2(distance))
    u64 above[LIMITS + 1]; // changed coordinates of finite d, by how many thresholds |d| exceeds
    u64 kept[KEPT];        // what the sides have in common besides values, if one of them is codes with scales
};

// A bin that is not empty. Its count is in halves, so that nothing is left between two of them.
struct Bin {
    u32 place, low, high;
};

// Magnitudes are bit patterns of the type of d, rounded down: comparing those compares the values.
struct ScanSettings {
    u64 thresholds[LIMITS]; // all ones where there are fewer
    u64 cut;                // of ABOVE and TOP
    u64 tie;                // the cut of TOP if d can be equal to it, else all ones
    double eta, cut_eta;    // relative to the larger side: WITHIN_ETA (0: count none), and the cut of ETA
    u64 ties, take;
    u32 rule;
};

struct Search {
    u64 thresholds[LIMITS], tails[TAILS]; // all ones where there are fewer
    u64 deltas[LIMITS], weights[LIMITS];  // known leading bits of the open cuts
    u32 delta_count, weight_count, shift;
};

const u32 MOST_BOXES = 3; // the rest of a row, whole rows, a part of one

// Rows and columns of the matrix of a side that is codes with scales. Offsets are in bytes from the start of the side.
struct CodeBox {
    u32 first, numel;           // its coordinates in the launch, row by row
    u32 columns;                // of a row of the box
    u32 codes, stride, skip;    // where they begin, bytes from one row to the next, bits before the first code of each
    u32 scales, zeros, across;  // floats; 0 if there are no zeros; how many there are in a line
    u32 lines;                  // the line that each row of the box takes
    u32 width, before;          // columns to a scale, and those of the first one that lie before the box
    u32 factors;                // floats: the global scale of each row; 0 if there is none
};

// What such a side begins with.
struct Codes {
    u32 size;      // of all that goes up
    u32 bits;      // of a code, 8 at most; the lowest come first
    u32 flip;      // those of them to turn over
    u32 magnitude; // those that are zero in a zero
    u32 divides;   // whether values are over the global scale, not times it
    u32 boxes;
    CodeBox box[MOST_BOXES];
    float values[256], steps[256]; // of each code
};
