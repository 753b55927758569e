// One step of Adagrad by row, for the rows that a sparse gradient names; as lm.training.optimizers.RowAdagrad.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace inkling {

// Entry i of `count` is the gradient (width) of row rows[i] of `weights`; a row named several times takes their sum, in
// the order of the entries. Each row's step is rate * grads / sqrt(squares), with the square added to squares first.
inline void row_adagrad(float* weights, float* squares, const int64_t* rows, const float* grads, int count, int width,
                        float rate) {
    // Row and entry in one number, so that sorting does not read the rows.
    std::vector<uint64_t> order(count);
    for (int i = 0; i < count; ++i) order[i] = uint64_t(rows[i]) << 32 | uint32_t(i);
    std::sort(order.begin(), order.end());
    constexpr int kLanes = 16, kAhead = 6;
    const int padded = (width + kLanes - 1) / kLanes * kLanes;
    std::vector<float> sum(padded);
    for (int begin = 0, end; begin < count; begin = end) {
        const int64_t row = int64_t(order[begin] >> 32);
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (end = begin; end < count && int64_t(order[end] >> 32) == row; ++end) {
            // Rows are scattered in memory: those of the next entries are prefetched.
            const float* next = weights + int64_t(order[std::min(end + kAhead, count - 1)] >> 32) * width;
            for (int k = 0; k < width; k += kLanes) __builtin_prefetch(next + k, 1);
            const float* from = grads + int64_t(uint32_t(order[end])) * width;
            for (int k = 0; k < width; ++k) sum[k] += from[k];
        }
        float lanes[kLanes] = {}, square = 0;
        for (int k = 0; k < padded; k += kLanes)
            for (int i = 0; i < kLanes; ++i) lanes[i] += sum[k + i] * sum[k + i];
        for (float lane : lanes) square += lane;
        squares[row] += square;
        const float step = rate / (std::sqrt(squares[row]) + 1e-10f);
        float* to = weights + row * width;
        for (int k = 0; k < width; ++k) to[k] -= step * sum[k];
    }
}

}  // namespace inkling
