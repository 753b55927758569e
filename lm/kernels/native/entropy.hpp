// Cross-entropies of rows of logits, and their slopes.
#pragma once

#include "elementwise.hpp"

namespace INKLING_ISA {

// The cross-entropy in nats of one row of logits, and its slope times `weight`, which may take the row's place.
inline float entropy_of(const float* row, int columns, int64_t target, float weight, float* slope) {
    vec tops = spread(-INFINITY);
    for (int i = 0; i < columns; i += LANES) {
        const vec next = kept(load_few(row + i, columns - i), columns - i, -INFINITY);
        tops = next > tops ? next : tops;
    }
    const float most = most_of(tops), wanted = row[target] - most;
    const float sum = summed(columns, [&](int i, int few) {
        const vec e = kept(exp(load_few(row + i, few) - most), few, 0.0f);
        store_few(slope + i, e, few);
        return e;
    });
    const float scale = weight / sum;
    for (int i = 0; i < columns; i += LANES)
        store_few(slope + i, load_few(slope + i, columns - i) * scale, columns - i);
    slope[target] -= weight;
    return std::log(sum) - wanted;
}

inline void entropies_of(Pool& pool, const inkling::Entropies& e) {
    share(pool, e.rows, e.columns, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            e.nats[row] = entropy_of(e.logits + row * e.columns, e.columns, e.targets[row], e.weight,
                                     e.slopes + row * e.columns);
    });
    if (!e.d_bias) return;
    // A column's sum has one order, whoever adds it.
    share(pool, e.columns, e.rows, kPanel, [&](int64_t begin, int64_t end) {
        for (int row = 0; row < e.rows; ++row) {
            const float* from = e.slopes + int64_t(row) * e.columns;
            for (int64_t i = begin; i < end; ++i) e.d_bias[i] += from[i];
        }
    });
}

}  // namespace INKLING_ISA
