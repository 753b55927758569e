// Cross-entropies of rows of logits, and their slopes, which take the logits' place.
#pragma once

#include "elementwise.hpp"

namespace INKLING_ISA {

// The cross-entropy in nats of one row, which becomes its slope.
inline float entropy_of(float* row, int columns, int64_t target) {
    vec tops = spread(-INFINITY);
    for (int i = 0; i < columns; i += LANES) {
        const vec next = kept(load_few(row + i, columns - i), columns - i, -INFINITY);
        tops = next > tops ? next : tops;
    }
    const float most = most_of(tops), wanted = row[target] - most;
    const float sum = summed(columns, [&](int i, int few) {
        const vec e = kept(exp(load_few(row + i, few) - most), few, 0.0f);
        store_few(row + i, e, few);
        return e;
    });
    const float scale = 1.0f / sum;
    for (int i = 0; i < columns; i += LANES) store_few(row + i, load_few(row + i, columns - i) * scale, columns - i);
    row[target] -= 1.0f;
    return std::log(sum) - wanted;
}

inline void entropies_of(Pool& pool, const inkling::Entropies& e) {
    share(pool, e.rows, e.columns, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            e.nats[row] = entropy_of(e.logits + row * e.columns, e.columns, e.targets[row]);
    });
    // A column's sum has one order, whoever adds it.
    share(pool, e.columns, e.rows, kPanel, [&](int64_t begin, int64_t end) {
        for (int row = 0; row < e.rows; ++row) {
            const float* from = e.logits + int64_t(row) * e.columns;
            for (int64_t i = begin; i < end; ++i) e.d_bias[i] += from[i];
        }
    });
}

// The squares of `count` numbers, summed in blocks, so that the sum has one order.
inline double squares_of(Pool& pool, const float* of, int64_t count) {
    constexpr int64_t kBlock = 1 << 14;
    const int64_t blocks = (count + kBlock - 1) / kBlock;
    std::vector<float> sums(blocks);
    share(pool, blocks, kBlock, 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            const float* from = of + block * kBlock;
            sums[block] = summed(int(std::min(kBlock, count - block * kBlock)), [&](int i, int few) {
                const vec v = load_few(from + i, few);
                return v * v;
            });
        }
    });
    double total = 0;
    for (float sum : sums) total += sum;
    return total;
}

inline void scale_all(Pool& pool, float* of, int64_t count, float factor) {
    share(pool, count, 1, kPanel, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) of[i] *= factor;
    });
}

}  // namespace INKLING_ISA
