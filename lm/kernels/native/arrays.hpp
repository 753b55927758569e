// The element-wise parts of an optimizer's step over many arrays: their norm, scaling, AdamW.
//
// Arrays are split into blocks, which are divided among threads. The order of sums does not depend on the threads.
#pragma once

#include "elementwise.hpp"

namespace INKLING_ISA {

constexpr int64_t kBlockOf = 1 << 14;

// work(array, begin, end, number of the block) for the blocks of all arrays, in their order.
template <class Array, class Work>
inline void by_blocks(Pool& pool, const std::vector<Array>& arrays, const Work& work) {
    std::vector<std::pair<const Array*, int64_t>> blocks;
    for (const Array& array : arrays)
        for (int64_t begin = 0; begin < array.count; begin += kBlockOf) blocks.emplace_back(&array, begin);
    share(pool, int64_t(blocks.size()), kBlockOf, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const auto [array, begin] = blocks[i];
            work(*array, begin, std::min(array->count, begin + kBlockOf), i);
        }
    });
}

inline double norm_of(Pool& pool, const std::vector<inkling::Floats>& arrays) {
    size_t blocks = 0;
    for (const auto& array : arrays) blocks += (array.count + kBlockOf - 1) / kBlockOf;
    std::vector<float> sums(blocks);
    by_blocks(pool, arrays, [&](const inkling::Floats& array, int64_t begin, int64_t end, int64_t block) {
        sums[block] = summed(int(end - begin), [&](int i, int few) {
            const vec v = load_few(array.data + begin + i, few);
            return v * v;
        });
    });
    double total = 0;
    for (float sum : sums) total += sum;
    return std::sqrt(total);
}

inline void scale_all(Pool& pool, const std::vector<inkling::Floats>& arrays, float factor) {
    by_blocks(pool, arrays, [&](const inkling::Floats& array, int64_t begin, int64_t end, int64_t) {
        for (int64_t i = begin; i < end; ++i) array.data[i] *= factor;
    });
}

// Source: Loshchilov and Hutter 2019, as torch.optim.AdamW has it.
inline void adamw_all(Pool& pool, const std::vector<inkling::Adam>& arrays, float beta1, float beta2, float epsilon) {
    by_blocks(pool, arrays, [&](const inkling::Adam& a, int64_t begin, int64_t end, int64_t) {
        for (int64_t i = begin; i < end; i += LANES) {
            const int few = int(std::min<int64_t>(LANES, end - i));
            const vec grad = load_few(a.grads + i, few);
            const vec mean = load_few(a.means + i, few) * beta1 + grad * (1.0f - beta1);
            const vec square = load_few(a.squares + i, few) * beta2 + grad * grad * (1.0f - beta2);
            vec root;
            for (int lane = 0; lane < LANES; ++lane) root[lane] = std::sqrt(square[lane]);
            store_few(a.means + i, mean, few);
            store_few(a.squares + i, square, few);
            const vec weight = load_few(a.weights + i, few) * a.decay;
            store_few(a.weights + i, weight - mean * a.rate / (root * a.root_scale + epsilon), few);
        }
    });
}

}  // namespace INKLING_ISA
