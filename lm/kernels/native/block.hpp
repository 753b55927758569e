// A block of a Transformer over whole texts, forward and backward, each in one call.
//
//     x -> norm -> queries, keys, values -> (norm), turned by position -> attention -> product -> + x = between
//     between -> norm -> gate, up -> SwiGLU -> product -> + between = y
#pragma once

#include "attention.hpp"
#include "elementwise.hpp"
#include "training.hpp"

namespace INKLING_ISA {

using inkling::BlockPass;

class BlockRun {
public:
    BlockRun(const BlockPass& b, SequenceSpace& space, int threads)
        : b_(b), space_(space), pool_(space.pool(threads)), rows_(b.batch * b.time), mixed_(b.heads * b.width),
          shared_(b.kv_heads * b.width) {
        float* at = b.memory;
        const auto place = [&](float*& part, int64_t width) {
            part = at ? at + memory_ : nullptr;
            memory_ += (rows_ * width + kPanel - 1) / kPanel * kPanel;
        };
        place(input_scales_, 1), place(mlp_scales_, 1);
        place(query_scales_, b.heads), place(key_scales_, b.kv_heads), place(log_sums_, b.heads);
        place(normed_, b.size), place(between_, b.size), place(normed_between_, b.size);
        place(raw_queries_, mixed_), place(queries_, mixed_), place(attended_, mixed_), place(raw_keys_, shared_);
        place(gates_, b.inner), place(ups_, b.inner), place(gated_, b.inner);
    }

    // How many floats `memory` is to hold.
    size_t memory() const { return memory_; }

    void forward() {
        norm(b_.x, b_.input_norm, input_scales_, normed_);
        linear(normed_, b_.size, b_.query, mixed_, raw_queries_);
        linear(normed_, b_.size, b_.key, shared_, raw_keys_);
        linear(normed_, b_.size, b_.value, shared_, b_.values);
        norms_of(pool_, turned(b_.heads, raw_queries_, b_.query_norm, queries_, query_scales_));
        norms_of(pool_, turned(b_.kv_heads, raw_keys_, b_.key_norm, b_.keys, key_scales_));
        AttentionRun(attention(), pool_, space_.products).run();
        add_branch(attended_, mixed_, b_.output, b_.x, b_.mixed_seed, between_);
        norm(between_, b_.mlp_norm, mlp_scales_, normed_between_);
        linear(normed_between_, b_.size, b_.gate, b_.inner, gates_);
        linear(normed_between_, b_.size, b_.up, b_.inner, ups_);
        gate_all(pool_, gates_, ups_, nullptr, rows_ * b_.inner, gated_, nullptr);
        add_branch(gated_, b_.inner, b_.down, between_, b_.mlp_seed, b_.y);
    }

    void backward() {
        const int64_t size = rows_ * b_.size;
        // Slopes: of a branch after its dropout, of what a norm gave, of the sum between the branches; and of what has
        // the widths of the parts of a branch.
        float* branch = space_.rows(3 * size + rows_ * (std::max(b_.inner, 2 * mixed_) + shared_));
        float *normed = branch + size, *between = normed + size, *wide = between + size;

        const float* slope = dropped(b_.dy, b_.mlp_seed, branch);
        back_weight(slope, b_.size, gated_, b_.inner, b_.d_down);
        back_inputs(slope, b_.size, b_.down, b_.inner, wide);
        gate_all(pool_, gates_, ups_, wide, rows_ * b_.inner, gates_, ups_);
        back_weight(gates_, b_.inner, normed_between_, b_.size, b_.d_gate);
        back_weight(ups_, b_.inner, normed_between_, b_.size, b_.d_up);
        back_inputs(gates_, b_.inner, b_.gate, b_.size, normed);
        back_inputs(ups_, b_.inner, b_.up, b_.size, normed, true);
        norm_back(between_, b_.mlp_norm, mlp_scales_, normed, between, b_.d_mlp_norm);
        add(b_.dy, between);

        float *attended = wide, *queries = wide + rows_ * mixed_, *raw_keys = queries + rows_ * mixed_;
        slope = dropped(between, b_.mixed_seed, branch);
        back_weight(slope, b_.size, attended_, mixed_, b_.d_output);
        back_inputs(slope, b_.size, b_.output, mixed_, attended);
        Attention of = attention();
        of.d_outputs = attended, of.d_queries = queries, of.d_keys = b_.d_keys, of.d_values = b_.d_values;
        of.adds = b_.adds;
        AttentionRun(of, pool_, space_.products).run();
        // The slopes of the outputs are done with: their place takes those of the queries before the norm.
        float* raw_queries = attended;
        turn_back(turned(b_.heads, raw_queries_, b_.query_norm, nullptr, query_scales_), queries, raw_queries,
                  b_.d_query_norm);
        turn_back(turned(b_.kv_heads, raw_keys_, b_.key_norm, nullptr, key_scales_), b_.d_keys, raw_keys,
                  b_.d_key_norm);
        back_weight(raw_queries, mixed_, normed_, b_.size, b_.d_query);
        back_weight(raw_keys, shared_, normed_, b_.size, b_.d_key);
        back_weight(b_.d_values, shared_, normed_, b_.size, b_.d_value);
        back_inputs(raw_queries, mixed_, b_.query, b_.size, normed);
        back_inputs(raw_keys, shared_, b_.key, b_.size, normed, true);
        back_inputs(b_.d_values, shared_, b_.value, b_.size, normed, true);
        norm_back(b_.x, b_.input_norm, input_scales_, normed, b_.dx, b_.d_input_norm);
        add(between, b_.dx);
    }

private:
    // -- products ----------------------------------------------------------------------------------------------------

    void linear(const float* x, int inputs, const float* weight, int outputs, float* y, bool adds = false) {
        multiply(pool_, space_.products,
                 {{x, inputs}, false, {weight, inputs}, true, {y, outputs}, int(rows_), inputs, outputs, adds});
    }
    void back_inputs(const float* dy, int outputs, const float* weight, int inputs, float* dx, bool adds = false) {
        multiply(pool_, space_.products,
                 {{dy, outputs}, false, {weight, inputs}, false, {dx, inputs}, int(rows_), outputs, inputs, adds});
    }
    void back_weight(const float* dy, int outputs, const float* x, int inputs, float* d_weight) {
        multiply(pool_, space_.products,
                 {{dy, outputs}, true, {x, inputs}, false, {d_weight, inputs}, outputs, int(rows_), inputs});
    }

    // to = stream + dropout(x weight^T), the end of a branch.
    void add_branch(const float* x, int inputs, const float* weight, const float* stream, uint64_t seed, float* to) {
        if (b_.drop > 0) {
            linear(x, inputs, weight, b_.size, to);
            drop_all(pool_, to, to, rows_ * b_.size, seed, b_.drop);
            add(stream, to);
        } else {
            std::memcpy(to, stream, rows_ * b_.size * 4);
            linear(x, inputs, weight, b_.size, to, true);
        }
    }
    const float* dropped(const float* slope, uint64_t seed, float* to) {
        if (b_.drop == 0) return slope;
        drop_all(pool_, slope, to, rows_ * b_.size, seed, b_.drop);
        return to;
    }
    void add(const float* from, float* to) {
        share(pool_, rows_ * b_.size, 1, kPanel, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) to[i] += from[i];
        });
    }

    // -- norms and attention -----------------------------------------------------------------------------------------

    void norm(const float* x, const float* weight, float* scales, float* y) {
        norms_of(pool_, {rows_, 1, b_.size, b_.epsilon, x, weight, nullptr, nullptr, y, scales});
    }
    void norm_back(const float* x, const float* weight, float* scales, const float* dy, float* dx, float* d_weight) {
        norms_of(pool_, {rows_, 1, b_.size, b_.epsilon, x, weight, nullptr, nullptr, nullptr, scales, dy, dx, d_weight});
    }
    inkling::Norms turned(int heads, const float* raw, const float* weight, float* y, float* scales) const {
        return {rows_, heads, b_.width, b_.epsilon, raw, weight, b_.cosines, b_.sines, y, scales};
    }
    void turn_back(inkling::Norms of, const float* dy, float* dx, float* d_weight) {
        of.dy = dy, of.dx = dx, of.d_weight = d_weight;
        norms_of(pool_, of);
    }
    Attention attention() const {
        Attention of{b_.batch, b_.time, b_.heads, b_.kv_heads, b_.width, queries_, b_.keys, b_.values, attended_,
                     log_sums_};
        of.seed = b_.attention_seed, of.drop = b_.drop;
        return of;
    }

    const BlockPass& b_;
    SequenceSpace& space_;
    Pool& pool_;
    const int64_t rows_;
    const int mixed_, shared_;
    size_t memory_ = 0;
    float *input_scales_, *mlp_scales_, *query_scales_, *key_scales_, *log_sums_;
    float *normed_, *between_, *normed_between_, *raw_queries_, *queries_, *attended_, *raw_keys_;
    float *gates_, *ups_, *gated_;
};

}  // namespace INKLING_ISA
