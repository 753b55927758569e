// Vectors of floats in portable GCC/Clang notation; compiled once for each instruction set (see CMakeLists.txt).
//
// The order of a sum does not depend on the instruction set, the number of threads or the rows computed together:
// matrix products add along k one by one in each output's own lane, reductions use 16 lanes that are added at the end.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace INKLING_ISA {

constexpr int kPanel = 16;                // adjacent outputs in a packed matrix
constexpr int kParts = kPanel / LANES;    // vectors in a panel's row

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));

inline vec load(const float* from) {
    vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
inline void store(float* to, vec v) { std::memcpy(to, &v, sizeof v); }
inline vec broadcast(float value) { return value - vec{}; }

inline int padded(int n) { return (n + kPanel - 1) / kPanel * kPanel; }

// exp(x) to about one unit in the last place between -87 and 88, and clamped to that range.
// Source: Cephes expf (Moshier), the usual range reduction by ln 2 in two parts and a polynomial of degree 5.
inline vec exp(vec x) {
    const vec most = broadcast(88.0f), least = broadcast(-87.0f);
    x = x > most ? most : x;
    x = x < least ? least : x;
    const vec scaled = x * 1.44269504088896341f;
    // Rounded to the nearest integer by adding and taking away 1.5 * 2^23.
    const vec magic = broadcast(12582912.0f);
    const vec n = (scaled + magic) - magic;
    vec r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vec p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    vec two_to_n;
    std::memcpy(&two_to_n, &power, sizeof power);
    return p * two_to_n;
}
// log(x) to about one unit in the last place, for positive x that are not denormal.
// Source: Cephes logf (Moshier): x = m 2^n with m from sqrt(1/2) to sqrt(2), and a polynomial of m - 1 of degree 9.
inline vec log(vec x) {
    ivec bits;
    std::memcpy(&bits, &x, sizeof bits);
    const ivec half = (bits - 0x3f3504f3) >> 23;  // 0x3f3504f3 is sqrt(1/2)
    const ivec mantissa = bits - (half << 23);
    vec m;
    std::memcpy(&m, &mantissa, sizeof m);
    m = m - 1.0f;
    const vec n = __builtin_convertvector(half, vec);
    const vec square = m * m;
    vec p = broadcast(7.0376836292e-2f);
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    p = p * m * square;
    p = p + n * -2.12194440e-4f;
    p = p - 0.5f * square;
    return (m + p) + n * 0.693359375f;
}
inline vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }
inline vec tanh(vec x) { return 1.0f - 2.0f / (1.0f + exp(x + x)); }
inline vec relu(vec x) {
    const vec zero = {};
    return x > zero ? x : zero;
}

// 32 random bits for each number, others for each seed. Source: Wellons 2018, "lowbias32", applied twice.
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
inline uvec random_bits(uvec x, uint64_t seed) {
    x ^= uint32_t(seed);
    for (int round = 0; round < 2; ++round) {
        x ^= x >> 16;
        x *= 0x7feb352du;
        x ^= x >> 15;
        x *= 0x846ca68bu;
        x ^= x >> 16;
        x += uint32_t(seed >> 32);
    }
    return x;
}

// Dropout: a number at index i stays, scaled by 1 / (1 - rate), or becomes zero with probability `rate`.
class Dropout {
public:
    Dropout(uint64_t seed, float rate)
        : seed_(seed), least_(uint32_t(double(rate) * 4294967296.0)), scale_(broadcast(1.0f / (1.0f - rate))) {
        for (int i = 0; i < LANES; ++i) lanes_[i] = uint32_t(i);
    }
    vec operator()(vec x, int64_t index) const {
        const vec zero = {};
        return random_bits(lanes_ + uint32_t(index), seed_) >= least_ ? x * scale_ : zero;
    }

private:
    uint64_t seed_;
    uint32_t least_;
    vec scale_;
    uvec lanes_ = {};
};

// Two vectors, interleaved: their first halves, or their second ones.
#if LANES == 16
#define INKLING_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define INKLING_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define INKLING_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define INKLING_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define INKLING_LOW 0, 4, 1, 5
#define INKLING_HIGH 2, 6, 3, 7
#endif
#if defined(__clang__)
inline vec interleaved_low(vec a, vec b) { return __builtin_shufflevector(a, b, INKLING_LOW); }
inline vec interleaved_high(vec a, vec b) { return __builtin_shufflevector(a, b, INKLING_HIGH); }
#else
inline vec interleaved_low(vec a, vec b) { return __builtin_shuffle(a, b, ivec{INKLING_LOW}); }
inline vec interleaved_high(vec a, vec b) { return __builtin_shuffle(a, b, ivec{INKLING_HIGH}); }
#endif
#undef INKLING_LOW
#undef INKLING_HIGH

// A square of numbers becomes its transpose. Interleaving row i with row i + LANES / 2 rotates the bits of a number's
// index (row, lane) by one; after log2(LANES) times rows and lanes are exchanged.
inline void transpose(vec (&square)[LANES]) {
    for (int width = 1; width < LANES; width *= 2) {
        vec next[LANES];
#pragma GCC unroll 32
        for (int i = 0; i < LANES / 2; ++i) {
            next[2 * i] = interleaved_low(square[i], square[i + LANES / 2]);
            next[2 * i + 1] = interleaved_high(square[i], square[i + LANES / 2]);
        }
#pragma GCC unroll 32
        for (int i = 0; i < LANES; ++i) square[i] = next[i];
    }
}

// The sum of 16 lanes, in one order.
inline float add_lanes(const float* lanes) {
    float half[8], quarter[4];
    for (int i = 0; i < 8; ++i) half[i] = lanes[i] + lanes[i + 8];
    for (int i = 0; i < 4; ++i) quarter[i] = half[i] + half[i + 4];
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// The first `count` lanes of a vector, and `other` in those after them.
inline vec kept(vec value, int count, float other) {
    ivec lanes;
    for (int i = 0; i < LANES; ++i) lanes[i] = i;
    return lanes < count ? value : broadcast(other);
}

// The largest of a vector's numbers.
inline float max_of(vec values) {
    float lanes[16], half[8], quarter[4];
    for (int i = 0; i < 16; i += LANES) store(lanes + i, values);
    for (int i = 0; i < 8; ++i) half[i] = lanes[i] > lanes[i + 8] ? lanes[i] : lanes[i + 8];
    for (int i = 0; i < 4; ++i) quarter[i] = half[i] > half[i + 4] ? half[i] : half[i + 4];
    return std::max(std::max(quarter[0], quarter[1]), std::max(quarter[2], quarter[3]));
}

// `count` of LANES numbers; the others are zero.
inline vec load_few(const float* from, int count) {
    if (count >= LANES) return load(from);
#if LANES == 16
    return (vec)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
#else
    float lanes[LANES] = {};
    std::memcpy(lanes, from, count * 4);
    return load(lanes);
#endif
}
inline void store_few(float* to, vec value, int count) {
    if (count >= LANES) return store(to, value);
#if LANES == 16
    _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), (__m512)value);
#else
    std::memcpy(to, &value, count * 4);
#endif
}

// The sum of term(i, count) over vectors of numbers from i on.
template <class Term>
inline float summed(int width, const Term& term) {
    vec lanes[kParts] = {};
    int part = 0;
    for (int i = 0; i < width; i += LANES, part = (part + 1) % kParts) lanes[part] += term(i, width - i);
    float all[kPanel];
    std::memcpy(all, lanes, sizeof all);
    return add_lanes(all);
}

}  // namespace INKLING_ISA
