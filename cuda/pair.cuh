// One coordinate of a tensor pair after the cast, and neighbours as they are loaded. BASE, TUNED and COMPARE name
// formats: a build serves one pair of stored formats under one compare format.
#pragma once
#include "formats.cuh"

const u32 WIDEST = BASE::BITS > TUNED::BITS ? BASE::BITS : TUNED::BITS;
const u32 N = WIDEST <= 16 ? 8 : 128 / WIDEST; // neighbours loaded at once: at most 128 bits of a side

// The bit pattern of |x|, which orders as |x| does.
__device__ inline u32 magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffff; }
__device__ inline u64 magnitude_bits(double x) { return (u64)__double_as_longlong(x) & 0x7fffffffffffffff; }

// Index of the highest set bit.
__device__ inline u32 floor_log2(u32 x) { return 31 - __clz((int)x); }
__device__ inline u32 floor_log2(u64 x) { return 63 - __clzll((long long)x); }

// N neighbours, loaded at once; `at` is a multiple of their size.
template <class Format, u32 N> struct Neighbours {
    static const u32 BYTES = N * Format::BITS / 8, WORDS = (BYTES + 3) / 4;
    u32 words[WORDS];

    __device__ explicit Neighbours(const u8* at) {
        if constexpr (BYTES == 16) {
            const uint4 all = *(const uint4*)at;
            words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
        } else if constexpr (BYTES == 8) {
            const uint2 all = *(const uint2*)at;
            words[0] = all.x, words[1] = all.y;
        } else {
            words[0] = BYTES == 4 ? *(const u32*)at : *(const u16*)at;
        }
    }
    __device__ typename Format::Code operator[](u32 k) const {
        if constexpr (Format::BITS == 64) return (u64)words[2 * k + 1] << 32 | words[2 * k];
        else return words[k * Format::BITS / 32] >> k * Format::BITS % 32 & (~0u >> (32 - Format::BITS));
    }
};

// The code at index k.
template <class Format> __device__ inline typename Format::Code load(const u8* at, u32 k) {
    if constexpr (Format::BITS == 64) return ((const u64*)at)[k];
    else if constexpr (Format::BITS == 32) return ((const u32*)at)[k];
    else if constexpr (Format::BITS == 16) return ((const u16*)at)[k];
    else return at[k];
}

struct Coordinate {
    typedef COMPARE::Code Code;
    typedef COMPARE::Real Real;
    typedef decltype(magnitude_bits(Real())) Bits;
    Code a, b;    // codes of base and tuned
    Real v, w, d; // their values, and w - v
    Bits size;    // of |d|
    bool changed, finite;

    __device__ Coordinate(BASE::Code x, TUNED::Code y)
        : a(recode<COMPARE, BASE>(x)), b(recode<COMPARE, TUNED>(y)), v(value<COMPARE>(a)), w(value<COMPARE>(b)),
          d(w - v), size(magnitude_bits(d)) {
        changed = a != b && (magnitude<COMPARE>(a) | magnitude<COMPARE>(b)) != 0; // +0 equals -0
        finite = size < magnitude_bits((Real)__uint_as_float(F32::INFINITE));
    }
    // Whether |d| <= factor max(|v|, |w|).
    __device__ bool within(double factor) const {
        return fabs((double)d) <= __dmul_rn(factor, fmax(fabs((double)v), fabs((double)w)));
    }
    // Bin of the base: its leading 15 magnitude bits; under formats of more bits the last one for NaN.
    __device__ u32 weight_bin() const {
        const u32 below = COMPARE::BITS > 16 ? COMPARE::BITS - 16 : 0;
        const Code code = magnitude<COMPARE>(a);
        return below && code > COMPARE::INFINITE ? BINS - 1 : (u32)(code >> below);
    }
    // Distance in the monotone integer order of the codes, in which +0 and -0 are one.
    __device__ Code distance() const {
        const Code x = magnitude<COMPARE>(a), y = magnitude<COMPARE>(b);
        if (negative<COMPARE>(a) != negative<COMPARE>(b)) return x + y;
        return x > y ? x - y : y - x;
    }
};
typedef Coordinate::Bits Bits;
