// RNN, GRU and LSTM: the gates of a token in one product, and the element-wise part while they are still in the cache.
#pragma once

#include <stdexcept>

#include "kernel.hpp"
#include "linear.hpp"
#include "mixture.hpp"
#include "tables.hpp"

namespace INKLING_ISA {

using namespace inkling;

enum class Cell { tanh, relu, gru, lstm };

// Gate tables larger than this are computed token by token instead.
constexpr size_t kMostTableBytes = size_t(64) << 20;

class Recurrent final : public Kernel {
public:
    Recurrent(const RecurrentParts& parts, const Settings& settings)
        : cell_(parts.cell == "gru"        ? Cell::gru
                : parts.cell == "lstm"     ? Cell::lstm
                : parts.cell == "rnn-relu" ? Cell::relu
                                           : Cell::tanh),
          gates_(cell_ == Cell::gru ? 3 : cell_ == Cell::lstm ? 4 : 1),
          hidden_(parts.layers.at(0).hidden.columns),
          width_(padded(hidden_)),
          embedded_(parts.embedding.columns),
          tables_(parts.tables, parts.embedding.rows, settings.slots, std::max(settings.slots, kRowsAtOnce)),
          mixture_(parts.mixture, hidden_, settings.slots, std::max(settings.slots, kRowsAtOnce)),
          pool_(settings.threads) {
        slots = settings.slots;
        rows = std::max(slots, kRowsAtOnce);
        vocab_size = parts.embedding.rows;
        layers_ = int(parts.layers.size());
        for (const auto& layer : parts.layers) {
            // Layer 0: full precision if it is folded into the table below.
            const bool folds = inputs_.empty() && size_t(vocab_size) * gates_ * width_ * 4 <= kMostTableBytes;
            inputs_.push_back(gate_matrix(layer.input, layer.input_bias, folds ? Format::fp32 : settings.format));
            hiddens_.push_back(gate_matrix(layer.hidden, layer.hidden_bias, settings.format));
            fold_ |= folds;
            weight_bytes += hiddens_.back().nbytes() + (folds ? gates_ * width_ * 4 : inputs_.back().nbytes());
        }
        const int gate_width = gates_ * width_;
        const int widest = std::max(width_, padded(embedded_));
        for (const auto& head : parts.heads) {
            heads_.emplace_back(
                head.weight.rows, head.weight.columns, settings.format, [&](int i) { return head.weight.row(i); },
                [&](int i) { return head.bias ? head.bias[i] : 0.0f; });
            weight_bytes += heads_.back().nbytes();
        }
        tables_.show(views, slots);
        mixture_.histories.show(views, slots);
        weight_bytes += tables_.nbytes();
        stride = heads_.back().panels * kPanel;
        out_ = Buffer<float>(size_t(rows) * stride);
        logits = out_.data();
        gate_inputs_ = Buffer<float>(size_t(rows) * gate_width);
        gate_sums_ = Buffer<float>(size_t(rows) * gate_width);
        for (auto& buffer : outputs_) buffer = Buffer<float>(size_t(rows) * width_);
        projected_ = Buffer<float>(size_t(rows) * widest);
        state_ = Buffer<float>(size_t(slots) * layers_ * width_);
        views["hidden"] = {state_.data(), false, {size_t(slots), size_t(layers_), size_t(width_)}};
        if (cell_ == Cell::lstm) {
            cells_ = Buffer<float>(size_t(slots) * layers_ * width_);
            views["cell"] = {cells_.data(), false, {size_t(slots), size_t(layers_), size_t(width_)}};
        }
        x_ = Rows(rows, std::max(hidden_, std::max(widest, embedded_)), settings.format);
        step_inputs_ = Rows(rows, hidden_, settings.format);
        embedding_ = Buffer<float>(size_t(vocab_size) * embedded_);
        std::memcpy(embedding_.data(), parts.embedding.data, size_t(vocab_size) * embedded_ * 4);
        if (fold_) fold_embedding();
    }

    void step(const int* which, const int* ids, int count) override {
        pool_.wake();
        run(which, ids, count, false);
        head(0, count);
    }

    void read(int slot, const int* ids, int count, float* all) override {
        pool_.wake();
        for (int begin = 0; begin < count; begin += kRowsAtOnce) {
            const int many = std::min(kRowsAtOnce, count - begin);
            run(&slot, ids + begin, many, true);
            if (all) {
                head(0, many);
                for (int row = 0; row < many; ++row)
                    std::memcpy(all + size_t(begin + row) * vocab_size, logits + size_t(row) * stride, vocab_size * 4);
            } else if (begin + many == count) {
                head(many - 1, 1);
            }
        }
    }

    void clear(int slot) override {
        tables_.clear(slot);
        mixture_.histories.clear(slot);
        const size_t size = size_t(layers_) * width_;
        std::memset(state_.data() + slot * size, 0, size * 4);
        if (cell_ == Cell::lstm) std::memset(cells_.data() + slot * size, 0, size * 4);
    }
    void copy(int from, int to) override {
        tables_.copy(from, to);
        mixture_.histories.copy(from, to);
        const size_t size = size_t(layers_) * width_;
        std::memcpy(state_.data() + to * size, state_.data() + from * size, size * 4);
        if (cell_ == Cell::lstm) std::memcpy(cells_.data() + to * size, cells_.data() + from * size, size * 4);
    }

private:
    // Rows in the order [16 units][gate][unit], so that one thread has all gates of a unit.
    Packed gate_matrix(const Matrix& from, const float* bias, Format format) const {
        auto source = [&](int out) {
            const int unit = out / (gates_ * kPanel) * kPanel + out % kPanel, gate = out / kPanel % gates_;
            return unit < hidden_ ? gate * hidden_ + unit : -1;
        };
        return Packed(
            gates_ * width_, from.columns, format, [&](int i) { return source(i) < 0 ? nullptr : from.row(source(i)); },
            [&](int i) { return bias && source(i) >= 0 ? bias[source(i)] : 0.0f; });
    }

    void fold_embedding() {
        const int gate_width = gates_ * width_;
        table_ = Buffer<float>(size_t(vocab_size) * gate_width);
        Rows x(vocab_size, embedded_, Format::fp32);
        std::vector<float*> y(vocab_size);
        x.count = vocab_size;
        for (int id = 0; id < vocab_size; ++id) {
            x.set(id, embedding_.data() + size_t(id) * embedded_);
            y[id] = table_.data() + size_t(id) * gate_width;
        }
        multiply(pool_, inputs_[0], x, y.data());
        inputs_[0] = Packed();
        embedding_ = Buffer<float>(1);
    }

    float* state(Buffer<float>& of, int slot, int layer) const {
        return of.data() + (size_t(slot) * layers_ + layer) * width_;
    }

    // Through all layers: `count` tokens of one slot one after the other, or one token of each of several slots.
    void run(const int* which, const int* ids, int count, bool sequence) {
        for (int row = 0; row < count; ++row) {
            tables_.append(row, which[sequence ? 0 : row], ids[row]);
            mixture_.histories.append(row, which[sequence ? 0 : row], ids[row]);
        }
        const int gate_width = gates_ * width_;
        std::vector<const float*>& gate_inputs = gate_rows_;
        gate_inputs.resize(rows);
        targets_.resize(rows);
        for (int layer = 0; layer < layers_; ++layer) {
            float* output = outputs_[layer % 2].data();
            if (layer == 0 && fold_) {
                for (int row = 0; row < count; ++row)
                    gate_inputs[row] = table_.data() + size_t(ids[row]) * gate_width;
            } else {
                x_.count = count;
                for (int row = 0; row < count; ++row) {
                    x_.set(row, layer == 0 ? embedding_.data() + size_t(ids[row]) * embedded_
                                           : outputs_[(layer + 1) % 2].data() + size_t(row) * width_);
                    x_.quantize(row, inputs_[layer]);
                    targets_[row] = gate_inputs_.data() + size_t(row) * gate_width;
                    gate_inputs[row] = targets_[row];
                }
                multiply(pool_, inputs_[layer], x_, targets_.data());
            }
            for (int first = 0; first < count; first += sequence ? 1 : count) {
                step_inputs_.count = sequence ? 1 : count;
                for (int row = 0; row < step_inputs_.count; ++row) {
                    const bool from_state = !sequence || first == 0;
                    step_inputs_.set(row, from_state ? state(state_, which[row], layer)
                                                     : output + size_t(first - 1) * width_);
                    step_inputs_.quantize(row, hiddens_[layer]);
                    targets_[row] = gate_sums_.data() + size_t(row) * gate_width;
                }
                multiply(pool_, hiddens_[layer], step_inputs_, targets_.data(), gates_, [&](int begin, int end) {
                    for (int row = 0; row < step_inputs_.count; ++row)
                        cell(gate_inputs[first + row], targets_[row], step_inputs_.at[row],
                             cell_ == Cell::lstm ? state(cells_, which[row], layer) : nullptr,
                             output + size_t(first + row) * width_, begin / gates_, end / gates_);
                });
            }
            for (int row = 0; row < (sequence ? 1 : count); ++row)
                std::memcpy(state(state_, which[row], layer),
                            output + size_t(sequence ? count - 1 : row) * width_, width_ * 4);
        }
    }

    // Units 16 * begin to 16 * end of one row. Gates as in torch: GRU reset, update, new; LSTM input, forget, cell, output.
    void cell(const float* gi, const float* gh, const float* before, float* memory, float* after, int begin,
              int end) const {
        for (int unit = begin * kPanel; unit < end * kPanel; unit += LANES) {
            const size_t at = size_t(unit / kPanel) * gates_ * kPanel + unit % kPanel;
            auto both = [&](int gate) { return load(gi + at + gate * kPanel) + load(gh + at + gate * kPanel); };
            switch (cell_) {
                case Cell::gru: {
                    const vec reset = sigmoid(both(0)), update = sigmoid(both(1));
                    const vec candidate = tanh(load(gi + at + 2 * kPanel) + reset * load(gh + at + 2 * kPanel));
                    store(after + unit, (load(before + unit) - candidate) * update + candidate);
                    break;
                }
                case Cell::lstm: {
                    const vec next = sigmoid(both(1)) * load(memory + unit) + sigmoid(both(0)) * tanh(both(2));
                    store(memory + unit, next);
                    store(after + unit, sigmoid(both(3)) * tanh(next));
                    break;
                }
                case Cell::tanh: store(after + unit, tanh(both(0))); break;
                case Cell::relu: store(after + unit, relu(both(0))); break;
            }
        }
    }

    // Logits of `count` rows of the last layer, from row `first` on.
    void head(int first, int count) {
        const float* hidden = outputs_[(layers_ - 1) % 2].data() + size_t(first) * width_;
        const float* from = hidden;
        int width = width_;
        for (size_t i = 0; i < heads_.size(); ++i) {
            const bool last = i + 1 == heads_.size();
            x_.count = count;
            for (int row = 0; row < count; ++row) {
                x_.set(row, from + size_t(row) * width);
                x_.quantize(row, heads_[i]);
                targets_[row] = last ? logits + size_t(row) * stride
                                     : projected_.data() + size_t(row) * heads_[i].panels * kPanel;
            }
            multiply(pool_, heads_[i], x_, targets_.data());
            from = projected_.data();
            width = heads_[i].panels * kPanel;
        }
        for (int row = 0; row < count; ++row) {
            tables_.add(first + row, logits + size_t(row) * stride);
            mixture_.mix(first + row, hidden + size_t(row) * width_, logits + size_t(row) * stride);
        }
    }

    const Cell cell_;
    const int gates_, hidden_, width_, embedded_;
    int layers_ = 0;
    bool fold_ = false;
    std::vector<Packed> inputs_, hiddens_, heads_;
    Buffer<float> embedding_, table_, state_, cells_, gate_inputs_, gate_sums_, outputs_[2], projected_, out_;
    Rows x_, step_inputs_;
    Tables tables_;
    Mixture mixture_;
    std::vector<const float*> gate_rows_;
    std::vector<float*> targets_;
    Pool pool_;
};

}  // namespace INKLING_ISA
