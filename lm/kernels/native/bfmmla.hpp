// Products of bf16 with ARM's BFMMLA: two rows of A, two columns of B, four numbers along k in one instruction.
#pragma once

#include <arm_neon.h>

#include "slots.hpp"

namespace INKLING_ISA {

// c[r][0 .. 16) = (or +=) the products of R rows of slots with b[slot][0 .. 16); `depth` slots, an even number.
template <int R>
inline void bfmmla_tile(const float* b, int depth, const float* const* a, float* const* c, bool add) {
    constexpr int kTwos = (R + 1) / 2;
    const auto bf16 = [](float32x4_t slots) { return vreinterpretq_bf16_f32(slots); };
    // sums[i][j]: rows 2 i and 2 i + 1 of columns 2 j and 2 j + 1, row by row.
    float32x4_t sums[kTwos][kPanel / 2];
#pragma GCC unroll 32
    for (int i = 0; i < kTwos; ++i)
#pragma GCC unroll 32
        for (int j = 0; j < kPanel / 2; ++j) sums[i][j] = vdupq_n_f32(0);
    for (int k = 0; k < depth; k += 2, b += 2 * kPanel) {
        bfloat16x8_t rows[kTwos];
#pragma GCC unroll 32
        for (int i = 0; i < kTwos; ++i)
            // A last row without a partner is used twice.
            rows[i] = bf16(vcombine_f32(vld1_f32(a[2 * i] + k), vld1_f32(a[2 * i + 1 < R ? 2 * i + 1 : 2 * i] + k)));
#pragma GCC unroll 32
        for (int j = 0; j < kPanel / 2; j += 2) {
            const float32x4_t first = vld1q_f32(b + 2 * j), second = vld1q_f32(b + kPanel + 2 * j);
            const bfloat16x8_t left = bf16(vzip1q_f32(first, second)), right = bf16(vzip2q_f32(first, second));
#pragma GCC unroll 32
            for (int i = 0; i < kTwos; ++i) {
                sums[i][j] = vbfmmlaq_f32(sums[i][j], rows[i], left);
                sums[i][j + 1] = vbfmmlaq_f32(sums[i][j + 1], rows[i], right);
            }
        }
    }
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
        for (int j = 0; j < kPanel / 2; j += 2) {
            const float32x4_t left = sums[r / 2][j], right = sums[r / 2][j + 1];
            const float32x4_t sum = r % 2 ? vcombine_f32(vget_high_f32(left), vget_high_f32(right))
                                          : vcombine_f32(vget_low_f32(left), vget_low_f32(right));
            float* to = c[r] + 2 * j;
            vst1q_f32(to, add ? vaddq_f32(vld1q_f32(to), sum) : sum);
        }
}

}  // namespace INKLING_ISA
