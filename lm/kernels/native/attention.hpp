// Causal attention of whole texts, forward and backward, a block of queries at a time; scores are not kept.
//
// Source: Dao 2023 (FlashAttention-2), for what backward computes again from the row's log-sum-exp.
#pragma once

#include "kernel.hpp"
#include "product.hpp"

namespace INKLING_ISA {

using inkling::Attention;

constexpr int kQueries = 32;  // rows of scores at a time

class AttentionRun {
public:
    AttentionRun(const Attention& a, Pool& pool, ProductSpace& space)
        : a_(a), pool_(pool), space_(space), dropout_(a.seed, a.drop) {}

    void run() {
        const int parts = std::min(a_.batch * a_.kv_heads, pool_.threads());
        space_.reserve(parts);
        const size_t square = size_t(kQueries) * padded(a_.time);
        Buffer<float> scratch(2 * square * parts);
        pool_.wake();
        pool_.run(parts, [&](int part) {
            float *scores = scratch.data() + 2 * square * part, *d_scores = scores + square;
            const int all = a_.batch * a_.kv_heads;
            for (int which = all * part / parts; which < all * (part + 1) / parts; ++which)
                group(which / a_.kv_heads, which % a_.kv_heads, part, scores, d_scores);
        });
    }

private:
    // Rows in time of one head of (batch, time, heads, width).
    template <class T>
    RowsAt<T> rows(T* of, int heads, int text, int head, int first) const {
        const int64_t step = int64_t(heads) * a_.width;
        return {of + (int64_t(text) * a_.time + first) * step + head * a_.width, step};
    }

    void group(int text, int kv_head, int part, float* scores, float* d_scores) const {
        const int wide = padded(a_.time), width = a_.width, shared = a_.heads / a_.kv_heads;
        const float scale = 1.0f / std::sqrt(float(width));
        auto shared_rows = [&](auto* of) { return rows(of, a_.kv_heads, text, kv_head, 0); };
        const auto keys = shared_rows(a_.keys), values = shared_rows(a_.values);
        auto multiply = [&](const Product& product) {
            product.run(0, product.rows, space_.packed(part));
        };
        if (a_.d_outputs && !a_.adds)
            for (float* grad : {a_.d_keys, a_.d_values})
                for (int row = 0; row < a_.time; ++row) std::memset(shared_rows(grad)[row], 0, width * 4);
        for (int head = kv_head * shared; head < (kv_head + 1) * shared; ++head)
            for (int first = 0; first < a_.time; first += kQueries) {
                const int count = std::min(kQueries, a_.time - first), seen = first + count;
                auto own_rows = [&](auto* of) { return rows(of, a_.heads, text, head, first); };
                const auto queries = own_rows(a_.queries);
                const int64_t first_row = (int64_t(text) * a_.heads + head) * a_.time + first;
                float* sums = a_.log_sums + first_row;
                const ConstRows score_rows{scores, wide};
                multiply({queries, false, keys, true, {scores, wide}, count, width, seen});
                if (!a_.d_outputs) {
                    softmax(scores, first, count, seen, scale, sums);
                    for (int row = 0; row < count; ++row)
                        drop(scores + int64_t(row) * wide, first + row + 1, first_row + row);
                    multiply({score_rows, false, values, false, own_rows(a_.outputs), count, seen, width});
                    continue;
                }
                const auto d_outputs = own_rows(a_.d_outputs);
                const ConstRows d_score_rows{d_scores, wide};
                multiply({d_outputs, false, values, true, {d_scores, wide}, count, width, seen});
                for (int row = 0; row < count; ++row) {
                    const int64_t at = int64_t(row) * wide;
                    drop(d_scores + at, first + row + 1, first_row + row);
                    back(scores + at, d_scores + at, first + row + 1, seen, scale, sums[row]);
                    drop(scores + at, first + row + 1, first_row + row);
                }
                multiply({d_score_rows, false, keys, false, own_rows(a_.d_queries), count, seen, width});
                // Summed over blocks of queries, and over heads that share these keys.
                multiply({d_score_rows, true, queries, false, shared_rows(a_.d_keys), seen, count, width, true});
                multiply({score_rows, true, d_outputs, false, shared_rows(a_.d_values), seen, count, width, true});
            }
    }

    // Dropout of the first `visible` scores of a row, or of their gradients; `row` counts all rows of scores.
    void drop(float* of, int visible, int64_t row) const {
        if (a_.drop > 0)
            for (int i = 0; i < visible; i += LANES) store(of + i, dropout_(load(of + i), row * padded(a_.time) + i));
    }

    // A vector of the first `visible` numbers of a row, `other` in the lanes after them.
    static vec visible_or(const float* row, int i, int visible, float other) {
        return i + LANES <= visible ? load(row + i) : kept(load(row + i), visible - i, other);
    }
    static void zero_masked(float* row, int visible, int seen) {
        if (visible < seen) std::memset(row + visible, 0, (seen - visible) * 4);
    }

    // Softmax with the causal mask: row i keeps its first first + i + 1 of `seen` scores, the others become zero. Each
    // step is done for all rows before the next one: within a row each step depends on the one before.
    void softmax(float* scores, int first, int count, int seen, float scale, float* log_sums) const {
        const int wide = padded(a_.time);
        float tops[kQueries], sums[kQueries];
        for (int row = 0; row < count; ++row) {
            const float* of = scores + int64_t(row) * wide;
            vec most = broadcast(-1e30f);
            for (int i = 0; i < first + row + 1; i += LANES) {
                const vec next = visible_or(of, i, first + row + 1, -1e30f);
                most = next > most ? next : most;
            }
            tops[row] = max_of(most) * scale;
        }
        for (int row = 0; row < count; ++row) {
            float* of = scores + int64_t(row) * wide;
            sums[row] = summed(first + row + 1, [&](int i, int) {
                const vec e = exp(visible_or(of, i, first + row + 1, -1e30f) * scale - tops[row]);
                store(of + i, e);
                return e;
            });
        }
        for (int row = 0; row < count; ++row) log_sums[row] = tops[row] + std::log(sums[row]);
        for (int row = 0; row < count; ++row) {
            float* of = scores + int64_t(row) * wide;
            for (int i = 0; i < first + row + 1; i += LANES) store(of + i, load(of + i) * (1.0f / sums[row]));
            zero_masked(of, first + row + 1, seen);
        }
    }

    // Scores become probabilities, and gradients of the probabilities become gradients of the scores.
    static void back(float* scores, float* d_scores, int visible, int seen, float scale, float log_sum) {
        const float mean = summed(visible, [&](int i, int) {
            const vec e = exp(visible_or(scores, i, visible, -1e30f) * scale - log_sum);
            store(scores + i, e);
            return e * visible_or(d_scores, i, visible, 0.0f);
        });
        for (int i = 0; i < visible; i += LANES)
            store(d_scores + i, load(scores + i) * (visible_or(d_scores, i, visible, 0.0f) - mean) * scale);
        zero_masked(scores, visible, seen);
        zero_masked(d_scores, visible, seen);
    }

    const Attention& a_;
    Pool& pool_;
    ProductSpace& space_;
    const Dropout dropout_;
};

}  // namespace INKLING_ISA
