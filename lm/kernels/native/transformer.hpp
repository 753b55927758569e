// A Llama-shaped Transformer with its key-value cache: rows are tokens, of one text or of several.
//
// The cache is fp32, with weights in bf16 it is bf16. Then a slot of 32 bits holds two numbers, the first one in its low
// half: of keys two neighbours along the head, of values two positions. Queries, scores and sums stay fp32.
#pragma once

#include "kernel.hpp"
#include "linear.hpp"
#include "tables.hpp"

namespace INKLING_ISA {

using namespace inkling;

// Of the queries of one tile over all positions, computed by this thread.
static thread_local std::vector<float> attention_weights;
// Of one row of a matrix, converted by this thread.
static thread_local std::vector<float> stored_row, stored_codes;

constexpr int kTileQueries = 6;  // that share one pass over keys and values
constexpr int kRowsAhead = 4;    // of values, prefetched

class Transformer final : public Kernel {
public:
    Transformer(const TransformerParts& parts, const Settings& settings)
        : context_(parts.cosines.rows),
          size_(parts.embedding.columns),
          width_(padded(size_)),
          heads_(parts.heads),
          groups_(parts.kv_heads),
          head_size_(2 * parts.cosines.columns),
          head_width_(padded(head_size_)),
          format_(settings.format),
          head_format_(settings.format == Format::int4 ? Format::int8_blocks : settings.format),
          tied_(parts.embedding.data == parts.head.data),
          in_slot_(settings.format == Format::bf16 ? 2 : 1),
          epsilon_(parts.epsilon),
          tables_(parts.tables, parts.embedding.rows, settings.slots, std::max(settings.slots, kRowsAtOnce)),
          pool_(settings.threads) {
        slots = settings.slots;
        rows = std::max(slots, kRowsAtOnce);
        vocab_size = parts.embedding.rows;
        auto copied = [](const float* from, size_t count) { return std::vector<float>(from, from + count); };
        cosines_ = copied(parts.cosines.data, size_t(context_) * head_size_ / 2);
        sines_ = copied(parts.sines.data, size_t(context_) * head_size_ / 2);
        norm_ = copied(parts.norm, size_);
        const auto plain = [](int) { return 0.0f; };
        // One matrix, or several concatenated by rows: `source(i)` is the matrix and the row of output i.
        const auto packed = [&](int outputs, int inputs, Format format, const auto& source, const auto& offset) {
            const auto row = [&](int i) -> const float* {
                const auto [matrix, index] = source(i);
                if (!matrix) return nullptr;
                return format == Format::int8 ? rounded_row_of(*matrix, index) : row_of(*matrix, index);
            };
            return Packed(outputs, inputs, format, row, offset, &arena_, &pool_);
        };
        const auto alone = [](const StoredMatrix& matrix) {
            return [&matrix](int i) { return std::pair(&matrix, i); };
        };
        int widest = 0;
        for (const auto& from : parts.blocks) {
            auto& block = blocks_.emplace_back();
            const int q = from.query.rows, kv = from.key.rows, inner = from.gate.rows;
            block.mix = packed(q + 2 * kv, size_, format_, [&](int i) {
                return i < q        ? std::pair(&from.query, i)
                       : i < q + kv ? std::pair(&from.key, i - q)
                                    : std::pair(&from.value, i - q - kv);
            }, [&](int i) { return from.bias ? from.bias[i] : 0.0f; });
            block.output = packed(size_, q, format_, alone(from.output), plain);
            // [16 of gate][16 of up], so that the same thread computes both.
            block.expand = packed(2 * padded(inner), size_, format_, [&](int i) {
                const int unit = i / (2 * kPanel) * kPanel + i % kPanel;
                return std::pair(unit >= inner ? nullptr : i / kPanel % 2 ? &from.up : &from.gate, unit);
            }, plain);
            block.down = packed(size_, inner, format_, alone(from.down), plain);
            block.input_norm = copied(from.input_norm, size_);
            block.mlp_norm = copied(from.mlp_norm, size_);
            if (from.query_norm) {
                block.query_norm = copied(from.query_norm, head_size_);
                block.key_norm = copied(from.key_norm, head_size_);
            }
            inner_ = padded(inner);
            widest = std::max({widest, block.mix.panels, block.expand.panels});
            weight_bytes += block.mix.nbytes() + block.output.nbytes() + block.expand.nbytes() + block.down.nbytes();
        }
        head_ = packed(vocab_size, size_, head_format_, alone(parts.head), plain);
        store_embedding(parts.embedding);
        weight_bytes += head_.nbytes() + tables_.nbytes();
        stride = head_.panels * kPanel;
        out_ = Buffer<float>(size_t(rows) * stride);
        logits = out_.data();
        residual_ = Buffer<float>(size_t(rows) * width_);
        normed_ = Buffer<float>(size_t(rows) * width_);
        mixed_ = Buffer<float>(size_t(rows) * padded(heads_ * head_size_));
        raw_width_ = widest * kPanel;
        raw_ = Buffer<float>(size_t(rows) * raw_width_);
        active_ = Buffer<float>(size_t(rows) * inner_);
        x_ = Rows(rows, std::max({width_, inner_, padded(heads_ * head_size_)}), format_);
        targets_.resize(rows);
        slot_.resize(rows);
        position_.resize(rows);

        panels_ = padded(context_) / kPanel;
        const size_t L = blocks_.size(), G = groups_;
        key_head_ = size_t(panels_) * kPanel * (head_size_ / in_slot_);
        value_head_ = size_t((context_ + in_slot_ - 1) / in_slot_) * head_width_;
        key_slot_ = L * G * key_head_;
        value_slot_ = L * G * value_head_;
        keys_ = Buffer<float>(slots * key_slot_);
        values_ = Buffer<float>(slots * value_slot_);
        keys_.in_small_pages(slots * key_slot_);
        values_.in_small_pages(slots * value_slot_);
        window_ = Buffer<int32_t>(size_t(slots) * context_);
        lengths_ = Buffer<int32_t>(slots);
        const size_t S = slots, W = head_width_;
        const bool low = in_slot_ == 2;
        views["keys"] = {keys_.data(), low, {S, L, G, size_t(panels_), size_t(head_size_ / in_slot_), size_t(kPanel)}};
        views["values"] = {values_.data(), low, {S, L, G, value_head_ / W, W}};
        views["window"] = {window_.data(), true, {S, size_t(context_)}};
        views["lengths"] = {lengths_.data(), true, {S}};
        tables_.show(views, slots);
    }

    void step(const int* which, const int* ids, int count) override {
        pool_.wake();
        for (int row = 0; row < count; ++row)
            if (lengths_[which[row]] == context_) slide(which[row]);
        for (int row = 0; row < count; ++row) append(row, which[row], ids[row]);
        run(count);
        head(0, count);
    }

    void read(int slot, const int* ids, int count, float* all) override {
        pool_.wake();
        for (int begin = 0; begin < count;) {
            if (lengths_[slot] == context_) slide(slot);
            const int many = std::min({kRowsAtOnce, count - begin, context_ - lengths_[slot]});
            for (int row = 0; row < many; ++row) append(row, slot, ids[begin + row]);
            run(many);
            if (all) {
                head(0, many);
                for (int row = 0; row < many; ++row)
                    std::memcpy(all + size_t(begin + row) * vocab_size, logits + size_t(row) * stride, vocab_size * 4);
            } else if (begin + many == count) {
                head(many - 1, 1);
            }
            begin += many;
        }
    }

    void clear(int slot) override {
        lengths_[slot] = 0;
        tables_.clear(slot);
    }

    void copy(int from, int to) override {
        const int length = lengths_[from];
        const size_t keys = key_head_ / panels_ * ((length + kPanel - 1) / kPanel),
                     values = size_t((length + in_slot_ - 1) / in_slot_) * head_width_;
        for (size_t i = 0; i < blocks_.size() * groups_; ++i) {
            std::memcpy(keys_.data() + to * key_slot_ + i * key_head_, keys_.data() + from * key_slot_ + i * key_head_,
                        keys * 4);
            std::memcpy(values_.data() + to * value_slot_ + i * value_head_,
                        values_.data() + from * value_slot_ + i * value_head_, values * 4);
        }
        std::memcpy(window_.data() + size_t(to) * context_, window_.data() + size_t(from) * context_, length * 4);
        lengths_[to] = length;
        tables_.copy(from, to);
    }

private:
    struct Weights {
        Packed mix, output, expand, down;
        std::vector<float> input_norm, mlp_norm, query_norm, key_norm;
    };

    void append(int row, int slot, int id) {
        slot_[row] = slot;
        position_[row] = lengths_[slot]++;
        tables_.append(row, slot, id);
        window_[size_t(slot) * context_ + position_[row]] = id;
        embed(id, residual_.data() + size_t(row) * width_);
    }

    // A row of a matrix as float32; valid until this thread's next call.
    static const float* row_of(const StoredMatrix& matrix, int index) {
        std::vector<float>& row = stored_row;
        const size_t begin = size_t(index) * matrix.columns;
        if (!matrix.half) return static_cast<const float*>(matrix.data) + begin;
        row.resize(matrix.columns);
        for (int i = 0; i < matrix.columns; ++i) row[i] = from_half(static_cast<const uint16_t*>(matrix.data)[begin + i]);
        return row.data();
    }
    // The same as whole numbers from -127 to 127, and their scale; as `int8_codes` in lm.kernels.decoding.
    static std::pair<float*, float> codes_of(const StoredMatrix& matrix, int index) {
        std::vector<float>& codes = stored_codes;
        const float* row = row_of(matrix, index);
        codes.resize(matrix.columns);
        float most = 0;
        for (int i = 0; i < matrix.columns; ++i) most = std::max(most, std::fabs(row[i]));
        const float inverse = most > 0 ? 127.0f / most : 0.0f;
        for (int i = 0; i < matrix.columns; ++i) codes[i] = std::nearbyint(row[i] * inverse);
        return {codes.data(), most / 127.0f};
    }
    static const float* rounded_row_of(const StoredMatrix& matrix, int index) {
        const auto [row, scale] = codes_of(matrix, index);
        for (int i = 0; i < matrix.columns; ++i) row[i] *= scale;
        return row;
    }

    // Tied embeddings are looked up in the packed output matrix.
    void store_embedding(const StoredMatrix& from) {
        const size_t count = size_t(vocab_size) * size_;
        if (head_format_ == Format::int8) {
            embedding_scales_ = Buffer<float>(vocab_size);
            if (!tied_) embedding_codes_ = Buffer<int8_t>(count);
            pool_.run(vocab_size, [&](int id) {
                const auto [codes, scale] = codes_of(from, id);
                embedding_scales_[id] = scale;
                if (!tied_) std::copy_n(codes, size_, embedding_codes_.data() + size_t(id) * size_);
            });
        } else if (!tied_ && head_format_ == Format::int8_blocks) {
            embedding_codes_ = Buffer<int8_t>(count);
            embedding_scales_ = Buffer<float>(size_t(vocab_size) * blocks());
            pool_.run(vocab_size, [&](int id) {
                const float* row = row_of(from, id);
                for (int block = 0, i = 0; i < size_; ++block, i += kBlock)
                    embedding_scales_[size_t(id) * blocks() + block] = from_half(bytes_of_block(
                        row + i, std::min(kBlock, size_ - i), embedding_codes_.data() + size_t(id) * size_ + i));
            });
        } else if (!tied_ && head_format_ == Format::bf16) {
            embedding_halves_ = Buffer<uint16_t>(count);
            pool_.run(vocab_size, [&](int id) {
                std::transform(row_of(from, id), row_of(from, id) + size_, embedding_halves_.data() + size_t(id) * size_,
                               to_bf16);
            });
        } else if (!tied_) {
            embedding_ = Buffer<float>(count);
            pool_.run(vocab_size,
                      [&](int id) { std::copy_n(row_of(from, id), size_, embedding_.data() + size_t(id) * size_); });
        }
    }

    int blocks() const { return (size_ + kBlock - 1) / kBlock; }

    void embed(int id, float* to) const {
        const size_t begin = size_t(id) * size_;
        if (head_format_ == Format::int8)
            for (int i = 0; i < size_; ++i)
                to[i] = (tied_ ? head_.weight(id, i) : float(embedding_codes_[begin + i])) * embedding_scales_[id];
        else if (tied_)
            for (int i = 0; i < size_; ++i) to[i] = head_.weight(id, i);
        else if (head_format_ == Format::int8_blocks)
            for (int i = 0; i < size_; ++i)
                to[i] = float(embedding_codes_[begin + i]) * embedding_scales_[size_t(id) * blocks() + i / kBlock];
        else if (head_format_ == Format::bf16)
            std::transform(embedding_halves_.data() + begin, embedding_halves_.data() + begin + size_, to, from_bf16);
        else
            std::memcpy(to, embedding_.data() + begin, size_t(size_) * 4);
    }

    // Drops the older half of the window and reads the newer half again, from position 0 on.
    void slide(int slot) {
        const int kept = context_ / 2;
        int32_t* window = window_.data() + size_t(slot) * context_;
        const std::vector<int> ids(window + context_ - kept, window + context_);
        clear(slot);
        for (int begin = 0; begin < kept; begin += kRowsAtOnce) {
            const int many = std::min(kRowsAtOnce, kept - begin);
            for (int row = 0; row < many; ++row) append(row, slot, ids[begin + row]);
            run(many);
        }
    }

    void run(int count) {
        for (size_t index = 0; index < blocks_.size(); ++index) {
            const Weights& block = blocks_[index];
            norm_rows(block.input_norm, block.mix, count);
            x_.count = count;
            for (int row = 0; row < count; ++row) targets_[row] = raw_.data() + size_t(row) * raw_width_;
            multiply(pool_, block.mix, x_, targets_.data());
            for_rows(count, [&](int row) { cache_keys_values(block, int(index), row); });
            // All rows' keys are in the cache now; a row attends to those up to its own position.
            attend_all(int(index), count);
            const int width = padded(heads_ * head_size_);
            set_inputs(block.output, mixed_.data(), width, count);
            add_to_residual(block.output, count);

            norm_rows(block.mlp_norm, block.expand, count);
            multiply(pool_, block.expand, x_, targets_.data(), 2, [&](int begin, int end) {
                for (int row = 0; row < count; ++row) {
                    const float* raw = targets_[row];
                    float* to = active_.data() + size_t(row) * inner_;
                    for (int panel = begin; panel < end; panel += 2)
                        for (int part = 0; part < kPanel; part += LANES) {
                            const vec gate = load(raw + panel * kPanel + part);
                            store(to + panel / 2 * kPanel + part,
                                  gate * sigmoid(gate) * load(raw + (panel + 1) * kPanel + part));
                        }
                }
            });
            set_inputs(block.down, active_.data(), inner_, count);
            add_to_residual(block.down, count);
        }
    }

    void head(int first, int count) {
        norm_rows(norm_, head_, count, first);
        for (int row = 0; row < count; ++row) targets_[row] = logits + size_t(row) * stride;
        multiply(pool_, head_, x_, targets_.data());
        for (int row = 0; row < count; ++row) tables_.add(first + row, targets_[row]);
    }

    template <class Work>
    void for_rows(int count, const Work& work) {
        if (count < 8) {
            for (int row = 0; row < count; ++row) work(row);
            return;
        }
        const int parts = std::min(count, pool_.threads() * 2);
        pool_.run(parts, [&](int part) {
            for (int row = count * part / parts; row < count * (part + 1) / parts; ++row) work(row);
        });
    }

    // Sets the inputs of the next product.
    void set_inputs(const Packed& w, const float* from, int stride, int count) {
        x_.count = count;
        for (int row = 0; row < count; ++row) x_.set(row, from + size_t(row) * stride);
        if (format_ != Format::fp32) for_rows(count, [&](int row) { x_.quantize(row, w); });
    }

    void add_to_residual(const Packed& w, int count) {
        for (int row = 0; row < count; ++row) targets_[row] = raw_.data() + size_t(row) * raw_width_;
        multiply(pool_, w, x_, targets_.data(), 1, [&](int begin, int end) {
            for (int row = 0; row < count; ++row) {
                float* to = residual_.data() + size_t(row) * width_;
                for (int i = begin * kPanel; i < end * kPanel; i += LANES)
                    store(to + i, load(to + i) + load(targets_[row] + i));
            }
        });
    }

    void norm_rows(const std::vector<float>& gain, const Packed& w, int count, int first = 0) {
        x_.count = count;
        for_rows(count, [&](int row) {
            float* to = normed_.data() + size_t(row) * width_;
            norm(residual_.data() + size_t(first + row) * width_, to, gain.data(), size_);
            x_.set(row, to);
            x_.quantize(row, w);
        });
    }

    // to = from / sqrt(mean of squares + epsilon) * gain; the two may be the same.
    void norm(const float* from, float* to, const float* gain, int size) const {
        alignas(64) float lanes[kPanel] = {};
        int i = 0;
        vec sums[kParts] = {};
        for (; i + kPanel <= size; i += kPanel)
            for (int part = 0; part < kParts; ++part) {
                const vec x = load(from + i + part * LANES);
                sums[part] += x * x;
            }
        for (int part = 0; part < kParts; ++part) store(lanes + part * LANES, sums[part]);
        for (; i < size; ++i) lanes[i % kPanel] += from[i] * from[i];
        const float scale = 1.0f / std::sqrt(add_lanes(lanes) / float(size) + epsilon_);
        for (i = 0; i < size; ++i) to[i] = from[i] * scale * gain[i];
    }

    // Norm and rotation of a row's queries and keys; keys and values go to the cache.
    void cache_keys_values(const Weights& block, int index, int row) {
        float* raw = targets_[row];
        const int position = position_[row];
        const float *cos = cosines_.data() + size_t(position) * head_size_ / 2,
                    *sin = sines_.data() + size_t(position) * head_size_ / 2;
        auto rotate = [&](float* head, const std::vector<float>& gain) {
            if (!gain.empty()) norm(head, head, gain.data(), head_size_);
            for (int i = 0; i < head_size_ / 2; ++i) {
                const float first = head[i], second = head[i + head_size_ / 2];
                head[i] = first * cos[i] - second * sin[i];
                head[i + head_size_ / 2] = second * cos[i] + first * sin[i];
            }
        };
        for (int head = 0; head < heads_; ++head) rotate(raw + head * head_size_, block.query_norm);
        for (int group = 0; group < groups_; ++group) {
            float* key = raw + (heads_ + group) * head_size_;
            rotate(key, block.key_norm);
            const float* value = raw + (heads_ + groups_ + group) * head_size_;
            float* keys = keys_at(slot_[row], index, group) + key_head_ / panels_ * (position / kPanel) + position % kPanel;
            float* values = values_at(slot_[row], index, group) + size_t(position / in_slot_) * head_width_;
            if (in_slot_ == 2) {
                cache_rounded(key, keys, [](int i) { return i / 2 * 2 * kPanel + i % 2; });
                cache_rounded(value, values, [&](int i) { return 2 * i + position % 2; });
                continue;
            }
            for (int i = 0; i < head_size_; ++i) keys[i * kPanel] = key[i];
            std::memcpy(values, value, head_size_ * 4);
        }
    }

    // Number i of a head goes to half at(i) of the slots.
    template <class At>
    void cache_rounded(const float* from, float* slots, const At& at) const {
        uint16_t* to = reinterpret_cast<uint16_t*>(slots);
        for (int i = 0; i < head_size_; i += LANES) {
            const uvec bits = rounded(load_few(from + i, head_size_ - i));
            for (int lane = 0; lane < std::min(LANES, head_size_ - i); ++lane) to[at(i + lane)] = uint16_t(bits[lane] >> 16);
        }
    }

    float* keys_at(int slot, int layer, int group) const {
        return keys_.data() + slot * key_slot_ + (size_t(layer) * groups_ + group) * key_head_;
    }
    float* values_at(int slot, int layer, int group) const {
        return values_.data() + slot * value_slot_ + (size_t(layer) * groups_ + group) * value_head_;
    }

    // Queries that read the same keys and values are computed together: heads of a group, and rows of one text.
    struct Tile {
        int row, rows, head, heads;
    };

    void attend_all(int layer, int count) {
        const int shared = heads_ / groups_;
        tiles_.clear();
        for (int row = 0, many; row < count; row += many) {
            many = 1;
            while (row + many < count && slot_[row + many] == slot_[row] && (many + 1) * shared <= kTileQueries) ++many;
            // A single row is divided by heads among all threads.
            const int heads = count == 1 && pool_.threads() > 1 ? 1 : std::min(shared, kTileQueries);
            for (int group = 0; group < groups_; ++group)
                for (int head = 0; head < shared; head += heads)
                    tiles_.push_back({row, many, group * shared + head, std::min(heads, shared - head)});
        }
        const int all = int(tiles_.size()), parts = all < 2 ? 1 : std::min(all, pool_.threads() * 4);
        pool_.run(parts, [&](int part) {
            for (int i = all * part / parts; i < all * (part + 1) / parts; ++i) attend(layer, tiles_[i]);
        });
    }

    void attend(int layer, const Tile& tile) const {
        in_slot_ == 2 ? attend_in<2>(layer, tile) : attend_in<1>(layer, tile);
    }

    // With N numbers in a slot of the cache.
    template <int N>
    void attend_in(int layer, const Tile& tile) const {
        switch (tile.rows * tile.heads) {
            case 1: attend<N, 1>(layer, tile); break;
            case 2: attend<N, 2>(layer, tile); break;
            case 3: attend<N, 3>(layer, tile); break;
            case 4: attend<N, 4>(layer, tile); break;
            case 5: attend<N, 5>(layer, tile); break;
            case 6: attend<N, 6>(layer, tile); break;
        }
    }

    template <int N, int Q>
    void attend(int layer, const Tile& tile) const {
        const float* queries[Q];
        float* to[Q];
        float* weights[Q];
        int counts[Q], count = 0;
        const int width = padded(heads_ * head_size_);
        for (int q = 0; q < Q; ++q) {
            const int row = tile.row + q / tile.heads, head = tile.head + q % tile.heads;
            queries[q] = raw_.data() + size_t(row) * raw_width_ + size_t(head) * head_size_;
            to[q] = mixed_.data() + size_t(row) * width + size_t(head) * head_size_;
            counts[q] = position_[row] + 1;
            count = std::max(count, counts[q]);
        }
        const int slot = slot_[tile.row], group = tile.head / (heads_ / groups_);
        const float *keys = keys_at(slot, layer, group), *values = values_at(slot, layer, group);
        const int panels = (count + kPanel - 1) / kPanel;
        const size_t held = size_t(panels) * kPanel;
        if (attention_weights.size() < held * kTileQueries) attention_weights.resize(held * kTileQueries);
        for (int q = 0; q < Q; ++q) weights[q] = attention_weights.data() + q * held;

        const float scale = 1.0f / std::sqrt(float(head_size_));
        constexpr int kWideScore = Q == 1 ? 4 : LANES == 16 ? (Q <= 3 ? 4 : 2) : 1;
        int panel = 0;
        for (; panel + kWideScore <= panels; panel += kWideScore)
            score<N, kWideScore, Q>(queries, keys, panel, scale, weights);
        if constexpr (kWideScore == 4)
            for (; panel + 2 <= panels; panel += 2) score<N, 2, Q>(queries, keys, panel, scale, weights);
        for (; panel < panels; ++panel) score<N, 1, Q>(queries, keys, panel, scale, weights);
        float inverse[Q];
        for (int q = 0; q < Q; ++q) inverse[q] = softmax(weights[q], counts[q], count);
        constexpr int kWideSum = Q == 1 ? 4 : LANES == 16 ? 2 : 1;
        int at = 0;
        for (; at + kWideSum * LANES <= head_width_; at += kWideSum * LANES)
            weighted_sum<N, kWideSum, Q>(values, weights, count, inverse, at, to);
        for (; at < head_width_; at += LANES) weighted_sum<N, 1, Q>(values, weights, count, inverse, at, to);
    }

    // The panels after these are prefetched.
    template <int N, int P, int Q>
    void score(const float* const* queries, const float* keys, int panel, float scale, float* const* weights) const {
        vec sums[P * kParts][Q] = {};
        const size_t next = size_t(head_size_ / N) * kPanel;
        const float* from = keys + panel * next;
        for (int i = 0; i < head_size_; i += N) {
            vec slots[P * kParts];
#pragma GCC unroll 16
            for (int p = 0; p < P * kParts; ++p)
                slots[p] = load(from + (p / kParts) * next + i / N * kPanel + (p % kParts) * LANES);
#pragma GCC unroll 16
            for (int p = 0; p < P; ++p) __builtin_prefetch(from + (P + p) * next + i / N * kPanel, 0, 2);
#pragma GCC unroll 2
            for (int which = 0; which < N; ++which) {
                vec key[P * kParts];
#pragma GCC unroll 16
                for (int p = 0; p < P * kParts; ++p) key[p] = N == 1 ? slots[p] : half_of(slots[p], which);
#pragma GCC unroll 6
                for (int q = 0; q < Q; ++q) {
                    const vec query = broadcast(queries[q][i + which]);
#pragma GCC unroll 16
                    for (int p = 0; p < P * kParts; ++p) sums[p][q] += key[p] * query;
                }
            }
        }
#pragma GCC unroll 6
        for (int q = 0; q < Q; ++q)
#pragma GCC unroll 16
            for (int p = 0; p < P * kParts; ++p) store(weights[q] + panel * kPanel + p * LANES, sums[p][q] * scale);
    }

    // exp(score - largest) of the first `count` scores, and zeros up to `all`; 1 / their sum.
    static float softmax(float* weights, int count, int all) {
        const int end = padded(count);
        for (int t = count; t < end; ++t) weights[t] = -1e30f;
        vec tops = load(weights);
        for (int t = LANES; t < end; t += LANES) {
            const vec next = load(weights + t);
            tops = next > tops ? next : tops;
        }
        const float most = max_of(tops);
        vec sums[kParts] = {};
        for (int t = 0; t < end; t += kPanel)
            for (int part = 0; part < kParts; ++part) {
                const vec weight = exp(load(weights + t + part * LANES) - most);
                store(weights + t + part * LANES, weight);
                sums[part] += weight;
            }
        for (int t = count; t < all; ++t) weights[t] = 0;
        alignas(64) float lanes[kPanel];
        for (int part = 0; part < kParts; ++part) store(lanes + part * LANES, sums[part]);
        return 1.0f / add_lanes(lanes);
    }

    // The weighted sum of the values; even and odd positions have sums of their own.
    template <int N, int P, int Q>
    void weighted_sum(const float* values, const float* const* weights, int count, const float* inverse, int at,
               float* const* to) const {
        vec even[P][Q] = {}, odd[P][Q] = {};
        const auto add = [&](int t, int which, vec(&sums)[P][Q]) {
            vec value[P];
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) {
                value[p] = load(values + size_t(t / N) * head_width_ + at + p * LANES);
                if constexpr (N == 2) value[p] = half_of(value[p], which);
                if (N == 1 || which == 0)
                    __builtin_prefetch(values + size_t(t / N + kRowsAhead) * head_width_ + at + p * LANES, 0, 2);
            }
#pragma GCC unroll 6
            for (int q = 0; q < Q; ++q) {
                const vec weight = broadcast(weights[q][t]);
#pragma GCC unroll 8
                for (int p = 0; p < P; ++p) sums[p][q] += value[p] * weight;
            }
        };
        int t = 0;
        for (; t + 2 <= count; t += 2) {
            add(t, 0, even);
            add(t + 1, 1, odd);
        }
        if (t < count) add(t, 0, even);
        alignas(64) float sums[P * LANES];
        for (int q = 0; q < Q; ++q) {
            for (int p = 0; p < P; ++p) store(sums + p * LANES, (even[p][q] + odd[p][q]) * inverse[q]);
            // A head's last lanes may lie beyond its own width.
            std::memcpy(to[q] + at, sums, std::min(P * LANES, std::max(0, head_size_ - at)) * 4);
        }
    }

    const int context_, size_, width_, heads_, groups_, head_size_, head_width_;
    const Format format_, head_format_;
    const bool tied_;
    const int in_slot_;  // numbers in a slot of the cache
    const float epsilon_;
    int inner_ = 0, raw_width_ = 0, panels_ = 0;
    size_t key_head_ = 0, value_head_ = 0, key_slot_ = 0, value_slot_ = 0;  // of the cache, in slots of 32 bits
    Arena arena_;
    std::vector<float> cosines_, sines_, norm_;
    Buffer<float> embedding_, embedding_scales_;
    Buffer<int8_t> embedding_codes_;
    Buffer<uint16_t> embedding_halves_;
    std::vector<Weights> blocks_;
    Packed head_;
    Buffer<float> out_, residual_, normed_, mixed_, raw_, active_, keys_, values_;
    Buffer<int32_t> window_, lengths_;
    Rows x_;
    Tables tables_;
    std::vector<float*> targets_;
    std::vector<int> slot_, position_;
    std::vector<Tile> tiles_;
    Pool pool_;
};

}  // namespace INKLING_ISA
