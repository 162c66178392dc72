// Codes with scales become float32 values, each by the operations of ckptdiff/checkpoint/kernels/code_values.py in their
// order, so that they are the same to the last bit; and what both sides have in common besides values is counted.
#include "pair.cuh"
#include "reduce.cuh"

const float STEP_ROUNDING = 1 + 1.0f / 4096; // values of at most 2^8 steps are rounded to 24 bits, on either side

// A value of a side. `step` is how far its code is from the next one.
struct Worth {
    float value, step;
    u32 field;
};

// A value of a code. Processors do not agree on the sign of a NaN that a scale makes: here it is that of the code.
__device__ inline float signed_nan(float value, float code) {
    if (magnitude_bits(value) <= F32::INFINITE) return value;
    return __uint_as_float((__float_as_uint(code) & 0x80000000) | 0x7fc00000);
}

// What is at a row and column of a box; `all` is what went up of the side.
__device__ inline Worth worth(const Codes& codes, const CodeBox& box, const u8* all, u32 row, u32 column) {
    const u32 bit = box.skip + column * codes.bits, low = bit % 8;
    const u8* at = all + box.codes + (u64)row * box.stride + bit / 8;
    u32 field = (u32)at[0] >> low;
    if (low + codes.bits > 8) field |= (u32)at[1] << (8 - low);
    field = (field ^ codes.flip) & ((1u << codes.bits) - 1);
    const u32 line = ((const u32*)(all + box.lines))[row];
    const u32 entry = line * box.across + (box.before + column) / box.width;
    const float scale = ((const float*)(all + box.scales))[entry];
    float code = codes.values[field], step = codes.steps[field] * __uint_as_float(magnitude_bits(scale));
    if (box.zeros) code = code - ((const float*)(all + box.zeros))[entry];
    float value = code * scale;
    if (box.factors) {
        const float factor = ((const float*)(all + box.factors))[row], size = __uint_as_float(magnitude_bits(factor));
        value = codes.divides ? value / factor : value * factor;
        step = codes.divides ? step / size : step * size;
    }
    return {signed_nan(value, code), step, field};
}

// A value that is stored as such.
template <class Format> __device__ inline Worth plain(const u8* stored, u32 i) {
    return {__uint_as_float(Format::to_f32(load<Format>(stored, i))), 0, 0};
}

// Whether values differ as they are rounded to a format.
template <class Format> __device__ inline bool differ(const Worth& v, const Worth& w) {
    const u32 a = recode<Format, F32>(__float_as_uint(v.value)), b = recode<Format, F32>(__float_as_uint(w.value));
    return a != b && (magnitude<Format>(a) | magnitude<Format>(b)) != 0;
}

// Whether values that differ do so by no more than the larger step. A step of NaN is that of a value of NaN.
__device__ inline bool within_step(const Worth& v, const Worth& w) {
    const float step = w.step > v.step ? w.step : v.step;
    const float apart = __uint_as_float(magnitude_bits(v.value - w.value));
    return apart <= step * STEP_ROUNDING && magnitude_bits(apart) < F32::INFINITE;
}

// Decodes the sides that have room for values, one of them at least; the other is stored as values. Both have the same
// boxes. With `counts`, adds to what `record` has kept.
extern "C" __global__ void __launch_bounds__(THREADS)
    decode(const u8* base, const u8* tuned, float* base_values, float* tuned_values, u32 counts, Record* record) {
    __shared__ Codes both[2];
    for (u32 i = threadIdx.x; i < sizeof(Codes) / 4; i += THREADS) {
        if (base_values) ((u32*)&both[0])[i] = ((const u32*)base)[i];
        if (tuned_values) ((u32*)&both[1])[i] = ((const u32*)tuned)[i];
    }
    __syncthreads();
    const Codes& one = both[base_values ? 0 : 1];
    u32 kept[KEPT] = {};
    for (u32 k = 0; k < one.boxes; ++k) {
        const CodeBox& box = one.box[k];
        for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < box.numel; i += gridDim.x * THREADS) {
            const u32 row = i / box.columns, column = i % box.columns, at = box.first + i;
            const Worth v = base_values ? worth(both[0], both[0].box[k], base, row, column) : plain<BASE>(base, at);
            const Worth w = tuned_values ? worth(both[1], both[1].box[k], tuned, row, column) : plain<TUNED>(tuned, at);
            if (base_values) base_values[at] = v.value;
            if (tuned_values) tuned_values[at] = w.value;
            if (!counts) continue;
            kept[EQUAL_CODES] += v.field == w.field || ((v.field | w.field) & one.magnitude) == 0;
            if (!(same_format<COMPARE, Bf16> ? differ<Bf16>(v, w) : differ<F32>(v, w))) continue;
            ++kept[CHANGED_VALUES];
            kept[WITHIN_STEPS] += within_step(v, w);
        }
    }
#pragma unroll
    for (u32 i = 0; i < KEPT; ++i) {
        const u32 sum = warp_sum(kept[i]);
        if (threadIdx.x % WARP == 0 && sum) atomicAdd(&record->kept[i], (u64)sum);
    }
}
