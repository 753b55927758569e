// The Python module lm.kernels._native: kernels made from numpy arrays, called with lists of ints.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "kernel.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using inkling::Kernel;

#define DECLARE(isa)                                                                              \
    namespace isa {                                                                               \
    Kernel* recurrent(const inkling::RecurrentParts&, const inkling::Settings&);                  \
    Kernel* transformer(const inkling::TransformerParts&, const inkling::Settings&);              \
    }
DECLARE(inkling_plain)
#if defined(INKLING_X86)
DECLARE(inkling_avx2)
DECLARE(inkling_avx512)
#endif

namespace {

using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using MaybeFloats = std::optional<Floats>;

// The instruction sets that this machine has, best first.
std::vector<std::string> instruction_sets() {
    std::vector<std::string> found;
#if defined(INKLING_X86)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni"))
        found.push_back("avx512");
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back("avx2");
#endif
    found.push_back("plain");
    return found;
}

inkling::Matrix matrix(const Floats& from) {
    if (from.ndim() != 2) throw std::invalid_argument("a matrix has two axes");
    return {from.data(), int(from.shape(0)), int(from.shape(1))};
}
const float* vector(const MaybeFloats& from, size_t size) {
    if (!from) return nullptr;
    if (from->ndim() != 1 || from->shape(0) != size) throw std::invalid_argument("a vector has the wrong length");
    return from->data();
}

// Shapes are checked here once: the kernels read what these promise.
void expect(const inkling::Matrix& found, int rows, int columns, const char* name) {
    if (found.rows != rows || found.columns != columns)
        throw std::invalid_argument(std::string(name) + " is (" + std::to_string(found.rows) + ", " +
                                    std::to_string(found.columns) + ") and not (" + std::to_string(rows) + ", " +
                                    std::to_string(columns) + ")");
}

template <class Parts>
Kernel* make(const Parts& parts, const inkling::Settings& settings, const std::string& isa) {
    auto known = instruction_sets();
    if (std::find(known.begin(), known.end(), isa) == known.end()) throw std::invalid_argument(isa + " is not here");
#define MAKE(isa, family) isa::family(parts, settings)
    Kernel* kernel = nullptr;
    if constexpr (std::is_same_v<Parts, inkling::RecurrentParts>) {
#if defined(INKLING_X86)
        if (isa == "avx512") kernel = MAKE(inkling_avx512, recurrent);
        if (isa == "avx2") kernel = MAKE(inkling_avx2, recurrent);
#endif
        if (isa == "plain") kernel = MAKE(inkling_plain, recurrent);
    } else {
#if defined(INKLING_X86)
        if (isa == "avx512") kernel = MAKE(inkling_avx512, transformer);
        if (isa == "avx2") kernel = MAKE(inkling_avx2, transformer);
#endif
        if (isa == "plain") kernel = MAKE(inkling_plain, transformer);
    }
    return kernel;
}

Kernel* recurrent(const std::string& cell, const Floats& embedding,
                  const std::vector<std::tuple<Floats, Floats, Floats, Floats>>& layers,
                  const std::vector<std::tuple<Floats, MaybeFloats>>& heads, int slots, int threads, bool int8,
                  const std::string& isa) {
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
    nb::gil_scoped_release release;
    return make(parts, {slots, threads, int8}, isa);
}

Kernel* transformer(const Floats& embedding, const Floats& head, const Floats& norm,
                    const std::vector<std::tuple<std::vector<Floats>, std::vector<MaybeFloats>>>& blocks,
                    const Floats& cosines, const Floats& sines, int heads, int kv_heads, float epsilon, int slots,
                    int threads, bool int8, const std::string& isa) {
    inkling::TransformerParts parts;
    parts.embedding = matrix(embedding);
    parts.head = matrix(head);
    parts.norm = vector(norm, embedding.shape(1));
    parts.cosines = matrix(cosines);
    parts.sines = matrix(sines);
    parts.heads = heads;
    parts.kv_heads = kv_heads;
    parts.epsilon = epsilon;
    for (const auto& [matrices, norms] : blocks) {
        if (matrices.size() != 7 || norms.size() != 4) throw std::invalid_argument("a block has 7 matrices, 4 norms");
        inkling::Block block;
        inkling::Matrix* places[] = {&block.query,  &block.key, &block.value, &block.output,
                                     &block.gate,   &block.up,  &block.down};
        for (int i = 0; i < 7; ++i) *places[i] = matrix(matrices[i]);
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
        parts.blocks.push_back(block);
    }
    expect(parts.head, parts.embedding.rows, parts.embedding.columns, "lm_head");
    expect(parts.sines, parts.cosines.rows, parts.cosines.columns, "the sines");
    if (parts.blocks.empty() || heads < 1 || kv_heads < 1 || heads % kv_heads || parts.cosines.rows < 2)
        throw std::invalid_argument("blocks, heads or context do not fit");
    if (std::any_of(parts.blocks.begin(), parts.blocks.end(),
                    [](const auto& block) { return !block.input_norm || !block.mlp_norm; }))
        throw std::invalid_argument("a norm is missing");
    nb::gil_scoped_release release;
    return make(parts, {slots, threads, int8}, isa);
}

void check(const Kernel& kernel, const std::vector<int>& slots, const std::vector<int>& ids) {
    for (int slot : slots)
        if (slot < 0 || slot >= kernel.slots) throw std::out_of_range("no such slot");
    for (int id : ids)
        if (id < 0 || id >= kernel.vocab_size) throw std::out_of_range("token outside the vocabulary");
}

// Below this much work giving up Python's lock, and asking for it back, costs more than it brings others.
constexpr size_t kShort = 400'000;

void step_slots(Kernel& kernel, const std::vector<int>& slots, const std::vector<int>& ids) {
    check(kernel, slots, ids);
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

}  // namespace

NB_MODULE(_native, module) {
    module.def("instruction_sets", &instruction_sets);
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
               "slots"_a, "threads"_a, "int8"_a, "isa"_a);
    module.def("transformer", &transformer, nb::rv_policy::take_ownership, "embedding"_a, "head"_a, "norm"_a,
               "blocks"_a, "cosines"_a, "sines"_a, "heads"_a, "kv_heads"_a, "epsilon"_a, "slots"_a, "threads"_a,
               "int8"_a, "isa"_a);
}
