// The elements of a packed operand of a product: slots, and sums over pairs of slots.
//
// In fp32 a slot is a number. In an object that multiplies in bf16 (INKLING_BF16) a slot holds two neighbours along k,
// rounded to bf16 (to nearest, ties to even), the first in the low half; their products are summed in fp32. The
// rest of the code handles slots as floats: it copies them and never computes with them.
#pragma once

#include "simd.hpp"

namespace INKLING_ISA {

inline uvec bits_of(vec value) {
    uvec bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
// The bits of numbers rounded to bf16, in the high halves; NaN stays NaN.
inline uvec rounded(vec value) {
    const uvec bits = bits_of(value);
    const uvec up = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    return (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x00400000u : up;
}

// The first or the second (1) of the two bf16 in each slot.
inline vec half_of(vec slots, int which) {
    const uvec bits = which ? bits_of(slots) & 0xffff0000u : bits_of(slots) << 16;
    vec numbers;
    std::memcpy(&numbers, &bits, sizeof numbers);
    return numbers;
}

// Contiguous numbers become contiguous bf16.
inline void store_rounded(uint16_t* to, vec value) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)value));
#elif defined(__ARM_FEATURE_BF16)
    vst1_u16(to, vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)value)));
#else
    const uvec bits = rounded(value);
    for (int i = 0; i < LANES; ++i) to[i] = uint16_t(bits[i] >> 16);
#endif
}

#if defined(INKLING_BF16)

constexpr int kPair = 2;
#if defined(INKLING_AMX)
constexpr int kSlots = 16;  // a tile's columns: slots along k come in multiples, zero after the last number
#elif defined(INKLING_BFMMLA)
constexpr int kSlots = 2;  // in one operand of the instruction
#else
constexpr int kSlots = 1;
#endif

// Lane i: a slot of first[i] and second[i].
inline vec paired(vec first, vec second) {
#if defined(__AVX512BF16__)
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (vec)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#elif defined(__ARM_FEATURE_BF16)
    const uint16x4_t low = vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)first)),
                     high = vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)second));
    return (vec)vcombine_u16(vzip1_u16(low, high), vzip2_u16(low, high));
#else
    const uvec both = (rounded(first) >> 16) | (rounded(second) & 0xffff0000u);
    vec slots;
    std::memcpy(&slots, &both, sizeof slots);
    return slots;
#endif
}

// The slots of 2 LANES numbers from `from` on, of which only `count` are there; the others are zero.
inline vec load_slots(const float* from, int count) {
    if (count <= 0) return vec{};
#if defined(__AVX512BF16__)
    if (count >= 2 * LANES) return (vec)_mm512_cvtne2ps_pbh((__m512)load(from + LANES), (__m512)load(from));
#endif
    const vec low = load_few(from, count), high = count > LANES ? load_few(from + LANES, count - LANES) : vec{};
    uint16_t halves[2 * LANES];
    store_rounded(halves, low), store_rounded(halves + LANES, high);
    vec slots;
    std::memcpy(&slots, halves, sizeof slots);
    return slots;
}

#else

constexpr int kPair = 1, kSlots = 1;
inline vec load_slots(const float* from, int count) { return load_few(from, count); }

#endif

// How many slots so many numbers along k take.
constexpr int slots(int depth) { return ((depth + kPair - 1) / kPair + kSlots - 1) / kSlots * kSlots; }

// sums += the products of slots, lane by lane.
inline void add_products(vec& sums, vec a, vec b) {
#if defined(INKLING_BF16) && defined(__AVX512BF16__)
    sums = (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    sums += a * b;
#endif
}

// A slot in all lanes.
inline vec broadcast_slot(float slot) {
#if defined(INKLING_BF16)
    int32_t bits;
    std::memcpy(&bits, &slot, sizeof bits);
    const ivec all = bits - ivec{};
    vec lanes;
    std::memcpy(&lanes, &all, sizeof lanes);
    return lanes;
#else
    return broadcast(slot);
#endif
}

}  // namespace INKLING_ISA
