// Context tables: rows of logits, found by a slot's last tokens and added to the model's own; as lm.models.context_tables.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernel.hpp"
#include "linear.hpp"

namespace INKLING_ISA {

using namespace inkling;

constexpr uint32_t kFactor = 1540483477u;

class Tables {
public:
    Tables(const std::vector<Table>& parts, int vocab_size, int slots, int rows) : vocab_size_(vocab_size) {
        for (const auto& from : parts) {
            auto& table = tables_.emplace_back();
            table.order = from.order;
            table.buckets = uint32_t(from.weight.rows - 1);
            table.hashed = from.hashed;
            table.weight.assign(from.weight.data, from.weight.data + size_t(from.weight.rows) * vocab_size);
            table.found.resize(rows);
            held_ = std::max(held_, from.order - 2);
        }
        recent_ = Buffer<int32_t>(std::max<size_t>(1, size_t(slots) * held_));
        for (int slot = 0; slot < slots; ++slot) clear(slot);
    }

    // Appends a token to a slot, and finds the rows of its context for row `row` of the logits.
    void append(int row, int slot, int id) {
        if (tables_.empty()) return;
        int32_t* recent = recent_.data() + size_t(slot) * held_;  // oldest first, -1 before the text's beginning
        uint32_t hash = 0;
        uint64_t digits = 0, place_value = 1;
        size_t next = 0;
        for (int back = 0; back <= held_; ++back) {
            const int token = back == 0 ? id : recent[held_ - back];
            const bool complete = token >= 0;
            hash = hash * kFactor + uint32_t(token) + 1u;
            digits += complete ? uint64_t(token) * place_value : 0;
            // Past the exact tables the digits are not used; their place value must not overflow.
            place_value = place_value > UINT32_MAX ? place_value : place_value * uint64_t(vocab_size_);
            if (next < tables_.size() && tables_[next].order == back + 2) {
                Found& table = tables_[next++];
                table.found[row] = !complete      ? table.buckets
                                   : table.hashed ? bucket(hash) % table.buckets
                                                  : uint32_t(digits);
            }
            if (!complete) break;
        }
        for (; next < tables_.size(); ++next) tables_[next].found[row] = tables_[next].buckets;
        if (held_ > 0) {
            std::memmove(recent, recent + 1, size_t(held_ - 1) * 4);
            recent[held_ - 1] = id;
        }
    }

    // Adds to the logits of one row what `append` found for it.
    void add(int row, float* logits) const {
        for (const auto& table : tables_) {
            const float* from = table.weight.data() + size_t(table.found[row]) * vocab_size_;
            for (int i = 0; i < vocab_size_; ++i) logits[i] += from[i];
        }
    }

    void clear(int slot) {
        std::fill_n(recent_.data() + size_t(slot) * held_, held_, -1);
    }
    void copy(int from, int to) {
        std::memcpy(recent_.data() + size_t(to) * held_, recent_.data() + size_t(from) * held_, size_t(held_) * 4);
    }

    // The earlier tokens of each slot; none if all tables use only the current one.
    void show(std::map<std::string, View>& views, int slots) {
        if (held_ > 0) views["recent"] = {recent_.data(), true, {size_t(slots), size_t(held_)}};
    }
    // Read for one token.
    size_t nbytes() const { return tables_.size() * vocab_size_ * 4; }

private:
    static uint32_t bucket(uint32_t hash) {
        hash = (hash ^ (hash >> 15)) * kFactor;
        return hash ^ (hash >> 13);
    }

    struct Found {
        int order = 0;
        bool hashed = false;
        uint32_t buckets = 0;
        std::vector<float> weight;
        std::vector<uint32_t> found;  // by row of logits
    };

    int vocab_size_, held_ = 0;
    std::vector<Found> tables_;
    Buffer<int32_t> recent_;
};

}  // namespace INKLING_ISA
