// What a Transformer does between its products, forward and backward: embedding, RMSNorm, rotary positions, SwiGLU.
//
// Each runs over rows once, where the same on torch is a chain of passes. Sums use 16 lanes, as everywhere.
#pragma once

#include "kernel.hpp"
#include "linear.hpp"

namespace INKLING_ISA {

// y = x w / sqrt(mean(x x) + epsilon); `scale` keeps the factor of each row for backward.
inline void norm_row(const float* x, const float* w, int width, float epsilon, float* y, float& scale) {
    const float squares = summed(width, [&](int i, int few) {
        const vec v = load_few(x + i, few);
        return v * v;
    });
    scale = 1.0f / std::sqrt(squares / width + epsilon);
    for (int i = 0; i < width; i += LANES)
        store_few(y + i, load_few(x + i, width - i) * scale * load_few(w + i, width - i), width - i);
}

inline void norm_row_back(const float* x, const float* w, float scale, int width, const float* dy, float* dx,
                          float* dw) {
    const float dot = summed(width, [&](int i, int few) {
        return load_few(dy + i, few) * load_few(w + i, few) * load_few(x + i, few);
    });
    const float share = dot * scale * scale / width;
    for (int i = 0; i < width; i += LANES) {
        const int few = width - i;
        const vec grad = load_few(dy + i, few), from = load_few(x + i, few);
        store_few(dw + i, load_few(dw + i, few) + grad * from * scale, few);
        store_few(dx + i, (grad * load_few(w + i, few) - from * share) * scale, few);
    }
}

// Rotary embedding: rotates pairs (i, i + half) of a head by the angles of its position, or `back` by their negatives.
inline void rotate(const float* x, const float* cosines, const float* sines, int half, float* y, bool back) {
    for (int i = 0; i < half; i += LANES) {
        const int few = half - i;
        const vec first = load_few(x + i, few), second = load_few(x + half + i, few);
        const vec cosine = load_few(cosines + i, few);
        vec sine = load_few(sines + i, few);
        if (back) sine = -sine;
        store_few(y + i, first * cosine - second * sine, few);
        store_few(y + half + i, second * cosine + first * sine, few);
    }
}

// One of the rows of `n`, forward or backward; `between` holds a row, `sums` gains the gradient of the norm's weight.
inline void rms_norm_rope(const inkling::Norms& n, int64_t row, float* between, float* sums) {
    const int half = n.width / 2;
    const int64_t at = row * n.width, angles = row / n.heads * half;
    if (!n.dy) {
        const float* from = n.x + at;
        if (n.weight) {
            float* to = n.cosines ? between : n.y + at;
            norm_row(from, n.weight, n.width, n.epsilon, to, n.scales[row]);
            from = to;
        }
        if (n.cosines) rotate(from, n.cosines + angles, n.sines + angles, half, n.y + at, false);
    } else {
        const float* grad = n.dy + at;
        if (n.cosines) {
            float* to = n.weight ? between : n.dx + at;
            rotate(grad, n.cosines + angles, n.sines + angles, half, to, true);
            grad = to;
        }
        if (n.weight) norm_row_back(n.x + at, n.weight, n.scales[row], n.width, grad, n.dx + at, sums);
    }
}

inline void swiglu(const float* gate, const float* up, int64_t count, float* y) {
    for (int64_t i = 0; i < count; i += LANES) {
        const int few = int(std::min<int64_t>(LANES, count - i));
        const vec g = load_few(gate + i, few);
        store_few(y + i, g * sigmoid(g) * load_few(up + i, few), few);
    }
}

// `y`, or none: the output of forward, computed again.
inline void swiglu_back(const float* gate, const float* up, const float* dy, int64_t count, float* d_gate, float* d_up,
                        float* y = nullptr) {
    for (int64_t i = 0; i < count; i += LANES) {
        const int few = int(std::min<int64_t>(LANES, count - i));
        const vec g = load_few(gate + i, few), sig = sigmoid(g), grad = load_few(dy + i, few);
        const vec other = load_few(up + i, few), by = grad * other;
        if (y) store_few(y + i, g * sig * other, few);
        // Read before written: the gradients may overwrite gate and up.
        store_few(d_up + i, grad * g * sig, few);
        store_few(d_gate + i, by * sig * (1.0f + g * (1.0f - sig)), few);
    }
}

// to[i] = from[i] / (1 - rate), or 0 with probability `rate`, for i in [begin, end); the seed decides which.
// `begin` is a multiple of 16.
inline void drop_some(const float* from, float* to, int64_t begin, int64_t end, uint64_t seed, float rate) {
    const Dropout dropout(seed, rate);
    int64_t i = begin;
    for (; i + LANES <= end; i += LANES) store(to + i, dropout(load(from + i), i));
    if (i < end) store_few(to + i, dropout(load_few(from + i, int(end - i)), i), int(end - i));
}

// -- divided among threads -----------------------------------------------------------------------------------------

// work(begin, end) over `count` rows of `width` numbers, divided among threads if there is enough work;
// every share begins at a multiple of `unit`.
template <class Work>
void share(Pool& pool, int64_t count, int64_t width, int64_t unit, const Work& work) {
    const int parts = count * width < 1 << 16 ? 1 : pool.threads();
    if (parts > 1) pool.wake();
    const int64_t units = (count + unit - 1) / unit;
    pool.run(parts, [&](int part) {
        work(units * part / parts * unit, std::min(count, units * (part + 1) / parts * unit));
    });
}

inline void drop_all(Pool& pool, const float* from, float* to, int64_t count, uint64_t seed, float rate) {
    share(pool, count, 1, kPanel, [&](int64_t begin, int64_t end) { drop_some(from, to, begin, end, seed, rate); });
}

inline void look_up(Pool& pool, const inkling::LookUp& l) {
    if (!l.back)
        return share(pool, l.count, l.width, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                std::memcpy(l.to + i * l.width, l.from + l.ids[i] * l.width, size_t(l.width) * 4);
        });
    // By columns: the order of a row's sum does not depend on the threads.
    share(pool, l.width, l.count, kPanel, [&](int64_t begin, int64_t end) {
        for (int64_t i = 0; i < l.count; ++i) {
            const float* from = l.from + i * l.width;
            float* to = l.to + l.ids[i] * l.width;
            for (int64_t k = begin; k < end; ++k) to[k] += from[k];
        }
    });
}

inline void norms_of(Pool& pool, const inkling::Norms& n) {
    // The order of sums over rows does not depend on the threads: kBlocks partial sums, then their sum.
    constexpr int kBlocks = 16;
    const int64_t rows = n.rows * n.heads, block = std::max<int64_t>((rows + kBlocks - 1) / kBlocks, 1);
    std::vector<float> sums(n.dy && n.weight ? size_t(kBlocks) * n.width : 0);
    share(pool, rows, n.width, block, [&](int64_t begin, int64_t end) {
        std::vector<float> between(n.width);
        for (int64_t row = begin; row < end; ++row)
            rms_norm_rope(n, row, between.data(), sums.data() + row / block * n.width);
    });
    for (size_t i = 0; i < sums.size(); ++i) n.d_weight[i % n.width] += sums[i];
}

inline void gate_all(Pool& pool, const float* gate, const float* up, const float* dy, int64_t count, float* y,
                     float* d_up) {
    share(pool, count, 1, kPanel, [&](int64_t begin, int64_t end) {
        if (dy)
            swiglu_back(gate + begin, up + begin, dy + begin, end - begin, y + begin, d_up + begin);
        else
            swiglu(gate + begin, up + begin, end - begin, y + begin);
    });
}

}  // namespace INKLING_ISA
