// A block of a Transformer over whole texts, forward and backward, each in one call.
//
//     x -> norm -> queries, keys, values -> (norm), rotated by position -> attention -> product -> + x = between
//     between -> norm -> gate, up -> SwiGLU -> product -> + between = y
#pragma once

#include <utility>

#include "attention.hpp"
#include "elementwise.hpp"
#include "training.hpp"

namespace INKLING_ISA {

using inkling::BlockPass;

constexpr int kChunk = 128;  // at most; fewer if there would be fewer chunks than threads
constexpr int kSummed = 32;  // rows whose gradients of a norm's weight have a partial sum
constexpr int kPiece = 64;   // rows of a weight's gradient in one thread's task

class BlockRun {
public:
    BlockRun(const BlockPass& b, SequenceSpace& space, int threads)
        : b_(b), space_(space), pool_(space.pool(threads)), rows_(b.batch * b.time), mixed_(b.heads * b.width),
          shared_(b.kv_heads * b.width) {
        float* at = b.memory;
        const auto take = [&](float*& part, int64_t width) {
            part = at ? at + memory_ : nullptr;
            memory_ += (rows_ * width + kPanel - 1) / kPanel * kPanel;
        };
        take(input_scales_, 1), take(mlp_scales_, 1);
        take(query_scales_, b.heads), take(key_scales_, b.kv_heads), take(log_sums_, b.heads);
        take(between_, b.size), take(raw_queries_, mixed_), take(raw_keys_, b.key_norm ? shared_ : 0);
        take(attended_, mixed_), take(gates_, b.inner), take(ups_, b.inner);
    }

    // How many floats `memory` is to hold.
    size_t memory() const { return memory_; }

    void forward() {
        pack_weights(true);
        float* queries = b_.query_norm ? space_.rows(rows_ * mixed_) : raw_queries_;
        float* raw_keys = b_.key_norm ? raw_keys_ : b_.keys;
        in_chunks([&](const Chunk& c) {
            float* normed = sequence_space().chunk(c.count * b_.size);
            norm(c, b_.x, b_.input_norm, input_scales_, normed);
            run(c.count, normed, query_, c.of(raw_queries_, mixed_));
            run(c.count, normed, key_, c.of(raw_keys, shared_));
            run(c.count, normed, value_, c.of(b_.values, shared_));
            each_norm(c, rotated(c, b_.heads, raw_queries_, b_.query_norm, queries, query_scales_));
            each_norm(c, rotated(c, b_.kv_heads, raw_keys, b_.key_norm, b_.keys, key_scales_));
        });
        AttentionRun(attention(queries), pool_, space_.products).run();
        in_chunks([&](const Chunk& c) {
            float* normed = sequence_space().chunk(c.count * (b_.size + b_.inner));
            float *gated = normed + c.count * b_.size, *gates = c.of(gates_, b_.inner), *ups = c.of(ups_, b_.inner);
            add_branch(c, c.of(attended_, mixed_), output_, b_.x, b_.mixed_seed, between_);
            norm(c, between_, b_.mlp_norm, mlp_scales_, normed);
            run(c.count, normed, gate_, gates);
            run(c.count, normed, up_, ups);
            swiglu(gates, ups, c.count * b_.inner, gated);
            add_branch(c, gated, down_, between_, b_.mlp_seed, b_.y);
        });
    }

    void backward() {
        pack_weights(false);
        const int64_t branches = b_.drop > 0 ? 2 * b_.size : 0, mixed = (b_.query_norm ? 3 : 2) * mixed_;
        float* at = space_.rows(rows_ * (3 * b_.size + branches + mixed + shared_ + b_.inner));
        const auto take = [&](int64_t width) { return std::exchange(at, at + rows_ * width); };
        float* queries = b_.query_norm ? take(mixed_) : raw_queries_;
        // Computed again: that takes less time than storing them.
        float *normed = take(b_.size), *normed_between = take(b_.size), *gated = take(b_.inner);
        // Gradients: of the sum between the branches, of both branches after their dropout, of the attention's outputs,
        // of the queries, of the keys before their norm.
        float* between = take(b_.size);
        float* mlp_branch = branches ? take(b_.size) : const_cast<float*>(b_.dy);
        float* mixed_branch = branches ? take(b_.size) : between;
        float *attended = take(mixed_), *d_queries = take(mixed_), *d_raw_keys = take(shared_);
        std::vector<float> mlp_sums(sums(b_.size)), input_sums(sums(b_.size)), query_sums(sums(b_.width)),
            key_sums(sums(b_.width));

        in_chunks([&](const Chunk& c) {
            float* wide = sequence_space().chunk(c.count * (b_.inner + b_.size));
            float *d_normed = wide + c.count * b_.inner, *gates = c.of(gates_, b_.inner), *ups = c.of(ups_, b_.inner);
            drop(c, b_.dy, b_.mlp_seed, mlp_branch);
            run(c.count, c.of(mlp_branch, b_.size), down_, wide);
            swiglu_back(gates, ups, wide, c.count * b_.inner, gates, ups, c.of(gated, b_.inner));
            run(c.count, gates, gate_, d_normed);
            run(c.count, ups, up_, d_normed, true);
            norm(c, between_, b_.mlp_norm, mlp_scales_, c.of(normed_between, b_.size));
            norm_back(c, between_, b_.mlp_norm, mlp_scales_, d_normed, between, mlp_sums.data());
            add(c, b_.dy, between);
            drop(c, between, b_.mixed_seed, mixed_branch);
            run(c.count, c.of(mixed_branch, b_.size), output_, c.of(attended, mixed_));
            if (b_.query_norm)
                each_norm(c, rotated(c, b_.heads, raw_queries_, b_.query_norm, queries, query_scales_));
        });
        Attention of = attention(queries);
        of.d_outputs = attended, of.d_queries = d_queries, of.d_keys = b_.d_keys, of.d_values = b_.d_values;
        of.adds = b_.adds;
        AttentionRun(of, pool_, space_.products).run();
        // The gradient of the outputs is used up: its memory takes that of the queries before the norm.
        float* d_raw_queries = attended;
        in_chunks([&](const Chunk& c) {
            float* d_normed = sequence_space().chunk(c.count * b_.size);
            rotate_back(c, rotated(c, b_.heads, raw_queries_, b_.query_norm, nullptr, query_scales_), d_queries,
                      d_raw_queries, query_sums.data());
            rotate_back(c, rotated(c, b_.kv_heads, raw_keys_, b_.key_norm, nullptr, key_scales_), b_.d_keys, d_raw_keys,
                      key_sums.data());
            run(c.count, c.of(d_raw_queries, mixed_), query_, d_normed);
            run(c.count, c.of(d_raw_keys, shared_), key_, d_normed, true);
            run(c.count, c.of(b_.d_values, shared_), value_, d_normed, true);
            norm(c, b_.x, b_.input_norm, input_scales_, c.of(normed, b_.size));
            norm_back(c, b_.x, b_.input_norm, input_scales_, d_normed, b_.dx, input_sums.data());
            add(c, between, b_.dx);
        });
        add_up(mlp_sums, b_.size, b_.d_mlp_norm), add_up(input_sums, b_.size, b_.d_input_norm);
        add_up(query_sums, b_.width, b_.d_query_norm), add_up(key_sums, b_.width, b_.d_key_norm);
        weight_grads({
            {gated, b_.inner, {{mlp_branch, b_.size, b_.d_down}}},
            {normed_between, b_.size, {{gates_, b_.inner, b_.d_gate}, {ups_, b_.inner, b_.d_up}}},
            {attended_, mixed_, {{mixed_branch, b_.size, b_.d_output}}},
            {normed, b_.size, {{d_raw_queries, mixed_, b_.d_query}, {d_raw_keys, shared_, b_.d_key},
                               {b_.d_values, shared_, b_.d_value}}},
        });
    }

private:
    // Rows that pass through all products and element-wise steps while they are in the caches; one thread's task.
    struct Chunk {
        int64_t begin;
        int count;
        template <class T>
        T* of(T* rows, int64_t width) const {
            return rows + begin * width;
        }
    };

    template <class Work>
    void in_chunks(const Work& work) {
        const int64_t each = (rows_ + pool_.threads() - 1) / pool_.threads();
        const int64_t rows = std::min<int64_t>(kChunk, (each + kSummed - 1) / kSummed * kSummed);
        const int chunks = int((rows_ + rows - 1) / rows);
        if (chunks > 1) pool_.wake();
        pool_.run(chunks, [&](int number) {
            const int64_t begin = number * rows;
            work(Chunk{begin, int(std::min(rows, rows_ - begin))});
        });
    }

    // -- products ----------------------------------------------------------------------------------------------------

    // A weight, packed for products of rows with its transpose (forward) or with itself (backward).
    struct Weight {
        int inputs, outputs;  // of the product
        float* packed;
    };

    void pack_weights(bool forward) {
        struct Plain {
            const float* weight;
            int outputs, inputs;
            Weight* packed;
        };
        const Plain all[] = {
            {b_.gate, b_.inner, b_.size, &gate_},     {b_.up, b_.inner, b_.size, &up_},
            {b_.down, b_.size, b_.inner, &down_},     {b_.query, mixed_, b_.size, &query_},
            {b_.output, b_.size, mixed_, &output_},   {b_.key, shared_, b_.size, &key_},
            {b_.value, shared_, b_.size, &value_},
        };
        size_t count = 0;
        for (const auto& each : all)
            count += forward ? Product::packed_size(each.inputs, each.outputs)
                             : Product::packed_size(each.outputs, each.inputs);
        float* at = space_.weights(count);
        for (const auto& each : all) {
            *each.packed = forward ? Weight{each.inputs, each.outputs, at} : Weight{each.outputs, each.inputs, at};
            at += Product::packed_size(each.packed->inputs, each.packed->outputs);
        }
        pool_.wake();
        pool_.run(int(std::size(all)), [&](int i) {
            const Weight& to = *all[i].packed;
            Product{{}, false, {all[i].weight, all[i].inputs}, forward, {}, 0, to.inputs, to.outputs}.pack(to.packed);
        });
    }

    // y = x weight, or y += x weight, for so many rows.
    static void run(int count, const float* x, const Weight& weight, float* y, bool adds = false) {
        Product product{{x, weight.inputs}, false, {}, false, {y, weight.outputs}, count, weight.inputs, weight.outputs,
                        adds};
        product.whole = weight.packed;
        product.run(0, count, nullptr);
    }

    // The gradients of weights that share their inputs x: dy^T x over all rows.
    struct Grads {
        const float* x;
        int inputs;
        struct Of {
            const float* dy;
            int outputs;
            float* d_weight;
        };
        std::vector<Of> weights;
    };
    void weight_grads(const std::vector<Grads>& all) {
        struct Piece {
            Product product;
            int begin, end;
        };
        for (int64_t first = 0; first < rows_; first += kDeep) {
            const int depth = int(std::min<int64_t>(kDeep, rows_ - first));
            size_t count = 0;
            for (const auto& each : all) count += Product::packed_size(depth, each.inputs);
            float* at = space_.weights(count);
            std::vector<Product> inputs;
            std::vector<Piece> pieces;
            for (const auto& each : all) {
                const ConstRows x{each.x + first * each.inputs, each.inputs};
                inputs.push_back({{}, true, x, false, {}, 0, depth, each.inputs, first > 0});
                inputs.back().whole = at;
                for (const auto& [dy, outputs, d_weight] : each.weights) {
                    Product product = inputs.back();
                    product.a = {dy + first * outputs, outputs}, product.c = {d_weight, each.inputs};
                    product.rows = outputs;
                    for (int begin = 0; begin < outputs; begin += kPiece)
                        pieces.push_back({product, begin, std::min(outputs, begin + kPiece)});
                }
                at += Product::packed_size(depth, each.inputs);
            }
            pool_.run(int(inputs.size()), [&](int i) { inputs[i].pack(const_cast<float*>(inputs[i].whole)); });
            pool_.run(int(pieces.size()),
                      [&](int i) { pieces[i].product.run(pieces[i].begin, pieces[i].end, nullptr); });
        }
    }

    // to = stream + dropout(x weight), the end of a branch; `x` holds the chunk's rows alone.
    void add_branch(const Chunk& c, const float* x, const Weight& weight, const float* stream, uint64_t seed,
                    float* to) {
        if (b_.drop > 0) {
            run(c.count, x, weight, c.of(to, b_.size));
            drop(c, to, seed, to);
            add(c, stream, to);
        } else {
            std::memcpy(c.of(to, b_.size), c.of(stream, b_.size), size_t(c.count) * b_.size * 4);
            run(c.count, x, weight, c.of(to, b_.size), true);
        }
    }
    void drop(const Chunk& c, const float* from, uint64_t seed, float* to) const {
        if (b_.drop > 0) drop_some(from, to, c.begin * b_.size, (c.begin + c.count) * b_.size, seed, b_.drop);
    }
    void add(const Chunk& c, const float* from, float* to) const {
        for (int64_t i = c.begin * b_.size; i < (c.begin + c.count) * b_.size; ++i) to[i] += from[i];
    }

    // -- norms and attention -----------------------------------------------------------------------------------------

    // Memory for partial sums of a norm weight's gradient, kSummed rows each: their order is the same for any chunks.
    size_t sums(int width) const { return size_t((rows_ + kSummed - 1) / kSummed) * width; }
    static void add_up(const std::vector<float>& sums, int width, float* to) {
        if (to)
            for (size_t i = 0; i < sums.size(); ++i) to[i % width] += sums[i];
    }

    // All rows of a chunk, to which `n` points; backward adds the gradient of the weight to `sums`.
    static void each_norm(const Chunk& c, const inkling::Norms& n, float* sums = nullptr) {
        std::vector<float> between(n.width);
        for (int64_t row = 0; row < int64_t(c.count) * n.heads; ++row)
            rms_norm_rope(n, row, between.data(),
                          sums ? sums + (c.begin + row / n.heads) / kSummed * n.width : nullptr);
    }
    // `y` and `dy` hold the chunk's rows alone.
    void norm(const Chunk& c, const float* x, const float* weight, float* scales, float* y) const {
        each_norm(c, {c.count, 1, b_.size, b_.epsilon, c.of(x, b_.size), weight, nullptr, nullptr, y,
                      scales + c.begin});
    }
    void norm_back(const Chunk& c, const float* x, const float* weight, float* scales, const float* dy, float* dx,
                   float* sums) const {
        each_norm(c, {c.count, 1, b_.size, b_.epsilon, c.of(x, b_.size), weight, nullptr, nullptr, nullptr,
                      scales + c.begin, dy, c.of(dx, b_.size)}, sums);
    }
    inkling::Norms rotated(const Chunk& c, int heads, const float* raw, const float* weight, float* y,
                          float* scales) const {
        const int64_t width = int64_t(heads) * b_.width;
        return {c.count, heads, b_.width, b_.epsilon, c.of(raw, width), weight, c.of(b_.cosines, b_.width / 2),
                c.of(b_.sines, b_.width / 2), y ? c.of(y, width) : nullptr, c.of(scales, heads)};
    }
    void rotate_back(const Chunk& c, inkling::Norms of, const float* dy, float* dx, float* sums) const {
        const int64_t width = int64_t(of.heads) * of.width;
        of.dy = c.of(dy, width), of.dx = c.of(dx, width);
        each_norm(c, of, sums);
    }
    // `queries`: after their norm and rotation; without a norm they are rotated in place.
    Attention attention(const float* queries) const {
        Attention of{b_.batch, b_.time, b_.heads, b_.kv_heads, b_.width, queries, b_.keys, b_.values, attended_,
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
    float *between_, *raw_queries_, *raw_keys_, *attended_, *gates_, *ups_;
    Weight query_, key_, value_, output_, gate_, up_, down_;
};

}  // namespace INKLING_ISA
