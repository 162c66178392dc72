// The stored formats, and how a code of one becomes a code of another: exactly or rounded to nearest even, the sign of
// a NaN kept. Every format of at most 32 bits widens to the bits of a float32.
#pragma once
#include "layout.cuh"

// INFINITE: first magnitude that is not finite. HOT: first bin of the window that histograms keep close (see hot.cuh).
struct F32 {
    typedef u32 Code;
    typedef float Real;
    static const int BITS = 32;
    static const u32 INFINITE = 0x7f800000, HOT = (127 - 21) * 128;
    static __device__ u32 to_f32(u32 code) { return code; }
};

struct Bf16 {
    typedef u32 Code;
    typedef float Real;
    static const int BITS = 16;
    static const u32 INFINITE = 0x7f80, HOT = (127 - 21) * 128;
    static __device__ u32 to_f32(u32 code) { return code << 16; }
};

// A format with EXPONENT and MANTISSA bits below its sign, of which only the largest magnitudes are not finite.
template <int EXPONENT, int MANTISSA> __device__ inline u32 widen_small(u32 magnitude, u32 infinite, u32 nan_bits) {
    const u32 aligned = magnitude << (23 - MANTISSA);
    if (magnitude >= infinite) return 0x7f800000 | nan_bits;
    // The exponent is moved by a product, which also brings subnormals into the normal range.
    const u32 bias = (1 << (EXPONENT - 1)) - 1;
    return __float_as_uint(__uint_as_float(aligned) * __uint_as_float((254 - bias) << 23));
}

struct F16 {
    typedef u32 Code;
    typedef float Real;
    static const int BITS = 16;
    static const u32 INFINITE = 0x7c00, HOT = 7 << 10;
    static __device__ u32 to_f32(u32 code) {
        return widen_small<5, 10>(code & 0x7fff, INFINITE, (code & 0x3ff) << 13) | (code & 0x8000) << 16;
    }
};

struct E5m2 {
    typedef u32 Code;
    typedef float Real;
    static const int BITS = 8;
    static const u32 INFINITE = 0x7c, HOT = 0;
    static __device__ u32 to_f16(u32 code) { return code << 8; }
    static __device__ u32 to_f32(u32 code) { return F16::to_f32(to_f16(code)); }
};

struct E4m3 { // no infinity: the largest magnitude is NaN
    typedef u32 Code;
    typedef float Real;
    static const int BITS = 8;
    static const u32 INFINITE = 0x7f, HOT = 0;
    static __device__ u32 to_f32(u32 code) {
        return widen_small<4, 3>(code & 0x7f, INFINITE, 0x400000) | (code & 0x80) << 24;
    }
    static __device__ u32 to_f16(u32 code) { // exact, and never subnormal
        const u32 sign = (code & 0x80) << 8, size = to_f32(code) & 0x7fffffff;
        if (size == 0) return sign;
        return sign | (size > F32::INFINITE ? 0x7e00 : (size - (112 << 23)) >> 13);
    }
};

struct F64 {
    typedef u64 Code;
    typedef double Real;
    static const int BITS = 64;
    static const u64 INFINITE = 0x7ff0000000000000;
    static const u32 HOT = (1023 - 150) * 16;
    static __device__ u32 to_f32(u64 code) {
        if ((code & 0x7fffffffffffffff) > INFINITE) return (u32)(code >> 32 & 0x80000000) | 0x7fc00000;
        return __float_as_uint((float)__longlong_as_double((long long)code));
    }
};

template <class A, class B> const bool same_format = false;
template <class A> const bool same_format<A, A> = true;

template <class Format> __device__ inline typename Format::Code magnitude(typename Format::Code code) {
    return code & (((typename Format::Code)1 << (Format::BITS - 1)) - 1);
}

template <class Format> __device__ inline bool negative(typename Format::Code code) {
    return code >> (Format::BITS - 1);
}

// The code in To of a code in From. To holds every value of From, or is bfloat16.
template <class To, class From> __device__ inline typename To::Code recode(typename From::Code code) {
    if constexpr (same_format<To, From>) {
        return code;
    } else {
        const u32 bits = From::to_f32(code);
        const bool is_nan = (bits & 0x7fffffff) > F32::INFINITE;
        if constexpr (same_format<To, F32>) {
            return bits;
        } else if constexpr (same_format<To, Bf16>) {
            return is_nan ? (bits >> 16 & 0x8000) | 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        } else if constexpr (same_format<To, F16>) {
            return From::to_f16(code);
        } else {
            const u64 quiet = (u64)(bits >> 31) << 63 | 0x7ff8000000000000 | (u64)(bits & 0x7fffff) << 29;
            return is_nan ? quiet : (u64)__double_as_longlong((double)__uint_as_float(bits));
        }
    }
}

template <class Format> __device__ inline typename Format::Real value(typename Format::Code code) {
    if constexpr (same_format<Format, F64>) return __longlong_as_double((long long)code);
    else return __uint_as_float(Format::to_f32(code));
}

// The smallest format that holds every value of both.
template <class A, class B> struct Wider { // of unequal formats
    static __device__ auto choose() {
        if constexpr (A::BITS == 64 || B::BITS == 64) return F64();
        else if constexpr (A::BITS == 32 || B::BITS == 32) return F32();
        else if constexpr (A::BITS == 8 && B::BITS == 8) return Bf16();
        else if constexpr (A::BITS == 8) return B();
        else if constexpr (B::BITS == 8) return A();
        else return F32();
    }
    typedef decltype(choose()) Format;
};
template <class A> struct Wider<A, A> {
    typedef A Format;
};
