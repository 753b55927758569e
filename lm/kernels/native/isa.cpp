// Compiled once for each instruction set; CMakeLists.txt gives INKLING_ISA and the flags.
#include <cstdlib>
#include <new>

#include "attention.hpp"
#include "elementwise.hpp"
#include "recurrent.hpp"
#include "training.hpp"
#include "transformer.hpp"

namespace INKLING_ISA {

inkling::Kernel* recurrent(const inkling::RecurrentParts& parts, const inkling::Settings& settings) {
    return new Recurrent(parts, settings);
}
inkling::Kernel* transformer(const inkling::TransformerParts& parts, const inkling::Settings& settings) {
    return new Transformer(parts, settings);
}
void product(const inkling::Operands& o, int threads) {
    SequenceSpace& space = sequence_space();
    multiply(space.pool(threads), space.products,
             {{o.a, o.a_step}, o.a_turned, {o.b, o.b_step}, o.b_turned, {o.c, o.c_step}, o.rows, o.depth, o.columns,
              o.add, o.bias});
}
// work(begin, end) over the numbers below `count` (rows of `width` of them), shared out among threads where that pays;
// every share begins at a multiple of `unit`.
template <class Work>
void share(int64_t count, int64_t width, int64_t unit, int threads, const Work& work) {
    Pool& pool = sequence_space().pool(threads);
    const int parts = count * width < 1 << 16 ? 1 : threads;
    if (parts > 1) pool.wake();
    const int64_t units = (count + unit - 1) / unit;
    pool.run(parts, [&](int part) {
        work(units * part / parts * unit, std::min(count, units * (part + 1) / parts * unit));
    });
}

void drop(const float* from, float* to, int64_t count, uint64_t seed, float rate, int threads) {
    share(count, 1, kPanel, threads,
          [&](int64_t begin, int64_t end) { drop_some(from, to, begin, end, seed, rate); });
}
void norms(const inkling::Norms& n, int threads) {
    // Sums over rows have one order, whatever the number of threads: those of so many parts, then those of all.
    constexpr int kBlocks = 16;
    const int64_t rows = n.rows * n.heads, block = (rows + kBlocks - 1) / kBlocks;
    std::vector<float> sums(n.dy && n.weight ? size_t(kBlocks) * n.width : 0);
    share(rows, n.width, std::max<int64_t>(block, 1), threads, [&](int64_t begin, int64_t end) {
        std::vector<float> between(n.width);
        for (int64_t row = begin; row < end; ++row) norm_and_turn(n, row, between.data(), sums.data() + row / block * n.width);
    });
    for (size_t i = 0; i < sums.size(); ++i) n.d_weight[i % n.width] += sums[i];
}
void gated(const float* gate, const float* up, const float* dy, int64_t count, float* y, float* d_up, int threads) {
    share(count, 1, kPanel, threads, [&](int64_t begin, int64_t end) {
        if (dy)
            swiglu_back(gate + begin, up + begin, dy + begin, end - begin, y + begin, d_up + begin);
        else
            swiglu(gate + begin, up + begin, end - begin, y + begin);
    });
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

}  // namespace INKLING_ISA
