// Causal attention of whole texts, forward and backward, a block of queries at a time; scores are not kept.
//
// Source: Dao 2023 (FlashAttention-2), for what backward makes again from the row's log-sum-exp.
#pragma once

#include "kernel.hpp"
#include "product.hpp"

namespace INKLING_ISA {

using inkling::Attention;

constexpr int kQueries = 32;  // rows of scores at a time

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
            product.run(0, product.rows, space_.packed(part));
        };
        if (a_.d_outputs && !a_.adds)
            for (float* slopes_of : {a_.d_keys, a_.d_values})
                for (int row = 0; row < a_.time; ++row) std::memset(shared_rows(slopes_of)[row], 0, width * 4);
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
                    softmax(scores, first, count, seen, scale, sums);
                    for (int row = 0; row < count; ++row)
                        drop(scores + int64_t(row) * wide, first + row + 1, place + row);
                    multiply({square, false, values, false, own_rows(a_.outputs), count, seen, width});
                    continue;
                }
                const auto slope = own_rows(a_.d_outputs);
                const ConstRows turned{slopes, wide};
                multiply({slope, false, values, true, {slopes, wide}, count, width, seen});
                for (int row = 0; row < count; ++row) {
                    const int64_t at = int64_t(row) * wide;
                    drop(slopes + at, first + row + 1, place + row);
                    back(scores + at, slopes + at, first + row + 1, seen, scale, sums[row]);
                    drop(scores + at, first + row + 1, place + row);
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

    // A vector of the first `known` of a row, `other` in the lanes after them.
    static vec known_of(const float* row, int i, int known, float other) {
        return i + LANES <= known ? load(row + i) : kept(load(row + i), known - i, other);
    }
    static void hide(float* row, int known, int seen) {
        if (known < seen) std::memset(row + known, 0, (seen - known) * 4);
    }

    // Scores of rows that know the first + 1, first + 2, ... first of `seen` become probabilities, the others zero. One
    // thing for all rows after the other: within a row each waits for the one before.
    void softmax(float* scores, int first, int count, int seen, float scale, float* log_sums) const {
        const int wide = padded(a_.time);
        float tops[kQueries], sums[kQueries];
        for (int row = 0; row < count; ++row) {
            const float* of = scores + int64_t(row) * wide;
            vec most = spread(-1e30f);
            for (int i = 0; i < first + row + 1; i += LANES) {
                const vec next = known_of(of, i, first + row + 1, -1e30f);
                most = next > most ? next : most;
            }
            tops[row] = most_of(most) * scale;
        }
        for (int row = 0; row < count; ++row) {
            float* of = scores + int64_t(row) * wide;
            sums[row] = summed(first + row + 1, [&](int i, int) {
                const vec e = exp(known_of(of, i, first + row + 1, -1e30f) * scale - tops[row]);
                store(of + i, e);
                return e;
            });
        }
        for (int row = 0; row < count; ++row) log_sums[row] = tops[row] + std::log(sums[row]);
        for (int row = 0; row < count; ++row) {
            float* of = scores + int64_t(row) * wide;
            for (int i = 0; i < first + row + 1; i += LANES) store(of + i, load(of + i) * (1.0f / sums[row]));
            hide(of, first + row + 1, seen);
        }
    }

    // Scores become probabilities, and slopes of the probabilities become slopes of the scores.
    static void back(float* scores, float* slopes, int known, int seen, float scale, float log_sum) {
        const float mean = summed(known, [&](int i, int) {
            const vec e = exp(known_of(scores, i, known, -1e30f) * scale - log_sum);
            store(scores + i, e);
            return e * known_of(slopes, i, known, 0.0f);
        });
        for (int i = 0; i < known; i += LANES)
            store(slopes + i, load(scores + i) * (known_of(slopes, i, known, 0.0f) - mean) * scale);
        hide(scores, known, seen);
        hide(slopes, known, seen);
    }

    const Attention& a_;
    Pool& pool_;
    ProductSpace& space_;
    const Dropping dropping_;
};

}  // namespace INKLING_ISA
