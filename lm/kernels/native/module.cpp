// The Python module lm.kernels._native: kernels made from numpy arrays, called with lists of ints.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "features.hpp"
#include "kernel.hpp"
#include "rows.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using inkling::Kernel;

#define DECLARE(isa)                                                                              \
    namespace isa {                                                                               \
    Kernel* recurrent(const inkling::RecurrentParts&, const inkling::Settings&);                  \
    Kernel* transformer(const inkling::TransformerParts&, const inkling::Settings&);              \
    Kernel* ngram(const inkling::Counts&, const inkling::Settings&);                              \
    void product(const inkling::Operands&, int threads);                                          \
    void drop(const float* from, float* to, int64_t count, uint64_t seed, float rate, int threads);   \
    void attention(const inkling::Attention&, int threads);                                       \
    void norms(const inkling::Norms&, int threads);                                               \
    void gated(const float* gate, const float* up, const float* dy, int64_t count, float* y, float* d_up, int threads); \
    void entropies(const inkling::Entropies&, int threads);                                                             \
    void look_up(const inkling::LookUp&, int threads);                                                                  \
    double norm(const std::vector<inkling::Floats>&, int threads);                                                      \
    void scale(const std::vector<inkling::Floats>&, float factor, int threads);                                         \
    void adamw(const std::vector<inkling::Adam>&, float beta1, float beta2, float epsilon, int threads);                \
    void forward(const inkling::Sequence&, int threads);                                          \
    void backward(const inkling::Sequence&, int threads);                                         \
    size_t block_memory(const inkling::BlockPass&);                                               \
    void block(const inkling::BlockPass&, int threads);                                           \
    void share_rows(int64_t rows, int64_t width, int threads, void (*work)(void*, int64_t, int64_t), void* with); \
    }
DECLARE(inkling_plain)
#if defined(INKLING_X86)
DECLARE(inkling_avx2)
DECLARE(inkling_avx512)
#endif
#if defined(INKLING_ARM)
DECLARE(inkling_neon_dotprod)
#endif
#if defined(INKLING_ARM_BF16)
DECLARE(inkling_neon_bf16)
#endif
#if defined(INKLING_AVX512_BF16)
DECLARE(inkling_avx512_bf16)
#endif
#if defined(INKLING_AMX_BF16)
DECLARE(inkling_amx_bf16)
#endif
DECLARE(inkling_amx_emulated)

#if defined(INKLING_X86)
#define CALL_NATIVE(isa, function, ...)                       \
    isa == "avx512" ? inkling_avx512::function(__VA_ARGS__)   \
    : isa == "avx2" ? inkling_avx2::function(__VA_ARGS__)     \
    :
#elif defined(INKLING_ARM)
#define CALL_NATIVE(isa, function, ...) isa == "neon_dotprod" ? inkling_neon_dotprod::function(__VA_ARGS__) :
#else
#define CALL_NATIVE(isa, function, ...)
#endif
#if defined(INKLING_AVX512_BF16)
#define CALL_AVX512_BF16(isa, function, ...) isa == "avx512_bf16" ? inkling_avx512_bf16::function(__VA_ARGS__) :
#else
#define CALL_AVX512_BF16(isa, function, ...)
#endif
#if defined(INKLING_AMX_BF16)
#define CALL_AMX_BF16(isa, function, ...) isa == "amx_bf16" ? inkling_amx_bf16::function(__VA_ARGS__) :
#else
#define CALL_AMX_BF16(isa, function, ...)
#endif
#if defined(INKLING_ARM_BF16)
#define CALL_ARM_BF16(isa, function, ...) isa == "neon_bf16" ? inkling_neon_bf16::function(__VA_ARGS__) :
#else
#define CALL_ARM_BF16(isa, function, ...)
#endif
// Calls `function` of an instruction set; one that computes in fp32.
#define CALL_FP32(isa, function, ...) (CALL_NATIVE(isa, function, __VA_ARGS__) inkling_plain::function(__VA_ARGS__))
// Calls `function` of an instruction set that decodes.
#define CALL_DECODING(isa, function, ...) \
    (CALL_AVX512_BF16(isa, function, __VA_ARGS__) CALL_FP32(isa, function, __VA_ARGS__))
#define CALL(isa, function, ...)                                                                                  \
    (CALL_AVX512_BF16(isa, function, __VA_ARGS__) CALL_AMX_BF16(isa, function, __VA_ARGS__)                       \
     CALL_ARM_BF16(isa, function, __VA_ARGS__) isa == "amx_emulated"                                              \
         ? inkling_amx_emulated::function(__VA_ARGS__)                                                            \
         : CALL_FP32(isa, function, __VA_ARGS__))

inkling::Kernel::~Kernel() = default;

namespace {

using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using MaybeFloats = std::optional<Floats>;

// The instruction sets that this machine has, best first.
std::vector<std::string> instruction_sets() {
    std::vector<std::string> found;
#if defined(INKLING_X86)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni"))
        found.push_back("avx512");
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && inkling::has_f16c())
        found.push_back("avx2");
#elif defined(INKLING_ARM)
    if (inkling::has_neon_dotprod()) found.push_back("neon_dotprod");
#endif
    found.push_back("plain");
    return found;
}

// Those that multiply in bf16, best first; AMX is for training alone.
std::vector<std::string> bf16_instruction_sets() {
    std::vector<std::string> found;
#if defined(INKLING_AMX_BF16)
    if (inkling::has_avx512_bf16() && inkling::has_amx_bf16()) found.push_back("amx_bf16");
#endif
#if defined(INKLING_AVX512_BF16)
    if (inkling::has_avx512_bf16()) found.push_back("avx512_bf16");
#endif
#if defined(INKLING_ARM_BF16)
    if (inkling::has_neon_bf16()) found.push_back("neon_bf16");
#endif
    return found;
}

template <class T, int Axes>
using Array = nb::ndarray<T, nb::ndim<Axes>, nb::c_contig, nb::device::cpu>;

inkling::Matrix matrix(const Floats& from) {
    if (from.ndim() != 2) throw std::invalid_argument("a matrix has two axes");
    return {from.data(), int(from.shape(0)), int(from.shape(1))};
}
const float* vector(const MaybeFloats& from, size_t size) {
    if (!from) return nullptr;
    if (from->ndim() != 1 || from->shape(0) != size) throw std::invalid_argument("a vector has the wrong length");
    return from->data();
}

using Stored = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

inkling::StoredMatrix stored(const Stored& from) {
    const auto type = from.dtype();
    const bool whole = type == nb::dtype<float>();
    const bool half = type.code == uint8_t(nb::dlpack::dtype_code::Float) && type.bits == 16 && type.lanes == 1;
    if (from.ndim() != 2 || !(whole || half)) throw std::invalid_argument("a matrix has two axes of float32 or float16");
    return {from.data(), half, int(from.shape(0)), int(from.shape(1))};
}

// Shapes are checked here once: the kernels rely on them.
template <class AnyMatrix>
void expect(const AnyMatrix& found, int rows, int columns, const char* name) {
    if (found.rows != rows || found.columns != columns)
        throw std::invalid_argument(std::string(name) + " is (" + std::to_string(found.rows) + ", " +
                                    std::to_string(found.columns) + ") and not (" + std::to_string(rows) + ", " +
                                    std::to_string(columns) + ")");
}

inkling::Format format_of(const std::string& precision) {
    if (precision == "fp32") return inkling::Format::fp32;
    if (precision == "bf16") return inkling::Format::bf16;
    if (precision == "int8") return inkling::Format::int8;
    if (precision == "int4") return inkling::Format::int4;
    throw std::invalid_argument(precision + " is no format of weights");
}

template <class Parts>
Kernel* make(const Parts& parts, const inkling::Settings& settings, const std::string& isa) {
    const auto available = instruction_sets(), in_bf16 = bf16_instruction_sets();
    const bool has_bf16 = isa == "avx512_bf16" && std::find(in_bf16.begin(), in_bf16.end(), isa) != in_bf16.end();
    if (!has_bf16 && std::find(available.begin(), available.end(), isa) == available.end())
        throw std::invalid_argument(isa + " is not available");
    if constexpr (std::is_same_v<Parts, inkling::RecurrentParts>)
        return CALL_DECODING(isa, recurrent, parts, settings);
    else if constexpr (std::is_same_v<Parts, inkling::Counts>)
        return CALL_DECODING(isa, ngram, parts, settings);
    else
        return CALL_DECODING(isa, transformer, parts, settings);
}

// Order and weights of each context table, orders rising.
using Tables = std::vector<std::tuple<int, Floats>>;

std::vector<inkling::Table> context_tables(const Tables& tables, int buckets, int vocab_size) {
    std::vector<inkling::Table> found;
    for (const auto& [order, weight] : tables) {
        if (order < 2 || (!found.empty() && order <= found.back().order))
            throw std::invalid_argument("tables come by rising order, from 2 on");
        int64_t rows = 1;
        for (int i = 1; i < order && rows <= buckets; ++i) rows *= vocab_size;
        const bool hashed = rows > buckets;
        found.push_back({order, hashed, matrix(weight)});
        expect(found.back().weight, (hashed ? buckets : int(rows)) + 1, vocab_size, "a context table");
    }
    return found;
}

Kernel* recurrent(const std::string& cell, const Floats& embedding,
                  const std::vector<std::tuple<Floats, Floats, Floats, Floats>>& layers,
                  const std::vector<std::tuple<Floats, MaybeFloats>>& heads, const Tables& tables, int buckets, int slots,
                  int threads, const std::string& precision, const std::string& isa, const inkling::Counts* counts,
                  const MaybeFloats& gate, float gate_bias) {
    inkling::RecurrentParts parts;
    parts.cell = cell;
    parts.embedding = matrix(embedding);
    for (const auto& [input, hidden, input_bias, hidden_bias] : layers) {
        inkling::Layer layer{matrix(input), matrix(hidden)};
        layer.input_bias = vector(input_bias, input.shape(0));
        layer.hidden_bias = vector(hidden_bias, hidden.shape(0));
        parts.layers.push_back(layer);
    }
    for (const auto& [weight, bias] : heads) parts.heads.push_back({matrix(weight), vector(bias, weight.shape(0))});
    if (parts.layers.empty() || parts.heads.empty()) throw std::invalid_argument("no layers or no head");
    const int gates = cell == "gru" ? 3 : cell == "lstm" ? 4 : 1, hidden = parts.layers[0].hidden.columns;
    int inputs = parts.embedding.columns;
    for (const auto& layer : parts.layers) {
        expect(layer.input, gates * hidden, inputs, "an input gate matrix");
        expect(layer.hidden, gates * hidden, hidden, "a hidden gate matrix");
        inputs = hidden;
    }
    for (const auto& head : parts.heads) {
        expect(head.weight, head.weight.rows, inputs, "an output matrix");
        inputs = head.weight.rows;
    }
    if (inputs != parts.embedding.rows) throw std::invalid_argument("the logits do not cover the vocabulary");
    parts.tables = context_tables(tables, buckets, parts.embedding.rows);
    if (counts) {
        parts.mixture = {counts, vector(gate, hidden + 1), gate_bias};
        if (!parts.mixture.gate) throw std::invalid_argument("a gate is missing");
        if (counts->vocab_size() != parts.embedding.rows) throw std::invalid_argument("the counts do not fit the vocabulary");
    }
    nb::gil_scoped_release release;
    return make(parts, {slots, threads, format_of(precision)}, isa);
}

Kernel* transformer(const Stored& embedding, const Stored& head, const Floats& norm,
                    const std::vector<std::tuple<std::vector<Stored>, std::vector<MaybeFloats>, MaybeFloats>>& blocks,
                    const Floats& cosines, const Floats& sines, int heads, int kv_heads, float epsilon,
                    const Tables& tables, int buckets, int slots, int threads, const std::string& precision,
                    const std::string& isa) {
    inkling::TransformerParts parts;
    parts.embedding = stored(embedding);
    parts.head = stored(head);
    parts.norm = vector(norm, embedding.shape(1));
    parts.cosines = matrix(cosines);
    parts.sines = matrix(sines);
    parts.heads = heads;
    parts.kv_heads = kv_heads;
    parts.epsilon = epsilon;
    for (const auto& [matrices, norms, bias] : blocks) {
        if (matrices.size() != 7 || norms.size() != 4) throw std::invalid_argument("a block has 7 matrices, 4 norms");
        inkling::Block block;
        inkling::StoredMatrix* targets[] = {&block.query,  &block.key, &block.value, &block.output,
                                     &block.gate,   &block.up,  &block.down};
        for (int i = 0; i < 7; ++i) *targets[i] = stored(matrices[i]);
        const size_t head_size = 2 * cosines.shape(1);
        const int size = parts.embedding.columns, mixed = heads * int(head_size), kept = kv_heads * int(head_size);
        expect(block.query, mixed, size, "q_proj");
        expect(block.key, kept, size, "k_proj");
        expect(block.value, kept, size, "v_proj");
        expect(block.output, size, mixed, "o_proj");
        expect(block.gate, block.down.columns, size, "gate_proj");
        expect(block.up, block.down.columns, size, "up_proj");
        expect(block.down, size, block.down.columns, "down_proj");
        block.input_norm = vector(norms[0], embedding.shape(1));
        block.mlp_norm = vector(norms[1], embedding.shape(1));
        block.query_norm = vector(norms[2], head_size);
        block.key_norm = vector(norms[3], head_size);
        block.bias = vector(bias, mixed + 2 * kept);
        parts.blocks.push_back(block);
    }
    expect(parts.head, parts.embedding.rows, parts.embedding.columns, "lm_head");
    expect(parts.sines, parts.cosines.rows, parts.cosines.columns, "the sines");
    if (parts.blocks.empty() || heads < 1 || kv_heads < 1 || heads % kv_heads || parts.cosines.rows < 2)
        throw std::invalid_argument("blocks, heads or context do not fit");
    if (std::any_of(parts.blocks.begin(), parts.blocks.end(),
                    [](const auto& block) { return !block.input_norm || !block.mlp_norm; }))
        throw std::invalid_argument("a norm is missing");
    parts.tables = context_tables(tables, buckets, parts.embedding.rows);
    nb::gil_scoped_release release;
    return make(parts, {slots, threads, format_of(precision)}, isa);
}

Kernel* ngram(const inkling::Counts& counts, int slots, int threads, const std::string& precision,
              const std::string& isa) {
    return make(counts, {slots, threads, format_of(precision)}, isa);
}

void check(const Kernel& kernel, const std::vector<int>& slots, const std::vector<int>& ids) {
    for (int slot : slots)
        if (slot < 0 || slot >= kernel.slots) throw std::out_of_range("no such slot");
    for (int id : ids)
        if (id < 0 || id >= kernel.vocab_size) throw std::out_of_range("token outside the vocabulary");
}

// The tokens of one step are computed side by side, so two of one slot would run over the end of its cache.
void check_different(const Kernel& kernel, const std::vector<int>& slots) {
    if (slots.size() < 2) return;
    std::vector<bool> seen(kernel.slots);
    for (int slot : slots) {
        if (seen[slot]) throw std::invalid_argument("slot " + std::to_string(slot) + " occurs twice in one step");
        seen[slot] = true;
    }
}

// Below this much work releasing the GIL costs more than it gains.
constexpr size_t kShort = 400'000;

void step_slots(Kernel& kernel, const std::vector<int>& slots, const std::vector<int>& ids) {
    check(kernel, slots, ids);
    check_different(kernel, slots);
    if (slots.size() != ids.size() || int(slots.size()) > kernel.slots) throw std::invalid_argument("one id a slot");
    if (slots.size() * kernel.weight_bytes < kShort) {
        kernel.step(slots.data(), ids.data(), int(slots.size()));
    } else {
        nb::gil_scoped_release release;
        kernel.step(slots.data(), ids.data(), int(slots.size()));
    }
}

void read_text(Kernel& kernel, int slot, const std::vector<int>& ids,
          std::optional<nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>> all) {
    check(kernel, {slot}, ids);
    if (all && (all->shape(0) != ids.size() || int(all->shape(1)) != kernel.vocab_size))
        throw std::invalid_argument("one row of logits an id");
    float* out = all ? all->data() : nullptr;
    nb::gil_scoped_release release;
    kernel.read(slot, ids.data(), int(ids.size()), out);
}

nb::dict views(nb::handle self) {
    nb::dict found;
    for (const auto& [name, view] : nb::cast<Kernel&>(self).views) {
        if (view.integer)
            found[name.c_str()] =
                nb::ndarray<nb::numpy, int32_t>(view.data, view.shape.size(), view.shape.data(), self).cast();
        else
            found[name.c_str()] =
                nb::ndarray<nb::numpy, float>(view.data, view.shape.size(), view.shape.data(), self).cast();
    }
    return found;
}

// -- training ------------------------------------------------------------------------------------------------------

using inkling::Sequence;

// Refuses numbers that are negative or not below `bound`.
void all_below(const int64_t* numbers, int64_t count, int64_t bound, const char* message) {
    for (int64_t i = 0; i < count; ++i)
        if (uint64_t(numbers[i]) >= uint64_t(bound)) throw std::out_of_range(message);
}
constexpr const char* kNoSuchId = "an id lies outside the embedding";

void run_forward(const Sequence& sequence, const std::string& isa, int threads) {
    nb::gil_scoped_release release;
    if (sequence.ids)
        all_below(sequence.ids, int64_t(sequence.batch) * sequence.time, sequence.vocab_size, kNoSuchId);
    CALL(isa, forward, sequence, threads);
}

void run_backward(const Sequence& sequence, const std::string& isa, int threads) {
    nb::gil_scoped_release release;
    CALL(isa, backward, sequence, threads);
}

void product(uintptr_t a, int64_t a_step, bool a_transposed, uintptr_t b, int64_t b_step, bool b_transposed,
             uintptr_t c, int64_t c_step, std::tuple<int, int, int> shape, bool add, uintptr_t bias,
             const std::string& isa, int threads) {
    const auto [rows, depth, columns] = shape;
    const auto at = [](uintptr_t address) { return reinterpret_cast<const float*>(address); };
    nb::gil_scoped_release release;
    CALL(isa, product,
         {at(a), a_step, a_transposed, at(b), b_step, b_transposed, reinterpret_cast<float*>(c), c_step, rows, depth,
          columns, add, at(bias)},
         threads);
}

void drop(uintptr_t from, uintptr_t to, int64_t count, uint64_t seed, float rate, const std::string& isa,
          int threads) {
    nb::gil_scoped_release release;
    CALL(isa, drop, reinterpret_cast<const float*>(from), reinterpret_cast<float*>(to), count, seed, rate, threads);
}


void row_adagrad(const Array<float, 2>& weights, const Array<float, 2>& squares, const Array<const int64_t, 1>& rows,
                 const Array<const float, 2>& grads, float rate) {
    const size_t count = rows.shape(0), width = weights.shape(1);
    if (grads.shape(0) != count || grads.shape(1) != width || squares.shape(0) != weights.shape(0) ||
        squares.shape(1) != 1)
        throw std::invalid_argument("gradients or squares do not fit the weights");
    all_below(rows.data(), int64_t(count), int64_t(weights.shape(0)), "no such row");
    nb::gil_scoped_release release;
    inkling::row_adagrad(weights.data(), squares.data(), rows.data(), grads.data(), int(count), int(width), rate);
}

// Keys, starts, tokens, shares and backoff weights of a level of counts; then counts, totals and discounts, or none.
template <class T>
using Row = Array<const T, 1>;
using Level = std::tuple<Row<int64_t>, Row<int64_t>, Row<uint32_t>, Row<float>, Row<double>,
                         std::optional<std::tuple<Row<uint32_t>, Row<double>, Row<double>>>>;

void make_counts(inkling::Counts* at, const std::vector<Level>& levels, int vocab_size) {
    std::vector<inkling::CountLevel> parts;
    for (const auto& [keys, starts, tokens, shares, backoff, raw] : levels) {
        const size_t contexts = keys.shape(0), pairs = tokens.shape(0);
        bool fits = starts.shape(0) == contexts + 1 && shares.shape(0) == pairs && backoff.shape(0) == contexts;
        inkling::CountLevel part;
        part.contexts = int64_t(contexts);
        part.pairs = int64_t(pairs);
        part.keys = keys.data();
        part.starts = starts.data();
        part.tokens = tokens.data();
        part.shares = shares.data();
        part.backoff = backoff.data();
        if (raw) {
            const auto& [counts, totals, discount] = *raw;
            fits &= counts.shape(0) == pairs && totals.shape(0) == contexts && discount.shape(0) == 4;
            part.counts = counts.data();
            part.totals = totals.data();
            part.discount = discount.data();
        }
        if (!fits) throw std::invalid_argument("the arrays of counts do not fit together");
        parts.push_back(part);
    }
    nb::gil_scoped_release release;
    new (at) inkling::Counts(parts, vocab_size);
}

constexpr const char* kNoSuchToken = "a token lies outside the counts' vocabulary";

// work(begin, end) for rows that take about as long as reading `width` numbers, divided among threads.
template <class Work>
void share_rows(int64_t rows, int64_t width, const std::string& isa, int threads, const Work& work) {
    CALL(isa, share_rows, rows, width, threads,
         [](void* with, int64_t begin, int64_t end) { (*static_cast<const Work*>(with))(begin, end); },
         const_cast<Work*>(&work));
}

void distributions(const inkling::Counts& counts, const Array<const int64_t, 2>& histories,
                   const std::optional<Row<int64_t>>& left_out, const Array<float, 2>& out, const std::string& isa,
                   int threads) {
    const int64_t rows = int64_t(histories.shape(0));
    if (int64_t(histories.shape(1)) != counts.context_size() || int64_t(out.shape(0)) != rows ||
        int64_t(out.shape(1)) != counts.vocab_size() || (left_out && int64_t(left_out->shape(0)) != rows))
        throw std::invalid_argument("histories, tokens and result do not fit the counts");
    if (left_out) {
        if (!counts.can_leave_out()) throw std::invalid_argument("these counts cannot leave out an occurrence");
        all_below(left_out->data(), rows, counts.vocab_size(), kNoSuchToken);
    }
    const int64_t *from = histories.data(), *without = left_out ? left_out->data() : nullptr;
    float* to = out.data();
    nb::gil_scoped_release release;
    share_rows(rows, counts.vocab_size() + 256, isa, threads,
               [&](int64_t begin, int64_t end) { counts.distributions(from, without, begin, end, to); });
}

void log_probabilities(const inkling::Counts& counts, const Row<int64_t>& ids, const Array<double, 1>& out,
                       const std::string& isa, int threads) {
    const int64_t rows = int64_t(out.shape(0));
    if (int64_t(ids.shape(0)) != rows + 1) throw std::invalid_argument("one more token than results");
    all_below(ids.data(), rows + 1, counts.vocab_size(), kNoSuchToken);
    const int64_t* from = ids.data();
    double* to = out.data();
    nb::gil_scoped_release release;
    share_rows(rows, 256, isa, threads,
               [&](int64_t begin, int64_t end) { counts.log_probabilities(from, begin, end, to); });
}

void norms(int64_t rows, int heads, int width, float epsilon, std::vector<uintptr_t> at, const std::string& isa,
           int threads) {
    if (at.size() != 9) throw std::invalid_argument("nine addresses");
    const auto read = [&](int i) { return reinterpret_cast<const float*>(at[i]); };
    const auto write = [&](int i) { return reinterpret_cast<float*>(at[i]); };
    nb::gil_scoped_release release;
    CALL(isa, norms,
         {rows, heads, width, epsilon, read(0), read(1), read(2), read(3), write(4), write(5), read(6),
          write(7), write(8)},
         threads);
}

void gated(uintptr_t gate, uintptr_t up, uintptr_t dy, int64_t count, uintptr_t y, uintptr_t d_up,
           const std::string& isa, int threads) {
    const auto at = [](uintptr_t address) { return reinterpret_cast<const float*>(address); };
    nb::gil_scoped_release release;
    CALL(isa, gated, at(gate), at(up), at(dy), count, reinterpret_cast<float*>(y), reinterpret_cast<float*>(d_up),
         threads);
}

void entropies(uintptr_t logits, uintptr_t targets, int rows, int columns, float weight, uintptr_t grads,
               uintptr_t nats, uintptr_t d_bias, const std::string& isa, int threads) {
    const auto write = [](uintptr_t address) { return reinterpret_cast<float*>(address); };
    const auto* target_ids = reinterpret_cast<const int64_t*>(targets);
    all_below(target_ids, rows, columns, "a target lies outside the logits");
    nb::gil_scoped_release release;
    CALL(isa, entropies, {write(logits), target_ids, rows, columns, weight, write(grads), write(nats), write(d_bias)},
         threads);
}

void look_up(uintptr_t ids, int64_t count, int64_t rows, int width, uintptr_t from, uintptr_t to, bool back,
             const std::string& isa, int threads) {
    const auto* indices = reinterpret_cast<const int64_t*>(ids);
    all_below(indices, count, rows, kNoSuchId);
    nb::gil_scoped_release release;
    CALL(isa, look_up, {indices, count, width, reinterpret_cast<const float*>(from), reinterpret_cast<float*>(to),
                        back},
         threads);
}

// Arrays of floats, each an address and a length.
using Arrays = std::vector<std::pair<uintptr_t, int64_t>>;

std::vector<inkling::Floats> floats(const Arrays& arrays) {
    std::vector<inkling::Floats> found;
    for (const auto& [at, count] : arrays) found.push_back({reinterpret_cast<float*>(at), count});
    return found;
}

double norm(const Arrays& arrays, const std::string& isa, int threads) {
    nb::gil_scoped_release release;
    return CALL(isa, norm, floats(arrays), threads);
}

void scale(const Arrays& arrays, float factor, const std::string& isa, int threads) {
    nb::gil_scoped_release release;
    CALL(isa, scale, floats(arrays), factor, threads);
}

// Each array: addresses of weights, gradients, means, squares and of its number of steps, which is raised; its length.
void adamw(const std::vector<std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t>>& arrays,
           double rate, double beta1, double beta2, double epsilon, double decay, const std::string& isa, int threads) {
    nb::gil_scoped_release release;
    std::vector<inkling::Adam> found;
    const auto write = [](uintptr_t address) { return reinterpret_cast<float*>(address); };
    for (const auto& [weights, grads, means, squares, at_steps, count] : arrays) {
        const double steps = *write(at_steps) += 1;
        found.push_back({write(weights), write(grads), write(means), write(squares), count, float(1 - rate * decay),
                         float(rate / (1 - std::pow(beta1, steps))), float(1 / std::sqrt(1 - std::pow(beta2, steps)))});
    }
    CALL(isa, adamw, found, float(beta1), float(beta2), float(epsilon), threads);
}

using inkling::BlockPass;

void run_block(const BlockPass& pass, const std::string& isa, int threads) {
    nb::gil_scoped_release release;
    CALL(isa, block, pass, threads);
}

void attention(std::tuple<int, int, int, int, int> shape, std::vector<uintptr_t> at, uint64_t seed, float drop,
               const std::string& isa, int threads) {
    if (at.size() != 9) throw std::invalid_argument("nine addresses");
    const auto [batch, time, heads, kv_heads, width] = shape;
    const auto read = [&](int i) { return reinterpret_cast<const float*>(at[i]); };
    const auto write = [&](int i) { return reinterpret_cast<float*>(at[i]); };
    nb::gil_scoped_release release;
    CALL(isa, attention,
         {batch, time, heads, kv_heads, width, read(0), read(1), read(2), write(3), write(4), read(5), write(6),
          write(7), write(8), false, seed, drop},
         threads);
}

// An address that Python gives as a number: taking it from a tensor costs more than a short text's step.
template <auto Member, class Owner>
void address(nb::class_<Owner>& binding, const char* name) {
    using Pointer = std::remove_reference_t<decltype(std::declval<Owner&>().*Member)>;
    binding.def_prop_rw(
        name, [](const Owner& of) { return reinterpret_cast<uintptr_t>(of.*Member); },
        [](Owner& of, uintptr_t at) { of.*Member = reinterpret_cast<Pointer>(at); });
}

}  // namespace

NB_MODULE(_native, module) {
    // A graph may still hold a Sequence when Python ends.
    nb::set_leak_warnings(false);
    module.def("instruction_sets", &instruction_sets);
    module.def("bf16_instruction_sets", &bf16_instruction_sets);
    nb::class_<Kernel>(module, "Kernel")
        .def("step", &step_slots, "slots"_a, "ids"_a)
        .def("read", &read_text, "slot"_a, "ids"_a, "all"_a.none())
        .def("clear", [](Kernel& kernel, int slot) { check(kernel, {slot}, {}); kernel.clear(slot); })
        .def("copy", [](Kernel& kernel, int from, int to) { check(kernel, {from, to}, {}); kernel.copy(from, to); })
        .def_prop_ro("views", &views)
        .def_prop_ro("logits", [](nb::handle self) {
            auto& kernel = nb::cast<Kernel&>(self);
            const size_t shape[] = {size_t(kernel.rows), size_t(kernel.stride)};
            return nb::ndarray<nb::numpy, float>(kernel.logits, 2, shape, self).cast();
        })
        .def_ro("weight_bytes", &Kernel::weight_bytes);
    module.def("recurrent", &recurrent, nb::rv_policy::take_ownership, "cell"_a, "embedding"_a, "layers"_a, "heads"_a,
               "tables"_a, "buckets"_a, "slots"_a, "threads"_a, "precision"_a, "isa"_a, "counts"_a.none() = nb::none(),
               "gate"_a.none() = nb::none(), "gate_bias"_a = 0.0f, nb::keep_alive<0, 11>());
    module.def("transformer", &transformer, nb::rv_policy::take_ownership, "embedding"_a, "head"_a, "norm"_a,
               "blocks"_a, "cosines"_a, "sines"_a, "heads"_a, "kv_heads"_a, "epsilon"_a, "tables"_a,
               "buckets"_a, "slots"_a, "threads"_a, "precision"_a, "isa"_a);

    module.def("ngram", &ngram, nb::rv_policy::take_ownership, "counts"_a, "slots"_a, "threads"_a, "precision"_a,
               "isa"_a, nb::keep_alive<0, 1>());

    nb::class_<inkling::Counts>(module, "Counts")
        .def("__init__", &make_counts, "levels"_a, "vocab_size"_a)
        .def_prop_ro("nbytes", &inkling::Counts::nbytes)
        .def("distributions", &distributions, "histories"_a, "left_out"_a.none(), "out"_a, "isa"_a, "threads"_a)
        .def("log_probabilities", &log_probabilities, "ids"_a, "out"_a, "isa"_a, "threads"_a);

    nb::class_<Sequence> sequence(module, "Sequence");
    sequence.def(nb::init<>());
#define NUMBER(name) sequence.def_rw(#name, &Sequence::name)
#define ADDRESS(name) address<&Sequence::name>(sequence, #name)
    NUMBER(lstm), NUMBER(batch), NUMBER(time), NUMBER(inputs), NUMBER(hidden), NUMBER(vocab_size);
    NUMBER(x_row), NUMBER(x_step), NUMBER(d_row), NUMBER(d_step);
    ADDRESS(x), ADDRESS(ids), ADDRESS(weight_ih), ADDRESS(weight_hh), ADDRESS(bias_ih), ADDRESS(bias_hh);
    ADDRESS(first_hidden), ADDRESS(first_cell), ADDRESS(outputs), ADDRESS(last_hidden), ADDRESS(last_cell);
    ADDRESS(memory), ADDRESS(d_outputs), ADDRESS(d_last_hidden), ADDRESS(d_last_cell), ADDRESS(d_x);
    ADDRESS(d_first_hidden), ADDRESS(d_first_cell), ADDRESS(d_weight_ih), ADDRESS(d_weight_hh);
    ADDRESS(d_bias_ih), ADDRESS(d_bias_hh);
#undef NUMBER
#undef ADDRESS

    nb::class_<BlockPass> block(module, "BlockPass");
    block.def(nb::init<>());
#define NUMBER(name) block.def_rw(#name, &BlockPass::name)
#define ADDRESS(name) address<&BlockPass::name>(block, #name)
    NUMBER(batch), NUMBER(time), NUMBER(size), NUMBER(heads), NUMBER(kv_heads), NUMBER(width), NUMBER(inner);
    NUMBER(epsilon), NUMBER(drop), NUMBER(attention_seed), NUMBER(mixed_seed), NUMBER(mlp_seed), NUMBER(adds);
    ADDRESS(x), ADDRESS(cosines), ADDRESS(sines), ADDRESS(input_norm), ADDRESS(query), ADDRESS(key), ADDRESS(value);
    ADDRESS(query_norm), ADDRESS(key_norm), ADDRESS(output), ADDRESS(mlp_norm), ADDRESS(gate), ADDRESS(up);
    ADDRESS(down), ADDRESS(y), ADDRESS(keys), ADDRESS(values), ADDRESS(memory), ADDRESS(dy), ADDRESS(d_keys);
    ADDRESS(d_values), ADDRESS(dx), ADDRESS(d_input_norm), ADDRESS(d_query), ADDRESS(d_key), ADDRESS(d_value);
    ADDRESS(d_query_norm), ADDRESS(d_key_norm), ADDRESS(d_output), ADDRESS(d_mlp_norm), ADDRESS(d_gate);
    ADDRESS(d_up), ADDRESS(d_down);
    module.def("block_memory", &inkling_plain::block_memory);
    module.def("block", &run_block);
    module.def("forward", &run_forward);
    module.def("backward", &run_backward);
    module.def("product", &product);
    module.def("drop", &drop);
    module.def("norms", &norms);
    module.def("attention", &attention);
    module.def("gated", &gated);
    module.def("entropies", &entropies);
    module.def("look_up", &look_up);
    module.def("norm", &norm);
    module.def("scale", &scale);
    module.def("adamw", &adamw);
    module.def("row_adagrad", &row_adagrad);
}
