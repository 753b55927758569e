// Causal attention of whole texts, forward and backward, a block of queries at a time; scores are not kept.
//
// Source: Dao 2023 (FlashAttention-2), for what backward makes again from the row's log-sum-exp.
#pragma once

#include "kernel.hpp"
#include "product.hpp"

namespace INKLING_ISA {

using inkling::Attention;

constexpr int kQueries = 64;  // rows of scores at a time

class AttentionRun {
public:
    AttentionRun(const Attention& a, Pool& pool, ProductSpace& space)
        : a_(a), pool_(pool), space_(space), dropping_(a.seed, a.drop) {}

    void run() {
        const int parts = std::min(a_.batch * a_.kv_heads, pool_.threads());
        space_.reserve(parts);
        const size_t square = size_t(kQueries) * padded(a_.time);
        Buffer<float> scratch(2 * square * parts);
        pool_.wake();
        pool_.run(parts, [&](int part) {
            float *scores = scratch.data() + 2 * square * part, *slopes = scores + square;
            const int all = a_.batch * a_.kv_heads;
            for (int which = all * part / parts; which < all * (part + 1) / parts; ++which)
                group(which / a_.kv_heads, which % a_.kv_heads, part, scores, slopes);
        });
    }

private:
    // Rows in time of one head of (batch, time, heads, width).
    template <class T>
    RowsAt<T> rows(T* of, int heads, int text, int head, int first) const {
        const int64_t step = int64_t(heads) * a_.width;
        return {of + (int64_t(text) * a_.time + first) * step + head * a_.width, step};
    }

    void group(int text, int kv_head, int part, float* scores, float* slopes) const {
        const int wide = padded(a_.time), width = a_.width, shared = a_.heads / a_.kv_heads;
        const float scale = 1.0f / std::sqrt(float(width));
        auto shared_rows = [&](auto* of) { return rows(of, a_.kv_heads, text, kv_head, 0); };
        const auto keys = shared_rows(a_.keys), values = shared_rows(a_.values);
        auto multiply = [&](const Product& product) {
            product.run(0, product.rows, space_.packed(part), space_.turned(part));
        };
        for (int head = kv_head * shared; head < (kv_head + 1) * shared; ++head)
            for (int first = 0; first < a_.time; first += kQueries) {
                const int count = std::min(kQueries, a_.time - first), seen = first + count;
                auto own_rows = [&](auto* of) { return rows(of, a_.heads, text, head, first); };
                const auto queries = own_rows(a_.queries);
                const int64_t place = (int64_t(text) * a_.heads + head) * a_.time + first;
                float* sums = a_.log_sums + place;
                const ConstRows square{scores, wide};
                multiply({queries, false, keys, true, {scores, wide}, count, width, seen});
                if (!a_.d_outputs) {
                    for (int row = 0; row < count; ++row) {
                        softmax(scores + int64_t(row) * wide, first + row + 1, seen, scale, sums[row]);
                        drop(scores + int64_t(row) * wide, first + row + 1, place + row);
                    }
                    multiply({square, false, values, false, own_rows(a_.outputs), count, seen, width});
                    continue;
                }
                const auto slope = own_rows(a_.d_outputs);
                const ConstRows turned{slopes, wide};
                multiply({slope, false, values, true, {slopes, wide}, count, width, seen});
                for (int row = 0; row < count; ++row) {
                    drop(slopes + int64_t(row) * wide, first + row + 1, place + row);
                    back(scores + int64_t(row) * wide, slopes + int64_t(row) * wide, first + row + 1, seen, scale,
                         sums[row]);
                    drop(scores + int64_t(row) * wide, first + row + 1, place + row);
                }
                multiply({turned, false, keys, false, own_rows(a_.d_queries), count, seen, width});
                // Added to what later blocks of queries, and other heads that share these keys, bring.
                multiply({turned, true, queries, false, shared_rows(a_.d_keys), seen, count, width, true});
                multiply({square, true, slope, false, shared_rows(a_.d_values), seen, count, width, true});
            }
    }

    // Dropout of the first `known` of a row, or of their slopes; `row` counts all rows of scores.
    void drop(float* of, int known, int64_t row) const {
        if (a_.drop > 0)
            for (int i = 0; i < known; i += LANES) store(of + i, dropping_(load(of + i), row * padded(a_.time) + i));
    }

    static vec probability(const float* scores, int i, float scale, float log_sum) {
        return exp(load(scores + i) * scale - log_sum);
    }
    // For what lies after a query: a value in the rest of the last vector, zero in the end.
    static void fill(float* row, int known, float value) {
        for (int i = known; i < padded(known); ++i) row[i] = value;
    }
    static void hide(float* row, int known, int seen) {
        if (known < seen) std::memset(row + known, 0, (seen - known) * 4);
    }

    // The first `known` of a row of `seen` scores become probabilities, the others zero.
    static void softmax(float* scores, int known, int seen, float scale, float& log_sum) {
        fill(scores, known, -1e30f);
        vec tops = load(scores);
        for (int i = LANES; i < known; i += LANES) {
            const vec next = load(scores + i);
            tops = next > tops ? next : tops;
        }
        float most = tops[0];
        for (int lane = 1; lane < LANES; ++lane) most = std::max(most, tops[lane]);
        const float sum = summed(known, [&](int i, int) {
            const vec e = probability(scores, i, scale, most * scale);
            store(scores + i, e);
            return e;
        });
        for (int i = 0; i < known; i += LANES) store(scores + i, load(scores + i) * (1.0f / sum));
        log_sum = most * scale + std::log(sum);
        hide(scores, known, seen);
    }

    // Scores become probabilities, and slopes of the probabilities become slopes of the scores.
    static void back(float* scores, float* slopes, int known, int seen, float scale, float log_sum) {
        fill(scores, known, -1e30f);
        fill(slopes, known, 0.0f);
        const float mean = summed(known, [&](int i, int) {
            const vec e = probability(scores, i, scale, log_sum);
            store(scores + i, e);
            return e * load(slopes + i);
        });
        for (int i = 0; i < known; i += LANES)
            store(slopes + i, load(scores + i) * (load(slopes + i) - mean) * scale);
        hide(scores, known, seen);
        hide(slopes, known, seen);
    }

    const Attention& a_;
    Pool& pool_;
    ProductSpace& space_;
    const Dropping dropping_;
};

}  // namespace INKLING_ISA
