// GRU and LSTM for training: a layer over whole texts, forward and backward.
//
// Only what depends on the step before runs step by step: the product with the hidden state and the element-wise part,
// 16 units of a few rows at a time while their sums are in the cache. Products over all steps are computed at once. The
// order of a sum does not depend on the number of threads.
#pragma once

#include <memory>

#include "kernel.hpp"
#include "product.hpp"

namespace INKLING_ISA {

using inkling::Sequence;

// Numbers kept for a unit of one row and step. GRU: what is added to the new gate before the reset, reset, update, new;
// LSTM: input, forget, new, output, then the cell and its tanh. Gradients overwrite the first four.
constexpr int kGates = 4, kKeptLstm = 6;
// Panels of hidden units that backward takes at a time: even shares for two threads at the usual sizes.
constexpr int kBackAcross = kAcross > 1 ? 2 : 1;

// Of workers between two calls: about the time that Python takes from one to the next.
constexpr int kPatience = 4000;

class SequenceSpace {
public:
    Pool& pool(int threads) {
        if (!pool_ || pool_->threads() != threads) pool_ = std::make_unique<Pool>(threads, kPatience);
        return *pool_;
    }
    float* weights(size_t count) { return grown(weights_, count); }
    float* table(size_t count) { return grown(table_, count); }
    float* rows(size_t count) { return grown(rows_, count); }
    float* bias(size_t count) { return grown(bias_, count); }
    float* slots(size_t count) { return grown(slots_, count); }
    // Of one thread, a worker's too.
    float* chunk(size_t count) { return grown(chunk_, count); }
    ProductSpace products;

private:
    struct Grown {
        Buffer<float> buffer;
        size_t count = 0;
    };
    static float* grown(Grown& of, size_t count) {
        if (of.count < count) {
            of.buffer = Buffer<float>(count);
            of.count = count;
        }
        return of.buffer.data();
    }
    std::unique_ptr<Pool> pool_;
    Grown weights_, table_, rows_, bias_, slots_, chunk_;
};

class SequenceRun {
public:
    SequenceRun(const Sequence& s, SequenceSpace& space, int threads)
        : s_(s), space_(space), pool_(space.pool(threads)), width_(padded(s.hidden)), gates_(s.lstm ? 4 : 3),
          first_(s.lstm ? 0 : 1), kept_(s.lstm ? kKeptLstm : kGates), row_(int64_t(kept_) * width_) {}

    void forward() {
        add_biases();
        multiply_inputs();
        pack_forward();
        const int64_t all = int64_t(s_.batch) * width_;
        float* hidden[2] = {space_.rows(3 * all), space_.rows(3 * all) + all};
        float* cell = hidden[0] + 2 * all;
        copy_padded(s_.first_hidden, hidden[0]);
        make_slots(width_);
        for (int row = 0; row < s_.batch; ++row)
            for (int unit = 0; unit < width_; unit += LANES)
                keep_slots(0, row, unit, load(hidden[0] + int64_t(row) * width_ + unit));
        if (s_.lstm) copy_padded(s_.first_cell, cell);
        for (int step = 0; step < s_.time; ++step)
            share(width_ / kPanel, [&](int begin, int end) {
                const Tiles tiles;
                for (int unit = begin; unit < end; ++unit)
                    forward_units(step, unit, hidden[step % 2], hidden[(step + 1) % 2], cell);
            });
        copy_real(hidden[s_.time % 2], s_.last_hidden);
        if (s_.lstm) copy_real(cell, s_.last_cell);
    }

    void backward() {
        pack_backward();
        make_slots(recurrent_gates());
        const int64_t all = int64_t(s_.batch) * width_;
        // The gradient of the last hidden state, in the end of the first; and what bypasses the product: the GRU's
        // share of the hidden state, or the LSTM's cell.
        float* d_hidden = space_.rows(3 * all);
        carried_ = d_hidden + all;
        sums_ = space_.bias(2 * kGates * width_);
        std::memset(sums_, 0, kGates * width_ * 4);
        if (s_.ids) {
            table_ = space_.table(int64_t(s_.vocab_size) * gates_ * width_);
            std::memset(table_, 0, int64_t(s_.vocab_size) * gates_ * width_ * 4);
        }
        copy_padded(s_.d_last_hidden, d_hidden);
        copy_padded(s_.lstm ? s_.d_last_cell : nullptr, carried_);
        share(groups(), [&](int begin, int end) {
            for (int group = begin; group < end; ++group)
                for (int row = 0, count; row < s_.batch; row += count) {
                    count = next_rows(s_.batch - row, kDown);
                    const float* from[kDown];
                    for (int r = 0; r < count; ++r)
                        from[r] = d_hidden + int64_t(row + r) * width_ + group * kBackAcross * kPanel;
                    backward_units(s_.time - 1, row, count, group, from);
                }
        });
        for (int step = s_.time - 1; step > 0; --step)
            share(groups(), [&](int begin, int end) {
                const Tiles tiles;
                for (int group = begin; group < end; ++group) backward_group(step, group, nullptr);
            });
        if (s_.d_first_hidden) {
            share(groups(), [&](int begin, int end) {
                const Tiles tiles;
                for (int group = begin; group < end; ++group) backward_group(0, group, d_hidden);
            });
            copy_real(d_hidden, s_.d_first_hidden);
        }
        if (s_.lstm && s_.d_first_cell) copy_real(carried_, s_.d_first_cell);
        weight_gradients();
    }

private:
    // -- memory layout -----------------------------------------------------------------------------------------------

    float* kept(int step, int row) const { return s_.memory + (int64_t(step) * s_.batch + row) * row_; }
    float* output(int step, int row) const { return s_.outputs + (int64_t(row) * s_.time + step) * s_.hidden; }
    // torch's gate of an index in `kept`: the GRU's first belongs to its new gate, as the last does.
    int gate_of(int index) const { return s_.lstm ? index : (index + 2) % 3; }

    void copy_padded(const float* from, float* to) const {
        std::memset(to, 0, int64_t(s_.batch) * width_ * 4);
        for (int row = 0; from && row < s_.batch; ++row)
            std::memcpy(to + int64_t(row) * width_, from + int64_t(row) * s_.hidden, s_.hidden * 4);
    }
    void copy_real(const float* from, float* to) const {
        for (int row = 0; row < s_.batch; ++row)
            std::memcpy(to + int64_t(row) * s_.hidden, from + int64_t(row) * width_, s_.hidden * 4);
    }
    // A vector of units of a row that is not padded.
    vec load_units(const float* from, int unit) const {
        if (unit + LANES <= s_.hidden) return load(from + unit);
        float lanes[LANES] = {};
        if (unit < s_.hidden) std::memcpy(lanes, from + unit, (s_.hidden - unit) * 4);
        return load(lanes);
    }
    void store_units(float* to, int unit, vec value) const {
        if (unit + LANES <= s_.hidden) return store(to + unit, value);
        if (unit < s_.hidden) std::memcpy(to + unit, &value, (s_.hidden - unit) * 4);
    }

    // -- what the products of one step read: (batch, columns) in slots, of a step and of the next ----------------------

    // In fp32 they read the numbers in place.
    void make_slots(int columns) {
        if (kPair == 1) return;
        slots_step_ = slots(columns) + kPanel;
        const size_t count = size_t(s_.batch + kDown) * slots_step_;
        slots_[0] = space_.slots(2 * count), slots_[1] = slots_[0] + count;
        std::memset(slots_[0], 0, 2 * count * 4);
    }
    void keep_slots(int step, int row, int column, vec value) const {
#if defined(INKLING_BF16)
        store_rounded(reinterpret_cast<uint16_t*>(slots_[step & 1] + row * slots_step_) + column, value);
#else
        (void)step, (void)row, (void)column, (void)value;
#endif
    }
    const float* slots_of(int step, int row, const float* numbers) const {
        return kPair == 1 ? numbers : slots_[step & 1] + row * slots_step_;
    }

    // work(begin, end) over all of `count` units of work of one step.
    template <class Work>
    void share(int count, const Work& work) {
        const double load = double(s_.batch) * width_ * width_ * gates_;
        const int parts = load < 4e6 ? 1 : std::min(count, pool_.threads());
        if (parts > 1) pool_.wake();
        pool_.run(parts, [&](int part) { work(count * part / parts, count * (part + 1) / parts); });
    }

    // -- forward -----------------------------------------------------------------------------------------------------

    // What each gate adds to its product with the inputs; for the GRU's new gate the hidden side's is kept apart.
    void add_biases() {
        bias_ = space_.bias(2 * kGates * width_);
        std::memset(bias_, 0, 2 * kGates * width_ * 4);
        for (int gate = 0; gate < gates_; ++gate)
            for (int unit = 0; unit < s_.hidden; ++unit) {
                const int at = gate * s_.hidden + unit;
                const bool apart = !s_.lstm && gate == 2;
                bias_[gate * width_ + unit] = s_.bias_ih[at] + (apart ? 0 : s_.bias_hh[at]);
                if (apart) bias_[kGates * width_ + unit] = s_.bias_hh[at];
            }
    }

    // Gates are contiguous, and can be computed in one product, only if units need no padding.
    template <class Work>
    void by_gates(int gates, const Work& work) const {
        if (width_ == s_.hidden) return work(0, gates * s_.hidden);
        for (int gate = 0; gate < gates; ++gate) work(gate, s_.hidden);
    }

    // The inputs' part of all gates of all steps: into `kept`, or into a table with a row for each token.
    void multiply_inputs() {
        const int64_t rows = s_.ids ? s_.vocab_size : int64_t(s_.time) * s_.batch;
        if (s_.ids) table_ = space_.table(rows * gates_ * width_);
        if (width_ != s_.hidden) {
            // Padding units must not be NaN: they are multiplied by zero later on.
            std::memset(s_.memory, 0, int64_t(s_.time) * s_.batch * row_ * 4);
            if (s_.ids) std::memset(table_, 0, rows * gates_ * width_ * 4);
        }
        by_gates(gates_, [&](int gate, int units) {
            Product product{inputs(), false, {s_.weight_ih + int64_t(gate) * s_.hidden * s_.inputs, s_.inputs}, true,
                            {}, int(rows), s_.inputs, units};
            if (s_.ids)
                product.c = {table_ + gate * width_, gates_ * width_};
            else
                product.c = {s_.memory + (first_ + gate) * width_, row_};
            product.bias = bias_ + gate * width_;
            multiply(pool_, space_.products, product);
        });
    }
    ConstRows inputs() const {
        if (s_.ids) return {s_.x, s_.inputs};
        return {s_.x, s_.x_row, s_.batch, s_.x_step};
    }

    // [16 units][panels in groups of `side_by_side`][slot][16 in each]
    int side_by_side() const { return kAcross == 3 && s_.lstm ? 2 : kAcross; }
    void pack_forward() {
        const int group = side_by_side() * kPanel, depth = slots(s_.hidden), all = gates_ * kPanel;
        weights_ = space_.weights(int64_t(gates_) * width_ * depth);
        if (width_ != s_.hidden || depth * kPair != s_.hidden)
            std::memset(weights_, 0, int64_t(gates_) * width_ * depth * 4);
        share(width_ / kPanel, [&](int begin, int end) {
            for (int panel = begin * kPanel; panel < end * kPanel; panel += kPanel)
                // A few slots at a time, so that the lines written to stay in the first cache.
                for (int first = 0; first < depth; first += kPanel)
                    for (int i = 0; i < all; ++i) {
                        const int gate = i / kPanel, unit = panel + i % kPanel, last = std::min(depth, first + kPanel);
                        if (unit >= s_.hidden) continue;
                        const int before = i / group * group, wide = std::min(group, all - before);
                        float* to = weights_ + (int64_t(panel) * gates_ + before) * depth + i % group;
                        const float* from = s_.weight_hh + (int64_t(gate) * s_.hidden + unit) * s_.hidden;
                        float few[kPanel];
                        for (int k = first; k < last; k += LANES)
                            store(few + k - first, load_slots(from + k * kPair, s_.hidden - k * kPair));
                        for (int k = first; k < last; ++k) to[int64_t(k) * wide] = few[k - first];
                    }
        });
    }

    void forward_units(int step, int panel, const float* before, float* after, float* cell) const {
        const int across = side_by_side(), sixteen = gates_ * kPanel, depth = slots(s_.hidden);
        alignas(64) float sums[kDown][kGates * kPanel];
        const float* from[kDown];
        float* to[kDown];
        for (int row = 0, count; row < s_.batch; row += count) {
            count = next_rows(s_.batch - row, kDown);
            for (int r = 0; r < count; ++r) from[r] = slots_of(step, row + r, before + int64_t(row + r) * width_);
            for (int gate = 0; gate < gates_; gate += across) {
                for (int r = 0; r < count; ++r) to[r] = sums[r] + gate * kPanel;
                const float* weights = weights_ + (int64_t(panel) * sixteen + gate * kPanel) * depth;
                tile_of(std::min(across, gates_ - gate), count, weights, depth, from, 1, to, false);
            }
            for (int r = 0; r < count; ++r)
                for (int lane = 0; lane < kPanel; lane += LANES) {
                    const int unit = panel * kPanel + lane;
                    const int64_t at = int64_t(row + r) * width_ + unit;
                    const vec value = s_.lstm ? lstm(step, row + r, unit, sums[r] + lane, cell + at)
                                              : gru(step, row + r, unit, sums[r] + lane, load(before + at));
                    store(after + at, value);
                    keep_slots(step + 1, row + r, unit, value);
                    store_units(output(step, row + r), unit, value);
                }
        }
    }

    const float* gate_inputs(int step, int row) const {
        if (!s_.ids) return kept(step, row) + first_ * width_;
        return table_ + s_.ids[int64_t(row) * s_.time + step] * gates_ * width_;
    }

    vec gru(int step, int row, int unit, const float* sums, vec before) const {
        const float* in = gate_inputs(step, row) + unit;
        float* keep = kept(step, row) + unit;
        const vec reset = sigmoid(load(in) + load(sums)), update = sigmoid(load(in + width_) + load(sums + kPanel));
        const vec inner = load(sums + 2 * kPanel) + load(bias_ + kGates * width_ + unit);
        const vec candidate = tanh(load(in + 2 * width_) + reset * inner);
        store(keep, inner);
        store(keep + width_, reset);
        store(keep + 2 * width_, update);
        store(keep + 3 * width_, candidate);
        return (before - candidate) * update + candidate;
    }

    vec lstm(int step, int row, int unit, const float* sums, float* cell) const {
        const float* in = gate_inputs(step, row) + unit;
        float* keep = kept(step, row) + unit;
        const vec input = sigmoid(load(in) + load(sums)), forget = sigmoid(load(in + width_) + load(sums + kPanel));
        const vec candidate = tanh(load(in + 2 * width_) + load(sums + 2 * kPanel));
        const vec output = sigmoid(load(in + 3 * width_) + load(sums + 3 * kPanel));
        const vec memory = forget * load(cell) + input * candidate, tanh_cell = tanh(memory);
        store(cell, memory);
        store(keep, input);
        store(keep + width_, forget);
        store(keep + 2 * width_, candidate);
        store(keep + 3 * width_, output);
        store(keep + 4 * width_, memory);
        store(keep + 5 * width_, tanh_cell);
        return output * tanh_cell;
    }

    // -- backward ----------------------------------------------------------------------------------------------------

    int recurrent_gates() const { return gates_ * width_; }
    int groups() const { return (width_ / kPanel + kBackAcross - 1) / kBackAcross; }

    void pack_backward() {
        const int64_t depth = slots(recurrent_gates());
        weights_ = space_.weights(depth * width_);
        share(groups(), [&](int begin, int end) {
            for (int column = begin * kBackAcross * kPanel; column < std::min(width_, end * kBackAcross * kPanel);
                 column += kBackAcross * kPanel) {
                const int wide = std::min(kBackAcross * kPanel, width_ - column), real = std::min(wide, s_.hidden - column);
                float* to = weights_ + int64_t(column) * depth;
                // The weights of an index in `kept` and a unit, from the column on; none for a padding unit.
                const auto row = [&](int k) -> const float* {
                    const int index = k / width_, unit = k % width_;
                    if (index >= gates_ || unit >= s_.hidden) return nullptr;
                    return s_.weight_hh + (int64_t(gate_of(index)) * s_.hidden + unit) * s_.hidden + column;
                };
                for (int slot = 0; slot < depth; ++slot, to += wide) {
#if defined(INKLING_BF16)
                    const float *first = row(slot * kPair), *second = row(slot * kPair + 1);
                    for (int i = 0; i < wide; i += LANES) {
                        const auto of = [&](const float* f) { return f && i < real ? load_few(f + i, real - i) : vec{}; };
                        store(to + i, paired(of(first), of(second)));
                    }
#else
                    const float* from = row(slot);
                    const int copied = from ? real : 0;
                    if (copied) std::memcpy(to, from, copied * 4);
                    if (copied < wide) std::memset(to + copied, 0, (wide - copied) * 4);
#endif
                }
            }
        });
    }

    // Through the product of `step` to the hidden state before it, and on into the gates of step - 1, or into `last`.
    void backward_group(int step, int group, float* last) const {
        const int column = group * kBackAcross * kPanel, wide = std::min(kBackAcross * kPanel, width_ - column);
        alignas(64) float sums[kDown][kBackAcross * kPanel];
        const float* from[kDown];
        float* to[kDown];
        const int depth = slots(recurrent_gates());
        for (int row = 0, count; row < s_.batch; row += count) {
            count = next_rows(s_.batch - row, kDown);
            for (int r = 0; r < count; ++r) {
                from[r] = slots_of(step, row + r, kept(step, row + r));
                to[r] = sums[r];
            }
            tile_of(wide / kPanel, count, weights_ + int64_t(column) * depth, depth, from, 1, to, false);
            if (last == nullptr) {
                for (int r = 0; r < count; ++r) from[r] = sums[r];
                backward_units(step - 1, row, count, group, from);
                continue;
            }
            for (int r = 0; r < count; ++r)
                for (int lane = 0; lane < wide; lane += LANES) {
                    const int64_t at = int64_t(row + r) * width_ + column + lane;
                    const vec skipped = load(carried_ + at);
                    store(last + at, s_.lstm ? load(sums[r] + lane) : load(sums[r] + lane) + skipped);
                }
        }
    }

    // Gradients of the gates of `count` rows at one step; `d_hidden`: of their hidden state, from later steps.
    void backward_units(int step, int row, int count, int group, const float* const* d_hidden) const {
        const int column = group * kBackAcross * kPanel, wide = std::min(kBackAcross * kPanel, width_ - column);
        for (int lane = 0; lane < wide; lane += LANES) {
            const int unit = column + lane;
            vec totals[kGates] = {};
            for (int r = 0; r < count; ++r) {
                const int64_t one = row + r;
                vec found = load(d_hidden[r] + lane), gates[kGates];
                if (s_.d_outputs) found += load_units(s_.d_outputs + one * s_.d_row + step * s_.d_step, unit);
                float* carried = carried_ + one * width_ + unit;
                if (s_.lstm)
                    lstm_back(step, one, unit, found, carried, gates);
                else
                    gru_back(step, one, unit, found, carried, gates);
                float* keep = kept(step, one) + unit;
                for (int gate = 0; gate < kGates; ++gate) {
                    store(keep + gate * width_, gates[gate]);
                    totals[gate] += gates[gate];
                    if (gate < gates_) keep_slots(step, one, gate * width_ + unit, gates[gate]);
                }
                if (s_.ids) {
                    float* entry = table_ + s_.ids[one * s_.time + step] * gates_ * width_ + unit;
                    for (int gate = 0; gate < gates_; ++gate)
                        store(entry + gate * width_, load(entry + gate * width_) + gates[first_ + gate]);
                }
            }
            for (int gate = 0; gate < kGates; ++gate) {
                float* sum = sums_ + gate * width_ + unit;
                store(sum, load(sum) + totals[gate]);
            }
        }
    }

    vec hidden_before(int step, int row, int unit) const {
        if (step > 0) return load_units(output(step - 1, row), unit);
        return s_.first_hidden ? load_units(s_.first_hidden + int64_t(row) * s_.hidden, unit) : vec{};
    }
    vec cell_before(int step, int row, int unit) const {
        if (step > 0) return load(kept(step - 1, row) + 4 * width_ + unit);
        return s_.first_cell ? load_units(s_.first_cell + int64_t(row) * s_.hidden, unit) : vec{};
    }

    void gru_back(int step, int row, int unit, vec found, float* carried, vec* gates) const {
        const float* keep = kept(step, row) + unit;
        const vec inner = load(keep), reset = load(keep + width_), update = load(keep + 2 * width_);
        const vec candidate = load(keep + 3 * width_), before = hidden_before(step, row, unit);
        found += load(carried);
        store(carried, found * update);
        gates[3] = found * (1.0f - update) * (1.0f - candidate * candidate);
        gates[2] = found * (before - candidate) * update * (1.0f - update);
        gates[1] = gates[3] * inner * reset * (1.0f - reset);
        gates[0] = gates[3] * reset;
    }

    void lstm_back(int step, int row, int unit, vec found, float* carried, vec* gates) const {
        const float* keep = kept(step, row) + unit;
        const vec input = load(keep), forget = load(keep + width_), candidate = load(keep + 2 * width_);
        const vec output = load(keep + 3 * width_), tanh_cell = load(keep + 5 * width_);
        const vec memory = load(carried) + found * output * (1.0f - tanh_cell * tanh_cell);
        store(carried, memory * forget);
        gates[0] = memory * candidate * input * (1.0f - input);
        gates[1] = memory * cell_before(step, row, unit) * forget * (1.0f - forget);
        gates[2] = memory * input * (1.0f - candidate * candidate);
        gates[3] = found * tanh_cell * output * (1.0f - output);
    }

    void weight_gradients() {
        const int64_t rows = int64_t(s_.time) * s_.batch;
        for (int gate = 0; gate < gates_; ++gate) {
            const int64_t bytes = s_.hidden * 4, at = int64_t(gate) * s_.hidden;
            std::memcpy(s_.d_bias_ih + at, sums_ + (first_ + gate) * width_, bytes);
            std::memcpy(s_.d_bias_hh + at, sums_ + (s_.lstm || gate < 2 ? first_ + gate : 0) * width_, bytes);
        }
        // Of the hidden state's matrix: the first states with the first gates, then each output with the next gates.
        const ConstRows outputs{s_.outputs, int64_t(s_.time) * s_.hidden, s_.batch, s_.hidden};
        for (int index = 0; index < gates_;) {
            const bool joined = width_ == s_.hidden && (s_.lstm || index == 1);
            const int gates = !joined ? 1 : s_.lstm ? 4 : 2;
            Product product{{kept(0, 0) + index * width_, row_}, true, {s_.first_hidden, s_.hidden}, false,
                            {s_.d_weight_hh + int64_t(gate_of(index)) * s_.hidden * s_.hidden, s_.hidden},
                            gates * s_.hidden, s_.first_hidden ? s_.batch : 0, s_.hidden};
            if (s_.first_hidden || s_.time == 1) multiply(pool_, space_.products, product);
            if (s_.time > 1) {
                product.add = s_.first_hidden != nullptr;
                product.a = {kept(1, 0) + index * width_, row_};
                product.b = outputs;
                product.depth = (s_.time - 1) * s_.batch;
                multiply(pool_, space_.products, product);
            }
            index += gates;
        }
        // Of the inputs and their matrix.
        ConstRows gates{kept(0, 0) + first_ * width_, row_};
        if (s_.ids) gates = {table_, gates_ * width_};
        const int count = s_.ids ? s_.vocab_size : int(rows);
        by_gates(gates_, [&](int gate, int units) {
            const int64_t at = int64_t(gate) * s_.hidden * s_.inputs;
            multiply(pool_, space_.products,
                     {gates.shifted(gate * width_), true, inputs(), false, {s_.d_weight_ih + at, s_.inputs}, units,
                      count, s_.inputs});
            if (!s_.d_x) return;
            MutableRows to{s_.d_x, s_.inputs};
            if (!s_.ids) to = {s_.d_x, int64_t(s_.time) * s_.inputs, s_.batch, s_.inputs};
            multiply(pool_, space_.products,
                     {gates.shifted(gate * width_), false, {s_.weight_ih + at, s_.inputs}, false, to, count,
                      units, s_.inputs, gate > 0});
        });
    }

    const Sequence& s_;
    SequenceSpace& space_;
    Pool& pool_;
    const int width_, gates_, first_, kept_;
    const int64_t row_;
    float* slots_[2] = {};
    int64_t slots_step_ = 0;
    float *weights_ = nullptr, *table_ = nullptr, *bias_ = nullptr, *sums_ = nullptr, *carried_ = nullptr;
};

// One for each Python thread: concurrent trainings share no memory.
static SequenceSpace& sequence_space() {
    thread_local SequenceSpace space;
    return space;
}

}  // namespace INKLING_ISA
