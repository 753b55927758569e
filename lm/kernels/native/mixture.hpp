// Counts, alone or in a gated mixture with a network; as lm.models.ngram and lm.models.hybrid.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernel.hpp"
#include "linear.hpp"

namespace INKLING_ISA {

using namespace inkling;

// The last tokens of each slot, oldest first; -1 before the text's beginning.
class Histories {
public:
    Histories(const Counts* counts, int slots, int rows)
        : held_(counts ? counts->context_size() : 0),
          histories_(std::max<size_t>(1, size_t(slots) * held_)),
          found_(std::max<size_t>(1, size_t(rows) * held_)) {
        for (int slot = 0; slot < slots; ++slot) clear(slot);
    }

    // Appends a token to a slot's history, and keeps the history for row `row` of the logits.
    void append(int row, int slot, int id) {
        if (held_ == 0) return;
        int32_t* history = at(slot);
        std::memmove(history, history + 1, size_t(held_ - 1) * 4);
        history[held_ - 1] = id;
        std::memcpy(found_.data() + size_t(row) * held_, history, size_t(held_) * 4);
    }
    // The history that `append` kept for a row.
    const int32_t* row(int row) const { return found_.data() + size_t(row) * held_; }

    void clear(int slot) { std::fill_n(at(slot), held_, -1); }
    void copy(int from, int to) { std::memcpy(at(to), at(from), size_t(held_) * 4); }
    void show(std::map<std::string, View>& views, int slots) {
        if (held_ > 0) views["history"] = {histories_.data(), true, {size_t(slots), size_t(held_)}};
    }

private:
    int32_t* at(int slot) { return histories_.data() + size_t(slot) * held_; }

    int held_;
    Buffer<int32_t> histories_, found_;
};

class Mixture {
public:
    Mixture(const MixtureParts& parts, int hidden, int slots, int rows)
        : histories(parts.counts, slots, rows), counts_(parts.counts), hidden_(hidden), bias_(parts.bias) {
        if (!counts_) return;
        gate_ = Buffer<float>(padded(hidden));
        std::copy_n(parts.gate, hidden, gate_.data());
        entropy_gate_ = parts.gate[hidden];
        shares_ = Buffer<float>(padded(counts_->vocab_size()));
    }

    // Converts the network's logits of a row to log-probabilities of the mixture; `hidden` is the cell's output.
    void mix(int row, const float* hidden, float* logits) {
        if (!counts_) return;
        const int width = counts_->vocab_size();
        float* shares = shares_.data();
        counts_->distribution(histories.row(row), shares);
        const float entropy = -summed(width, [&](int i, int few) {
            const vec p = load_few(shares + i, few);
            return kept(p * log(p), few, 0.0f);
        });
        const float gate = bias_ + entropy * entropy_gate_ + summed(hidden_, [&](int i, int few) {
            return load_few(hidden + i, few) * load_few(gate_.data() + i, few);
        });
        vec tops = broadcast(-INFINITY);
        for (int i = 0; i < width; i += LANES) {
            const vec next = kept(load_few(logits + i, width - i), width - i, -INFINITY);
            tops = next > tops ? next : tops;
        }
        const float most = max_of(tops);
        const float sum = summed(width, [&](int i, int few) {
            const vec e = kept(exp(load_few(logits + i, few) - most), few, 0.0f);
            store_few(logits + i, e, few);
            return e;
        });
        const float of_counts = sigmoid(broadcast(gate))[0], of_network = sigmoid(broadcast(-gate))[0] / sum;
        for (int i = 0; i < width; i += LANES) {
            const int few = width - i;
            store_few(logits + i, log(load_few(logits + i, few) * of_network + load_few(shares + i, few) * of_counts),
                      few);
        }
    }

    Histories histories;

private:
    const Counts* counts_;
    int hidden_;
    float bias_, entropy_gate_ = 0;
    Buffer<float> gate_, shares_;
};

// Counts alone; the logits are log-probabilities.
class NGram final : public Kernel {
public:
    NGram(const Counts& counts, const Settings& settings)
        : counts_(counts), histories_(&counts, settings.slots, std::max(settings.slots, kRowsAtOnce)) {
        slots = settings.slots;
        rows = std::max(slots, kRowsAtOnce);
        vocab_size = counts.vocab_size();
        stride = padded(vocab_size);
        out_ = Buffer<float>(size_t(rows) * stride);
        logits = out_.data();
        histories_.show(views, slots);
    }

    void step(const int* which, const int* ids, int count) override {
        for (int row = 0; row < count; ++row) {
            histories_.append(row, which[row], ids[row]);
            predict(row);
        }
    }

    void read(int slot, const int* ids, int count, float* all) override {
        for (int i = 0; i < count; ++i) {
            histories_.append(0, slot, ids[i]);
            if (!all && i + 1 < count) continue;
            predict(0);
            if (all) std::memcpy(all + size_t(i) * vocab_size, logits, size_t(vocab_size) * 4);
        }
    }

    void clear(int slot) override { histories_.clear(slot); }
    void copy(int from, int to) override { histories_.copy(from, to); }

private:
    void predict(int row) {
        float* to = logits + size_t(row) * stride;
        counts_.distribution(histories_.row(row), to);
        for (int i = 0; i < stride; i += LANES) store(to + i, log(load(to + i)));
    }

    const Counts& counts_;
    Histories histories_;
    Buffer<float> out_;
};

}  // namespace INKLING_ISA
