// Cross-entropies of rows of logits, and their gradients.
#pragma once

#include "elementwise.hpp"

namespace INKLING_ISA {

// The cross-entropy in nats of one row of logits, and its gradient times `weight`, which may overwrite the row.
inline float entropy_of(const float* row, int columns, int64_t target, float weight, float* grad) {
    vec maxima = broadcast(-INFINITY);
    for (int i = 0; i < columns; i += LANES) {
        const vec next = kept(load_few(row + i, columns - i), columns - i, -INFINITY);
        maxima = next > maxima ? next : maxima;
    }
    const float max = max_of(maxima), target_logit = row[target] - max;
    const float sum = summed(columns, [&](int i, int few) {
        const vec e = kept(exp(load_few(row + i, few) - max), few, 0.0f);
        store_few(grad + i, e, few);
        return e;
    });
    const float scale = weight / sum;
    for (int i = 0; i < columns; i += LANES)
        store_few(grad + i, load_few(grad + i, columns - i) * scale, columns - i);
    grad[target] -= weight;
    return std::log(sum) - target_logit;
}

inline void entropies_of(Pool& pool, const inkling::Entropies& e) {
    share(pool, e.rows, e.columns, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            e.nats[row] = entropy_of(e.logits + row * e.columns, e.columns, e.targets[row], e.weight,
                                     e.grads + row * e.columns);
    });
    if (!e.d_bias) return;
    // The order of a column's sum does not depend on the threads.
    share(pool, e.columns, e.rows, kPanel, [&](int64_t begin, int64_t end) {
        for (int row = 0; row < e.rows; ++row) {
            const float* from = e.grads + int64_t(row) * e.columns;
            for (int64_t i = begin; i < end; ++i) e.d_bias[i] += from[i];
        }
    });
}

}  // namespace INKLING_ISA
