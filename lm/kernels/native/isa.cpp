// Compiled once for each instruction set; CMakeLists.txt gives INKLING_ISA and the flags. With INKLING_BF16 training
// multiplies in bf16; AMX is for training alone.
#include <cstdlib>
#include <new>

#include "arrays.hpp"
#include "attention.hpp"
#include "block.hpp"
#include "elementwise.hpp"
#include "entropy.hpp"
#include "training.hpp"
#if !defined(INKLING_AMX) && !defined(INKLING_BFMMLA)
#include "mixture.hpp"
#include "recurrent.hpp"
#include "transformer.hpp"
#endif

namespace INKLING_ISA {

#if !defined(INKLING_AMX) && !defined(INKLING_BFMMLA)
inkling::Kernel* recurrent(const inkling::RecurrentParts& parts, const inkling::Settings& settings) {
    return new Recurrent(parts, settings);
}
inkling::Kernel* ngram(const inkling::Counts& counts, const inkling::Settings& settings) {
    return new NGram(counts, settings);
}
inkling::Kernel* transformer(const inkling::TransformerParts& parts, const inkling::Settings& settings) {
    return new Transformer(parts, settings);
}
#endif
void product(const inkling::Operands& o, int threads) {
    SequenceSpace& space = sequence_space();
    multiply(space.pool(threads), space.products,
             {{o.a, o.a_step}, o.a_transposed, {o.b, o.b_step}, o.b_transposed, {o.c, o.c_step}, o.rows, o.depth,
              o.columns, o.add, o.bias});
}
void drop(const float* from, float* to, int64_t count, uint64_t seed, float rate, int threads) {
    drop_all(sequence_space().pool(threads), from, to, count, seed, rate);
}
void norms(const inkling::Norms& n, int threads) { norms_of(sequence_space().pool(threads), n); }
void gated(const float* gate, const float* up, const float* dy, int64_t count, float* y, float* d_up, int threads) {
    gate_all(sequence_space().pool(threads), gate, up, dy, count, y, d_up);
}
void look_up(const inkling::LookUp& l, int threads) { look_up(sequence_space().pool(threads), l); }
void entropies(const inkling::Entropies& e, int threads) { entropies_of(sequence_space().pool(threads), e); }
double norm(const std::vector<inkling::Floats>& arrays, int threads) {
    return norm_of(sequence_space().pool(threads), arrays);
}
void scale(const std::vector<inkling::Floats>& arrays, float factor, int threads) {
    scale_all(sequence_space().pool(threads), arrays, factor);
}
void adamw(const std::vector<inkling::Adam>& arrays, float beta1, float beta2, float epsilon, int threads) {
    adamw_all(sequence_space().pool(threads), arrays, beta1, beta2, epsilon);
}
void attention(const inkling::Attention& attention, int threads) {
    SequenceSpace& space = sequence_space();
    AttentionRun(attention, space.pool(threads), space.products).run();
}
void forward(const inkling::Sequence& sequence, int threads) {
    SequenceRun(sequence, sequence_space(), threads).forward();
}
void backward(const inkling::Sequence& sequence, int threads) {
    SequenceRun(sequence, sequence_space(), threads).backward();
}
void share_rows(int64_t rows, int64_t width, int threads, void (*work)(void*, int64_t, int64_t), void* with) {
    share(sequence_space().pool(threads), rows, width, 1, [&](int64_t begin, int64_t end) { work(with, begin, end); });
}
size_t block_memory(const inkling::BlockPass& block) { return BlockRun(block, sequence_space(), 1).memory(); }
void block(const inkling::BlockPass& block, int threads) {
    BlockRun run(block, sequence_space(), threads);
    block.dy ? run.backward() : run.forward();
}

}  // namespace INKLING_ISA
