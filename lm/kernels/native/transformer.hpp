// A Llama-shaped Transformer with its key-value cache: rows are tokens, of one text or of several.
#pragma once

#include "kernel.hpp"
#include "linear.hpp"
#include "tables.hpp"

namespace INKLING_ISA {

using namespace inkling;

// Of one head over all positions, computed by this thread.
static thread_local std::vector<float> attention_shares;

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
          int8_(settings.int8),
          epsilon_(parts.epsilon),
          tables_(parts.tables, parts.embedding.rows, settings.slots, std::max(settings.slots, kRowsAtOnce)),
          pool_(settings.threads) {
        slots = settings.slots;
        rows = std::max(slots, kRowsAtOnce);
        vocab_size = parts.embedding.rows;
        auto copied = [](const float* from, size_t count) { return std::vector<float>(from, from + count); };
        embedding_ = copied(parts.embedding.data, size_t(vocab_size) * size_);
        cosines_ = copied(parts.cosines.data, size_t(context_) * head_size_ / 2);
        sines_ = copied(parts.sines.data, size_t(context_) * head_size_ / 2);
        norm_ = copied(parts.norm, size_);
        const auto plain = [](int) { return 0.0f; };
        int widest = 0;
        for (const auto& from : parts.blocks) {
            auto& block = blocks_.emplace_back();
            const int q = from.query.rows, kv = from.key.rows, inner = from.gate.rows;
            block.mix = Packed(q + 2 * kv, size_, int8_, [&](int i) {
                return i < q ? from.query.row(i) : i < q + kv ? from.key.row(i - q) : from.value.row(i - q - kv);
            }, plain);
            block.output = Packed(size_, q, int8_, [&](int i) { return from.output.row(i); }, plain);
            // [16 of gate][16 of up], so that who computes the one has the other.
            block.expand = Packed(2 * padded(inner), size_, int8_, [&](int i) -> const float* {
                const int unit = i / (2 * kPanel) * kPanel + i % kPanel;
                if (unit >= inner) return nullptr;
                return i / kPanel % 2 ? from.up.row(unit) : from.gate.row(unit);
            }, plain);
            block.down = Packed(size_, inner, int8_, [&](int i) { return from.down.row(i); }, plain);
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
        head_ = Packed(vocab_size, size_, int8_, [&](int i) { return parts.head.row(i); }, plain);
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
        x_ = Rows(rows, std::max({width_, inner_, padded(heads_ * head_size_)}), int8_);
        targets_.resize(rows);
        slot_.resize(rows);
        position_.resize(rows);

        panels_ = padded(context_) / kPanel;
        const size_t L = blocks_.size(), G = groups_;
        key_slot_ = L * G * panels_ * kPanel * head_size_;
        value_slot_ = L * G * context_ * head_width_;
        keys_ = Buffer<float>(slots * key_slot_);
        values_ = Buffer<float>(slots * value_slot_);
        window_ = Buffer<int32_t>(size_t(slots) * context_);
        lengths_ = Buffer<int32_t>(slots);
        const size_t S = slots, D = head_size_;
        views["keys"] = {keys_.data(), false, {S, L, G, size_t(panels_), D, size_t(kPanel)}};
        views["values"] = {values_.data(), false, {S, L, G, size_t(context_), size_t(head_width_)}};
        views["window"] = {window_.data(), true, {S, size_t(context_)}};
        views["lengths"] = {lengths_.data(), true, {S}};
        tables_.show(views, slots);
    }

    void step(const int* which, const int* ids, int count) override {
        pool_.wake();
        for (int row = 0; row < count; ++row)
            if (lengths_[which[row]] == context_) slide(which[row]);
        for (int row = 0; row < count; ++row) place(row, which[row], ids[row]);
        run(count);
        head(0, count);
    }

    void read(int slot, const int* ids, int count, float* all) override {
        pool_.wake();
        for (int begin = 0; begin < count;) {
            if (lengths_[slot] == context_) slide(slot);
            const int many = std::min({kRowsAtOnce, count - begin, context_ - lengths_[slot]});
            for (int row = 0; row < many; ++row) place(row, slot, ids[begin + row]);
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
        const int length = lengths_[from], used = (length + kPanel - 1) / kPanel;
        for (size_t i = 0; i < blocks_.size() * groups_; ++i) {
            const size_t keys = i * panels_ * kPanel * head_size_, values = i * context_ * head_width_;
            std::memcpy(keys_.data() + to * key_slot_ + keys, keys_.data() + from * key_slot_ + keys,
                        size_t(used) * kPanel * head_size_ * 4);
            std::memcpy(values_.data() + to * value_slot_ + values, values_.data() + from * value_slot_ + values,
                        size_t(length) * head_width_ * 4);
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

    void place(int row, int slot, int id) {
        slot_[row] = slot;
        position_[row] = lengths_[slot]++;
        tables_.place(row, slot, id);
        window_[size_t(slot) * context_ + position_[row]] = id;
        std::memcpy(residual_.data() + size_t(row) * width_, embedding_.data() + size_t(id) * size_, size_ * 4);
    }

    // The older half is forgotten, the newer half read again from position 0 on.
    void slide(int slot) {
        const int kept = context_ / 2;
        int32_t* window = window_.data() + size_t(slot) * context_;
        const std::vector<int> ids(window + context_ - kept, window + context_);
        clear(slot);
        for (int begin = 0; begin < kept; begin += kRowsAtOnce) {
            const int many = std::min(kRowsAtOnce, kept - begin);
            for (int row = 0; row < many; ++row) place(row, slot, ids[begin + row]);
            run(many);
        }
    }

    void run(int count) {
        for (size_t index = 0; index < blocks_.size(); ++index) {
            const Weights& block = blocks_[index];
            norm_rows(block.input_norm, count);
            x_.count = count;
            for (int row = 0; row < count; ++row) targets_[row] = raw_.data() + size_t(row) * raw_width_;
            multiply(pool_, block.mix, x_, targets_.data());
            for_rows(count, [&](int row) { keep(block, int(index), row); });
            const int width = padded(heads_ * head_size_);
            // All rows' keys are in the cache now; a row looks at those up to its own position.
            pool_.run(count * heads_ < 2 ? 1 : std::min(count * heads_, pool_.threads() * 4), [&](int part) {
                const int parts = count * heads_ < 2 ? 1 : std::min(count * heads_, pool_.threads() * 4);
                const int begin = count * heads_ * part / parts, end = count * heads_ * (part + 1) / parts;
                for (int i = begin; i < end; ++i)
                    attend(int(index), i / heads_, i % heads_,
                           mixed_.data() + size_t(i / heads_) * width + size_t(i % heads_) * head_size_);
            });
            give(mixed_.data(), width, heads_ * head_size_, count);
            add_to_residual(block.output, count);

            norm_rows(block.mlp_norm, count);
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
            give(active_.data(), inner_, block.down.inputs, count);
            add_to_residual(block.down, count);
        }
    }

    void head(int first, int count) {
        norm_rows(norm_, count, first);
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

    // Hands rows to the next product.
    void give(const float* from, int stride, int inputs, int count) {
        x_.count = count;
        for (int row = 0; row < count; ++row) x_.set(row, from + size_t(row) * stride);
        if (int8_) for_rows(count, [&](int row) { x_.quantize(row, inputs); });
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

    void norm_rows(const std::vector<float>& gain, int count, int first = 0) {
        x_.count = count;
        for_rows(count, [&](int row) {
            float* to = normed_.data() + size_t(row) * width_;
            norm(residual_.data() + size_t(first + row) * width_, to, gain.data(), size_);
            x_.set(row, to);
            if (int8_) x_.quantize(row, size_);
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
    void keep(const Weights& block, int index, int row) {
        float* raw = targets_[row];
        const int position = position_[row];
        const float *cos = cosines_.data() + size_t(position) * head_size_ / 2,
                    *sin = sines_.data() + size_t(position) * head_size_ / 2;
        auto turn = [&](float* head, const std::vector<float>& gain) {
            if (!gain.empty()) norm(head, head, gain.data(), head_size_);
            for (int i = 0; i < head_size_ / 2; ++i) {
                const float first = head[i], second = head[i + head_size_ / 2];
                head[i] = first * cos[i] - second * sin[i];
                head[i + head_size_ / 2] = second * cos[i] + first * sin[i];
            }
        };
        for (int head = 0; head < heads_; ++head) turn(raw + head * head_size_, block.query_norm);
        for (int group = 0; group < groups_; ++group) {
            float* key = raw + (heads_ + group) * head_size_;
            turn(key, block.key_norm);
            float* keys = keys_at(slot_[row], index, group) + size_t(position / kPanel) * head_size_ * kPanel;
            for (int i = 0; i < head_size_; ++i) keys[i * kPanel + position % kPanel] = key[i];
            std::memcpy(values_at(slot_[row], index, group) + size_t(position) * head_width_,
                        raw + (heads_ + groups_ + group) * head_size_, head_size_ * 4);
        }
    }

    float* keys_at(int slot, int layer, int group) const {
        return keys_.data() + slot * key_slot_ + (size_t(layer) * groups_ + group) * panels_ * kPanel * head_size_;
    }
    float* values_at(int slot, int layer, int group) const {
        return values_.data() + slot * value_slot_ + (size_t(layer) * groups_ + group) * context_ * head_width_;
    }

    void attend(int layer, int row, int head, float* to) const {
        const float* query = raw_.data() + size_t(row) * raw_width_ + size_t(head) * head_size_;
        const int group = head / (heads_ / groups_), count = position_[row] + 1;
        const float *keys = keys_at(slot_[row], layer, group), *values = values_at(slot_[row], layer, group);
        const int panels = (count + kPanel - 1) / kPanel;
        const float scale = 1.0f / std::sqrt(float(head_size_));
        if (attention_shares.size() < size_t(panels_) * kPanel) attention_shares.resize(size_t(panels_) * kPanel);
        float* const shares = attention_shares.data();

        int panel = 0;
        for (; panel + 4 <= panels; panel += 4) score<4>(query, keys, panel, scale, shares);
        for (; panel < panels; ++panel) score<1>(query, keys, panel, scale, shares);
        float most = shares[0];
        for (int t = 1; t < count; ++t) most = std::max(most, shares[t]);
        for (int t = count; t < panels * kPanel; ++t) shares[t] = -1e30f;
        vec sums[kParts] = {};
        for (int t = 0; t < panels * kPanel; t += kPanel)
            for (int part = 0; part < kParts; ++part) {
                const vec share = exp(load(shares + t + part * LANES) - most);
                store(shares + t + part * LANES, share);
                sums[part] += share;
            }
        alignas(64) float lanes[kPanel];
        for (int part = 0; part < kParts; ++part) store(lanes + part * LANES, sums[part]);
        const float inverse = 1.0f / add_lanes(lanes);
        int at = 0;
        for (; at + 4 * LANES <= head_width_; at += 4 * LANES) blend<4>(values, shares, count, inverse, at, to);
        for (; at < head_width_; at += LANES) blend<1>(values, shares, count, inverse, at, to);
    }

    template <int P>
    void score(const float* query, const float* keys, int panel, float scale, float* shares) const {
        vec sums[P * kParts] = {};
        const float* from = keys + size_t(panel) * head_size_ * kPanel;
        const size_t next = size_t(head_size_) * kPanel;
        for (int i = 0; i < head_size_; ++i)
#pragma GCC unroll 16
            for (int p = 0; p < P * kParts; ++p)
                sums[p] += load(from + (p / kParts) * next + i * kPanel + (p % kParts) * LANES) * spread(query[i]);
#pragma GCC unroll 16
        for (int p = 0; p < P * kParts; ++p) store(shares + panel * kPanel + p * LANES, sums[p] * scale);
    }

    // Values weighted by their shares, even and odd positions apart.
    template <int P>
    void blend(const float* values, const float* shares, int count, float inverse, int at, float* to) const {
        vec even[P] = {}, odd[P] = {};
        int t = 0;
        for (; t + 2 <= count; t += 2)
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) {
                even[p] += load(values + size_t(t) * head_width_ + at + p * LANES) * spread(shares[t]);
                odd[p] += load(values + size_t(t + 1) * head_width_ + at + p * LANES) * spread(shares[t + 1]);
            }
        if (t < count)
            for (int p = 0; p < P; ++p)
                even[p] += load(values + size_t(t) * head_width_ + at + p * LANES) * spread(shares[t]);
        alignas(64) float sums[P * LANES];
        for (int p = 0; p < P; ++p) store(sums + p * LANES, (even[p] + odd[p]) * inverse);
        // A head's last lanes may lie beyond its own width.
        std::memcpy(to + at, sums, std::min(P * LANES, std::max(0, head_size_ - at)) * 4);
    }

    const int context_, size_, width_, heads_, groups_, head_size_, head_width_;
    const bool int8_;
    const float epsilon_;
    int inner_ = 0, raw_width_ = 0, panels_ = 0;
    size_t key_slot_ = 0, value_slot_ = 0;
    std::vector<float> embedding_, cosines_, sines_, norm_;
    std::vector<Weights> blocks_;
    Packed head_;
    Buffer<float> out_, residual_, normed_, mixed_, raw_, active_, keys_, values_;
    Buffer<int32_t> window_, lengths_;
    Rows x_;
    Tables tables_;
    std::vector<float*> targets_;
    std::vector<int> slot_, position_;
    Pool pool_;
};

}  // namespace INKLING_ISA
