// The kernels of one instruction set against loops in double, without Python: also for a processor that is emulated.
//
//     c++ -std=c++20 <the flags of CMakeLists.txt> -DINKLING_ISA=inkling_plain check.cpp -o check && ./check
//
// Prints each check with its largest error and what it may be; ends with 1 if one is larger. `./check features` prints
// which instruction sets of ARM this processor has.
#include "../../../lm/kernels/native/isa.cpp"
#include "../../../lm/kernels/native/features.hpp"
#if !defined(INKLING_BF16)
#include "../../../lm/kernels/native/counts.cpp"
#endif

#include <cstdio>
#include <cstring>
#include <functional>

inkling::Kernel::~Kernel() = default;

using namespace INKLING_ISA;
using Numbers = std::vector<float>;
using Exact = std::vector<double>;

#if defined(INKLING_BF16)
constexpr bool kRounds = true;
#else
constexpr bool kRounds = false;
#endif

static int failures = 0;

static void report(const char* name, double error, double most) {
    const bool good = error <= most;  // not of NaN
    std::printf("%s %s: %.2g of at most %.2g\n", good ? "ok  " : "FAIL", name, error, most);
    failures += !good;
}

static uint64_t seed = 1;
static float random_number() {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return float(int32_t(seed >> 32)) / 2147483648.0f;
}
static Numbers random_numbers(size_t count, float scale = 1) {
    Numbers found(count);
    for (float& number : found) number = random_number() * scale;
    return found;
}

static double operand(float value) {  // as the product takes it
    if (!kRounds) return value;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    std::memcpy(&value, &bits, 4);
    return value;
}

// The largest difference, as a share of the largest number.
template <class Found, class Wanted>
static double error_of(const Found& found, const Wanted& wanted) {
    double most = 1e-9, difference = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
        const double each = std::fabs(double(found[i]) - double(wanted[i]));
        if (!(each <= difference)) difference = each;
        most = std::max(most, std::fabs(double(wanted[i])));
    }
    return difference / most;
}

template <class T>
static bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// -- products --------------------------------------------------------------------------------------------------------

static void check_products() {
    // The last one is large enough for two threads.
    const int shapes[][3] = {{1, 1, 1}, {5, 7, 3}, {33, 77, 50}, {40, 1100, 51}, {30, 130, 335}, {64, 512, 48},
                             {110, 230, 200}};
    double worst = 0;
    bool equal = true;
    for (const auto& [rows, depth, columns] : shapes)
        for (int way = 0; way < 8; ++way) {
            const int64_t work = int64_t(rows) * depth * columns;
            // Of large products two ways, and some of the numbers.
            if (work > 1000000 && way != 1 && way != 6) continue;
            const int every = 1 + int(work / 100000);
            const bool a_transposed = way & 1, b_transposed = way & 2, add = way & 4;
            const Numbers a = random_numbers(size_t(rows) * depth), b = random_numbers(size_t(depth) * columns);
            const Numbers bias = random_numbers(columns), before = random_numbers(size_t(rows) * columns);
            Numbers c = before, alone = before;
            inkling::Operands o{a.data(), a_transposed ? rows : depth, a_transposed, b.data(),
                                b_transposed ? depth : columns, b_transposed, c.data(), columns, rows, depth, columns,
                                add, add ? nullptr : bias.data()};
            product(o, 2);
            if (work > 4000000) {
                o.c = alone.data();
                product(o, 1);
                equal &= same_bits(c, alone);
            }
            for (int index = 0; index < rows * columns; index += every) {
                const int i = index / columns, j = index % columns;
                double sum = add ? before[index] : bias[j], size = std::fabs(sum);
                for (int k = 0; k < depth; ++k) {
                    const double each = operand(a[a_transposed ? k * rows + i : i * depth + k]) *
                                        operand(b[b_transposed ? j * depth + k : k * columns + j]);
                    sum += each, size += std::fabs(each);
                }
                const double found = std::fabs(c[index] - sum) / (size + 1e-3);
                if (!(found <= worst)) worst = found;
            }
        }
    report("products, as a share of the sum of what is added", worst, 1e-6);
    report("products on one thread and on two: whether bits differ", !equal, 0);

    Numbers a(20 * 40, 1), b(40 * 20, 1), c(20 * 20);
    a[3 * 40 + 5] = NAN, a[4 * 40 + 6] = INFINITY, b[7 * 20 + 8] = -INFINITY;
    product({a.data(), 40, false, b.data(), 20, false, c.data(), 20, 20, 40, 20}, 1);
    int wrong = 0;
    for (int i = 0; i < 20; ++i)
        for (int j = 0; j < 20; ++j) {
            const float found = c[i * 20 + j];
            const bool is_nan = i == 3 || (i == 4 && j == 8);
            wrong += is_nan ? !std::isnan(found) : i == 4 ? found != INFINITY : j == 8 ? found != -INFINITY : found != 40;
        }
    report("products of NaN and infinity", wrong, 0);
}

#if !defined(INKLING_BF16)

// Packed weights with 1 to 13 rows, in the formats.
static void check_packed() {
    for (const Format format : {Format::fp32, Format::int8, Format::int4, Format::int8_blocks}) {
        double worst = 0;
        bool equal = true;
        const int shapes[][2] = {{1, 1}, {16, 32}, {37, 45}, {100, 131}};
        for (const auto& shape : shapes) {
            const int outputs = shape[0], inputs = shape[1];
            const Numbers weights = random_numbers(size_t(outputs) * inputs), bias = random_numbers(outputs);
            const Packed packed(outputs, inputs, format, [&](int i) { return weights.data() + size_t(i) * inputs; },
                                [&](int i) { return bias[i]; }, nullptr, nullptr);
            for (const int rows : {1, 2, 5, 13}) {
                const Numbers x = random_numbers(size_t(rows) * padded(inputs));
                const size_t wide = size_t(packed.panels) * kPanel;
                Numbers y(rows * wide), alone(rows * wide);
                Pool pool(2);
                // Rows for weights by blocks are those of int4.
                const Format of_rows = format == Format::int8_blocks ? Format::int4 : format;
                Rows all(rows, inputs, of_rows), one(1, inputs, of_rows);
                all.count = rows, one.count = 1;
                std::vector<float*> to(rows);
                for (int row = 0; row < rows; ++row) {
                    const float* from = x.data() + size_t(row) * padded(inputs);
                    all.set(row, from), all.quantize(row, packed);
                    to[row] = y.data() + row * wide;
                    one.set(0, from), one.quantize(0, packed);
                    float* target = alone.data() + row * wide;
                    multiply(pool, packed, one, &target);
                }
                multiply(pool, packed, all, to.data());
                equal &= same_bits(y, alone);
                for (int row = 0; row < rows; ++row)
                    for (int out = 0; out < outputs; ++out) {
                        double sum = bias[out], size = std::fabs(sum);
                        for (int k = 0; k < inputs; ++k) {
                            double w, value;
                            const size_t panel = out / kPanel, lane = out % kPanel;
                            const uint8_t byte = format == Format::fp32 ? 0 : all.held[size_t(row) * all.stride + k];
                            if (format == Format::fp32) {
                                w = weights[size_t(out) * inputs + k], value = all.at[row][k];
                            } else if (format == Format::int8) {
                                w = double(packed.weight(out, k)) * packed.scales[out];
                                value = double(kByteZero ? int(byte) - kByteZero : int(int8_t(byte))) * all.scales[row];
                            } else {
                                const int block = k / kBlock, i = k % kBlock, quad = i / 4;
                                value = double(int8_t(byte)) * all.block_scales[size_t(row) * all.blocks() + block];
                                if (format == Format::int8_blocks) {
                                    w = packed.weight(out, k);
                                    sum += w * value, size += std::fabs(w * value);
                                    continue;
                                }
                                const uint8_t* from =
                                    packed.codes.data() + (panel * packed.blocks() + block) * kBlockBytes;
                                const int both = from[(quad % 4 * kPanel + lane) * 4 + i % 4];
                                uint16_t minimum, scale;
                                std::memcpy(&minimum, from + kCodes + lane * 2, 2);
                                std::memcpy(&scale, from + kCodes + (kPanel + lane) * 2, 2);
                                w = double(quad < 4 ? both & 15 : both >> 4) * from_half(scale) + from_half(minimum);
                            }
                            sum += w * value, size += std::fabs(w * value);
                        }
                        const double found = std::fabs(y[row * wide + out] - sum) / size;
                        if (!(found <= worst)) worst = found;
                    }
            }
        }
        const char* name = format == Format::fp32   ? "fp32"
                           : format == Format::int8 ? "int8"
                           : format == Format::int4 ? "int4"
                                                    : "int8 by blocks";
        std::string line = std::string("packed weights in ") + name;
        report(line.c_str(), worst, 1e-6);
        report((line + ", a single row and several rows: whether bits differ").c_str(), !equal, 0);
    }
}

#endif

// -- what is element-wise --------------------------------------------------------------------------------------------

static void check_functions() {
    double worst[4] = {};
    for (int step = -2000; step <= 2000; ++step) {
        const float x = step / 25.0f, positive = std::exp(x / 2);
        const double wanted[] = {std::exp(double(x)), std::log(double(positive)), 1 / (1 + std::exp(-double(x))),
                                 std::tanh(double(x))};
        const float found[] = {exp(broadcast(x))[0], log(broadcast(positive))[0], sigmoid(broadcast(x))[0],
                               tanh(broadcast(x))[0]};
        for (int i = 0; i < 4; ++i) {
            const double size = i == 0 ? wanted[i] : std::max(1.0, std::fabs(wanted[i]));
            worst[i] = std::max(worst[i], std::fabs(found[i] - wanted[i]) / size);
        }
    }
    const char* names[] = {"exp", "log", "sigmoid", "tanh"};
    for (int i = 0; i < 4; ++i) report(names[i], worst[i], 3e-7);
}

static void check_entropies() {
    const int rows = 9, columns = 83;
    const Numbers logits = random_numbers(rows * columns, 20);
    std::vector<int64_t> targets(rows);
    for (int row = 0; row < rows; ++row) targets[row] = row * 9;
    Numbers grads(rows * columns), nats(rows), d_bias(columns);
    entropies({logits.data(), targets.data(), rows, columns, 0.5f, grads.data(), nats.data(), d_bias.data()}, 2);
    Exact wanted_nats(rows), wanted(rows * columns), wanted_bias(columns);
    for (int row = 0; row < rows; ++row) {
        const float* from = logits.data() + row * columns;
        double sum = 0;
        for (int i = 0; i < columns; ++i) sum += std::exp(double(from[i]));
        wanted_nats[row] = std::log(sum) - from[targets[row]];
        for (int i = 0; i < columns; ++i) {
            wanted[row * columns + i] = 0.5 * (std::exp(double(from[i])) / sum - (i == targets[row]));
            wanted_bias[i] += wanted[row * columns + i];
        }
    }
    report("cross-entropies", error_of(nats, wanted_nats), 1e-6);
    report("their gradients", error_of(grads, wanted), 1e-6);
    report("the bias's gradient", error_of(d_bias, wanted_bias), 1e-6);
}

static void check_adamw() {
    const int count = 45;
    Numbers weights = random_numbers(count), means = random_numbers(count), squares = random_numbers(count);
    const Numbers grads = random_numbers(count);
    for (float& square : squares) square = std::fabs(square);
    Exact wanted(count);
    double sum = 0;
    for (int i = 0; i < count; ++i) {
        const double mean = 0.9 * means[i] + 0.1 * grads[i], g = grads[i];
        const double square = 0.99 * squares[i] + 0.01 * g * g;
        wanted[i] = weights[i] * 0.999 - 0.01 * mean / (std::sqrt(square) * 1.5 + 1e-8);
        sum += g * g;
    }
    report("a norm", std::fabs(norm({{const_cast<float*>(grads.data()), count}}, 2) / std::sqrt(sum) - 1), 1e-6);
    adamw({{weights.data(), grads.data(), means.data(), squares.data(), count, 0.999f, 0.01f, 1.5f}}, 0.9f, 0.99f,
          1e-8f, 2);
    report("a step of AdamW", error_of(weights, wanted), 1e-6);
}

// -- models in double ------------------------------------------------------------------------------------------------

// y (rows, outputs) = x (rows, inputs) times the transpose of w (outputs, inputs).
static Exact linear(const Exact& x, const Exact& w, int inputs) {
    const size_t rows = x.size() / inputs, outputs = w.size() / inputs;
    Exact y(rows * outputs);
    for (size_t row = 0; row < rows; ++row)
        for (size_t out = 0; out < outputs; ++out)
            for (int k = 0; k < inputs; ++k) y[row * outputs + out] += x[row * inputs + k] * w[out * inputs + k];
    return y;
}

using Arguments = std::vector<Exact>;

// The directional derivative of f at each argument, along `by`.
static Exact derivatives(const std::function<double(const Arguments&)>& f, const Arguments& at, const Arguments& by) {
    Exact found;
    const double step = 1e-5;
    for (size_t i = 0; i < by.size(); ++i) {
        Arguments more = at, less = at;
        for (size_t k = 0; k < at[i].size(); ++k) more[i][k] += step * by[i][k], less[i][k] -= step * by[i][k];
        found.push_back((f(more) - f(less)) / (2 * step));
    }
    return found;
}

static Exact exact(const Numbers& from) { return {from.begin(), from.end()}; }
template <class A, class B>
static double dot(const A& a, const B& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); ++i) sum += double(a[i]) * b[i];
    return sum;
}

// Outputs (batch, time, hidden) of a layer: x (batch, time, inputs), both weights, both biases, the first state and cell.
static Exact recurrent_layer(bool lstm, int time, int hidden, const Arguments& p) {
    const size_t batch = p[5].size() / hidden, inputs = p[0].size() / batch / time;
    Exact outputs(batch * time * hidden);
    const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
    for (size_t row = 0; row < batch; ++row) {
        Exact state(p[5].begin() + row * hidden, p[5].begin() + (row + 1) * hidden);
        Exact cell(p[6].begin() + row * hidden, p[6].begin() + (row + 1) * hidden);
        for (int step = 0; step < time; ++step) {
            const auto x = p[0].begin() + (row * time + step) * inputs;
            const Exact from_x = linear(Exact(x, x + inputs), p[1], int(inputs)), from_h = linear(state, p[2], hidden);
            for (int i = 0; i < hidden; ++i) {
                const auto a = [&](int gate) { return from_x[gate * hidden + i] + p[3][gate * hidden + i]; };
                const auto b = [&](int gate) { return from_h[gate * hidden + i] + p[4][gate * hidden + i]; };
                if (lstm) {
                    cell[i] = sigmoid(a(1) + b(1)) * cell[i] + sigmoid(a(0) + b(0)) * std::tanh(a(2) + b(2));
                    state[i] = sigmoid(a(3) + b(3)) * std::tanh(cell[i]);
                } else {
                    const double update = sigmoid(a(1) + b(1));
                    state[i] = (1 - update) * std::tanh(a(2) + sigmoid(a(0) + b(0)) * b(2)) + update * state[i];
                }
            }
            std::copy(state.begin(), state.end(), outputs.begin() + (row * time + step) * hidden);
        }
    }
    return outputs;
}

static void check_sequence(bool lstm) {
    const int batch = 7, time = 5, inputs = 19, hidden = 37, gates = lstm ? 4 : 3;
    const Numbers x = random_numbers(batch * time * inputs), w_ih = random_numbers(gates * hidden * inputs, 0.3f),
                  w_hh = random_numbers(gates * hidden * hidden, 0.3f), b_ih = random_numbers(gates * hidden),
                  b_hh = random_numbers(gates * hidden), first = random_numbers(batch * hidden),
                  cell = random_numbers(batch * hidden), r = random_numbers(batch * time * hidden);
    Numbers outputs(batch * time * hidden), last(batch * hidden), last_cell(batch * hidden),
        memory(size_t(time) * batch * (lstm ? 6 : 4) * padded(hidden));
    Numbers d_x(x.size()), d_ih(w_ih.size()), d_hh(w_hh.size()), db_ih(b_ih.size()), db_hh(b_hh.size()),
        d_first(first.size()), d_cell(cell.size());
    inkling::Sequence s;
    s.lstm = lstm, s.batch = batch, s.time = time, s.inputs = inputs, s.hidden = hidden;
    s.x = x.data(), s.x_row = time * inputs, s.x_step = inputs;
    s.weight_ih = w_ih.data(), s.weight_hh = w_hh.data(), s.bias_ih = b_ih.data(), s.bias_hh = b_hh.data();
    s.first_hidden = first.data(), s.first_cell = lstm ? cell.data() : nullptr;
    s.outputs = outputs.data(), s.last_hidden = last.data(), s.last_cell = lstm ? last_cell.data() : nullptr;
    s.memory = memory.data();
    forward(s, 2);
    const Arguments at{exact(x), exact(w_ih), exact(w_hh), exact(b_ih), exact(b_hh), exact(first), exact(cell)};
    const std::string name = lstm ? "LSTM" : "GRU";
    report((name + ", outputs").c_str(), error_of(outputs, recurrent_layer(lstm, time, hidden, at)),
           kRounds ? 2e-2 : 2e-6);
    s.d_outputs = r.data(), s.d_row = time * hidden, s.d_step = hidden;
    s.d_x = d_x.data(), s.d_first_hidden = d_first.data(), s.d_first_cell = lstm ? d_cell.data() : nullptr;
    s.d_weight_ih = d_ih.data(), s.d_weight_hh = d_hh.data(), s.d_bias_ih = db_ih.data(), s.d_bias_hh = db_hh.data();
    backward(s, 2);
    const std::vector<const Numbers*> grads{&d_x, &d_ih, &d_hh, &db_ih, &db_hh, &d_first, &d_cell};
    Arguments by;
    Exact found;
    for (const Numbers* each : grads) {
        by.push_back(exact(random_numbers(each->size())));
        found.push_back(dot(*each, by.back()));
    }
    report((name + ", gradients").c_str(),
           error_of(found, derivatives([&](const Arguments& p) { return dot(r, recurrent_layer(lstm, time, hidden, p)); },
                                       at, by)),
           kRounds ? 3e-2 : 1e-5);
}

struct Shape {
    int size, heads, kv_heads, width, inner;
    double epsilon;
};

static Exact normed(const Exact& x, const Exact& weight, double epsilon) {
    Exact y = x;
    const size_t width = weight.size();
    for (size_t row = 0; row < x.size(); row += width) {
        double sum = 0;
        for (size_t i = 0; i < width; ++i) sum += x[row + i] * x[row + i];
        for (size_t i = 0; i < width; ++i) y[row + i] *= weight[i] / std::sqrt(sum / width + epsilon);
    }
    return y;
}

static double angle(int position, int i, int half) { return position * std::pow(100.0, -double(i) / half); }

// One text (time, size) through a block; p: x, input norm, query, key, value, their norms, output, norm, gate, up, down.
static Exact block_of(const Shape& s, const Arguments& p) {
    const int time = int(p[0].size()) / s.size, half = s.width / 2;
    const Exact from = normed(p[0], p[1], s.epsilon);
    Exact q = linear(from, p[2], s.size), k = linear(from, p[3], s.size);
    const Exact v = linear(from, p[4], s.size);
    const auto rotate = [&](Exact& x, const Exact& weight, int heads) {
        x = normed(x, weight, s.epsilon);
        for (int row = 0; row < time * heads; ++row)
            for (int i = 0; i < half; ++i) {
                double &a = x[row * s.width + i], &b = x[row * s.width + half + i];
                const double by = angle(row / heads, i, half), first = a;
                a = first * std::cos(by) - b * std::sin(by), b = b * std::cos(by) + first * std::sin(by);
            }
    };
    rotate(q, p[5], s.heads), rotate(k, p[6], s.kv_heads);
    Exact mixed(q.size());
    for (int t = 0; t < time; ++t)
        for (int head = 0; head < s.heads; ++head) {
            const int group = head / (s.heads / s.kv_heads);
            const double* query = &q[(t * s.heads + head) * s.width];
            Exact shares(t + 1);
            double sum = 0;
            for (int u = 0; u <= t; ++u) {
                double score = 0;
                for (int i = 0; i < s.width; ++i) score += query[i] * k[(u * s.kv_heads + group) * s.width + i];
                sum += shares[u] = std::exp(score / std::sqrt(double(s.width)));
            }
            for (int u = 0; u <= t; ++u)
                for (int i = 0; i < s.width; ++i)
                    mixed[(t * s.heads + head) * s.width + i] +=
                        shares[u] / sum * v[(u * s.kv_heads + group) * s.width + i];
        }
    Exact between = linear(mixed, p[7], s.heads * s.width);
    for (size_t i = 0; i < between.size(); ++i) between[i] += p[0][i];
    const Exact again = normed(between, p[8], s.epsilon);
    Exact gate = linear(again, p[9], s.size);
    const Exact up = linear(again, p[10], s.size);
    for (size_t i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
    Exact y = linear(gate, p[11], s.inner);
    for (size_t i = 0; i < y.size(); ++i) y[i] += between[i];
    return y;
}

// The weights of a block: all of p but x.
static std::vector<Numbers> block_weights(const Shape& s) {
    const int q = s.heads * s.width, kv = s.kv_heads * s.width;
    std::vector<Numbers> p;
    for (const int count : {s.size, q * s.size, kv * s.size, kv * s.size, s.width, s.width, s.size * q, s.size,
                            s.inner * s.size, s.inner * s.size, s.size * s.inner}) {
        p.push_back(random_numbers(count, 0.3f));
        if (count == s.size || count == s.width)
            for (float& weight : p.back()) weight += 1;
    }
    return p;
}

static void check_block() {
    const Shape shape{48, 4, 2, 12, 40, 1e-5};
    const int batch = 2, time = 70, half = shape.width / 2, rows = batch * time;
    const Numbers x = random_numbers(rows * shape.size);
    const std::vector<Numbers> w = block_weights(shape);
    Numbers cosines(rows * half), sines(rows * half);
    for (int row = 0; row < rows; ++row)
        for (int i = 0; i < half; ++i) {
            cosines[row * half + i] = float(std::cos(angle(row % time, i, half)));
            sines[row * half + i] = float(std::sin(angle(row % time, i, half)));
        }
    inkling::BlockPass b;
    b.batch = batch, b.time = time, b.size = shape.size, b.heads = shape.heads, b.kv_heads = shape.kv_heads;
    b.width = shape.width, b.inner = shape.inner, b.epsilon = float(shape.epsilon);
    b.x = x.data(), b.cosines = cosines.data(), b.sines = sines.data();
    const float** weights[] = {&b.input_norm, &b.query, &b.key, &b.value, &b.query_norm, &b.key_norm,
                               &b.output, &b.mlp_norm, &b.gate, &b.up, &b.down};
    for (size_t i = 0; i < w.size(); ++i) *weights[i] = w[i].data();
    const size_t shared = size_t(rows) * shape.kv_heads * shape.width;
    Numbers y(x.size()), keys(shared), values(shared), memory(block_memory(b)), d_keys(shared), d_values(shared);
    b.y = y.data(), b.keys = keys.data(), b.values = values.data(), b.memory = memory.data();
    block(b, 2);
    Arguments at{exact(x)};
    for (const Numbers& each : w) at.push_back(exact(each));
    const auto whole = [&](const Arguments& p) {
        Exact all;
        for (int text = 0; text < batch; ++text) {
            Arguments part = p;
            part[0] = Exact(p[0].begin() + text * time * shape.size, p[0].begin() + (text + 1) * time * shape.size);
            const Exact one = block_of(shape, part);
            all.insert(all.end(), one.begin(), one.end());
        }
        return all;
    };
    report("a block of a Transformer, outputs", error_of(y, whole(at)), kRounds ? 2e-2 : 3e-6);

    const Numbers r = random_numbers(y.size());
    std::vector<Numbers> grads{Numbers(x.size())};
    for (const Numbers& each : w) grads.emplace_back(each.size());
    float** targets[] = {&b.dx, &b.d_input_norm, &b.d_query, &b.d_key, &b.d_value, &b.d_query_norm, &b.d_key_norm,
                        &b.d_output, &b.d_mlp_norm, &b.d_gate, &b.d_up, &b.d_down};
    for (size_t i = 0; i < grads.size(); ++i) *targets[i] = grads[i].data();
    b.dy = r.data(), b.d_keys = d_keys.data(), b.d_values = d_values.data();
    block(b, 2);
    Arguments by;
    Exact found;
    for (const Numbers& each : grads) {
        by.push_back(exact(random_numbers(each.size())));
        found.push_back(dot(each, by.back()));
    }
    report("a block of a Transformer, gradients",
           error_of(found, derivatives([&](const Arguments& p) { return dot(r, whole(p)); }, at, by)),
           kRounds ? 3e-2 : 1e-5);
}

#if !defined(INKLING_BF16)

// -- decoding --------------------------------------------------------------------------------------------------------

static const std::vector<int> kIds{3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4};

// Logits after each token, read at once and in single steps, which must be the same bits; against `wanted`.
static void check_kernel(const std::string& name, inkling::Kernel& kernel, const Exact& wanted, double most) {
    const size_t count = kIds.size(), vocabulary = kernel.vocab_size;
    Numbers all(count * vocabulary), stepped(all.size());
    kernel.read(1, kIds.data(), int(count), all.data());
    const int slot = 0;
    for (size_t i = 0; i < count; ++i) {
        kernel.step(&slot, &kIds[i], 1);
        std::memcpy(&stepped[i * vocabulary], kernel.logits, vocabulary * 4);
    }
    report((name + ", logits").c_str(), error_of(all, wanted), most);
    report((name + ", a text at once and token by token: whether bits differ").c_str(), !same_bits(all, stepped), 0);
}

static inkling::Matrix matrix(const Numbers& from, int columns) {
    return {from.data(), int(from.size()) / columns, columns};
}
static inkling::StoredMatrix stored(const Numbers& from, int columns) {
    return {from.data(), false, int(from.size()) / columns, columns};
}

static void check_recurrent(bool lstm) {
    const int vocabulary = 10, embedded = 21, hidden = 45, gates = lstm ? 4 : 3, count = int(kIds.size());
    const Numbers embedding = random_numbers(vocabulary * embedded), head = random_numbers(vocabulary * hidden);
    inkling::RecurrentParts parts;
    parts.cell = lstm ? "lstm" : "gru";
    parts.embedding = matrix(embedding, embedded);
    Exact at;
    for (const int id : kIds)
        at.insert(at.end(), embedding.begin() + id * embedded, embedding.begin() + (id + 1) * embedded);
    std::vector<Numbers> kept;
    for (int layer = 0; layer < 2; ++layer) {
        const int inputs = layer ? hidden : embedded;
        for (const int size : {inputs, hidden, 1, 1}) kept.push_back(random_numbers(gates * hidden * size, 0.3f));
        const auto of = [&](int i) -> const Numbers& { return kept[layer * 4 + i]; };
        at = recurrent_layer(lstm, count, hidden, {at, exact(of(0)), exact(of(1)), exact(of(2)), exact(of(3)),
                                                   Exact(hidden), Exact(hidden)});
    }
    for (int layer = 0; layer < 2; ++layer)
        parts.layers.push_back({matrix(kept[layer * 4], layer ? hidden : embedded), matrix(kept[layer * 4 + 1], hidden),
                                kept[layer * 4 + 2].data(), kept[layer * 4 + 3].data()});
    parts.heads.push_back({matrix(head, hidden), nullptr});
    const Exact wanted = linear(at, exact(head), hidden);
    for (const bool int8 : {false, true}) {
        inkling::Settings settings;
        settings.slots = 3, settings.threads = 2, settings.format = int8 ? Format::int8 : Format::fp32;
        const std::unique_ptr<inkling::Kernel> kernel(recurrent(parts, settings));
        check_kernel(std::string(lstm ? "LSTM" : "GRU") + " of two layers, " + (int8 ? "int8" : "fp32"), *kernel, wanted,
                     int8 ? 5e-2 : 3e-6);
    }
}

static void check_transformer() {
    const Shape shape{40, 6, 2, 10, 52, 1e-5};
    const int vocabulary = 10, context = 32, half = shape.width / 2;
    const Numbers embedding = random_numbers(vocabulary * shape.size), head = random_numbers(vocabulary * shape.size);
    const Numbers last_norm = random_numbers(shape.size);
    const std::vector<Numbers> blocks[] = {block_weights(shape), block_weights(shape)};
    Numbers cosines(context * half), sines(context * half);
    for (int i = 0; i < context * half; ++i) {
        cosines[i] = float(std::cos(angle(i / half, i % half, half)));
        sines[i] = float(std::sin(angle(i / half, i % half, half)));
    }
    inkling::TransformerParts parts;
    parts.embedding = stored(embedding, shape.size), parts.head = stored(head, shape.size);
    parts.norm = last_norm.data(), parts.cosines = matrix(cosines, half), parts.sines = matrix(sines, half);
    parts.heads = shape.heads, parts.kv_heads = shape.kv_heads, parts.epsilon = float(shape.epsilon);
    Exact x;
    for (const int id : kIds)
        x.insert(x.end(), embedding.begin() + id * shape.size, embedding.begin() + (id + 1) * shape.size);
    for (const auto& w : blocks) {
        inkling::Block block;
        const auto of = [&](int i, int columns) { return stored(w[i], columns); };
        block.query = of(1, shape.size), block.key = of(2, shape.size), block.value = of(3, shape.size);
        block.output = of(6, shape.heads * shape.width);
        block.gate = of(8, shape.size), block.up = of(9, shape.size), block.down = of(10, shape.inner);
        block.input_norm = w[0].data(), block.query_norm = w[4].data(), block.key_norm = w[5].data();
        block.mlp_norm = w[7].data();
        parts.blocks.push_back(block);
        Arguments p{x};
        for (const Numbers& each : w) p.push_back(exact(each));
        x = block_of(shape, p);
    }
    const Exact wanted = linear(normed(x, exact(last_norm), shape.epsilon), exact(head), shape.size);
    for (int bits : {32, 8, 4}) {
        inkling::Settings settings;
        settings.slots = 3, settings.threads = 2, settings.format = bits == 32 ? Format::fp32 : bits == 8 ? Format::int8 : Format::int4;
        const std::unique_ptr<inkling::Kernel> kernel(transformer(parts, settings));
        check_kernel("Transformer of two blocks, weights of " + std::to_string(bits) + " bits", *kernel, wanted,
                     bits == 32 ? 5e-6 : bits == 8 ? 5e-2 : 0.5);
    }
}

#endif

int main(int count, char** words) {
    if (count > 1 && std::strcmp(words[1], "features") == 0) {
#if defined(__aarch64__)
        if (inkling::has_neon_dotprod()) std::puts("neon_dotprod");
        if (inkling::has_neon_bf16()) std::puts("neon_bf16");
#endif
        return 0;
    }
    std::setvbuf(stdout, nullptr, _IOLBF, 0);  // so that the lines so far are printed if the program crashes
    check_products();
    check_functions();
    check_entropies();
    check_adamw();
    check_sequence(false);
    check_sequence(true);
    check_block();
#if !defined(INKLING_BF16)
    check_packed();
    check_recurrent(false);
    check_recurrent(true);
    check_transformer();
#endif
    std::printf("%d failed\n", failures);
    return failures ? 1 : 0;
}
