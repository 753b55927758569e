// The gated mixture of a network and counts; as lm.models.hybrid.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernel.hpp"
#include "linear.hpp"

namespace INKLING_ISA {

using namespace inkling;

class Mixture {
public:
    Mixture(const MixtureParts& parts, int hidden, int slots, int rows)
        : counts_(parts.counts), hidden_(hidden), bias_(parts.bias) {
        if (!counts_) return;
        held_ = counts_->context_size();
        gate_ = Buffer<float>(padded(hidden));
        std::copy_n(parts.gate, hidden, gate_.data());
        entropy_gate_ = parts.gate[hidden];
        histories_ = Buffer<int32_t>(std::max<size_t>(1, size_t(slots) * held_));
        found_ = Buffer<int32_t>(std::max<size_t>(1, size_t(rows) * held_));
        shares_ = Buffer<float>(padded(counts_->vocab_size()));
        for (int slot = 0; slot < slots; ++slot) clear(slot);
    }

    // Adds one more token to a slot's history, and keeps it for row `row` of the logits.
    void place(int row, int slot, int id) {
        if (!counts_ || held_ == 0) return;
        int32_t* history = at(slot);
        std::memmove(history, history + 1, size_t(held_ - 1) * 4);
        history[held_ - 1] = id;
        std::memcpy(found_.data() + size_t(row) * held_, history, size_t(held_) * 4);
    }

    // Turns the network's logits of a row into log-probabilities of the mixture; `hidden` is the cell's output.
    void mix(int row, const float* hidden, float* logits) {
        if (!counts_) return;
        const int width = counts_->vocab_size();
        float* shares = shares_.data();
        counts_->distribution(found_.data() + size_t(row) * held_, shares);
        const float entropy = -summed(width, [&](int i, int few) {
            const vec p = load_few(shares + i, few);
            return kept(p * log(p), few, 0.0f);
        });
        const float open = bias_ + entropy * entropy_gate_ + summed(hidden_, [&](int i, int few) {
            return load_few(hidden + i, few) * load_few(gate_.data() + i, few);
        });
        vec tops = spread(-INFINITY);
        for (int i = 0; i < width; i += LANES) {
            const vec next = kept(load_few(logits + i, width - i), width - i, -INFINITY);
            tops = next > tops ? next : tops;
        }
        const float most = most_of(tops);
        const float sum = summed(width, [&](int i, int few) {
            const vec e = kept(exp(load_few(logits + i, few) - most), few, 0.0f);
            store_few(logits + i, e, few);
            return e;
        });
        const float of_counts = sigmoid(spread(open))[0], of_network = sigmoid(spread(-open))[0] / sum;
        for (int i = 0; i < width; i += LANES) {
            const int few = width - i;
            store_few(logits + i, log(load_few(logits + i, few) * of_network + load_few(shares + i, few) * of_counts),
                      few);
        }
    }

    void clear(int slot) {
        if (counts_) std::fill_n(at(slot), held_, -1);
    }
    void copy(int from, int to) {
        if (counts_) std::memcpy(at(to), at(from), size_t(held_) * 4);
    }

    // The last tokens of each slot.
    void show(std::map<std::string, View>& views, int slots) {
        if (held_ > 0) views["history"] = {histories_.data(), true, {size_t(slots), size_t(held_)}};
    }

private:
    int32_t* at(int slot) { return histories_.data() + size_t(slot) * held_; }  // oldest first, -1 before the text

    const Counts* counts_;
    int hidden_, held_ = 0;
    float bias_, entropy_gate_ = 0;
    Buffer<float> gate_, shares_;
    Buffer<int32_t> histories_, found_;
};

}  // namespace INKLING_ISA
