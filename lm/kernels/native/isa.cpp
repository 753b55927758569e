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
void drop(const float* from, float* to, int64_t count, uint64_t seed, float rate) {
    drop_some(from, to, count, seed, rate);
}
void norms(const inkling::Norms& n) {
    const int half = n.width / 2;
    std::vector<float> between(n.width);
    for (int64_t row = 0; row < n.rows * n.heads; ++row) {
        const int64_t at = row * n.width, angles = row / n.heads * half;
        if (!n.dy) {
            const float* from = n.x + at;
            if (n.weight) {
                float* to = n.cosines ? between.data() : n.y + at;
                norm_row(from, n.weight, n.width, n.epsilon, to, n.scales[row]);
                from = to;
            }
            if (n.cosines) turn(from, n.cosines + angles, n.sines + angles, half, n.y + at, false);
        } else {
            const float* slope = n.dy + at;
            if (n.cosines) {
                float* to = n.weight ? between.data() : n.dx + at;
                turn(slope, n.cosines + angles, n.sines + angles, half, to, true);
                slope = to;
            }
            if (n.weight) norm_row_back(n.x + at, n.weight, n.scales[row], n.width, slope, n.dx + at, n.d_weight);
        }
    }
}
void gated(const float* gate, const float* up, const float* dy, int64_t count, float* y, float* d_up) {
    if (dy)
        swiglu_back(gate, up, dy, count, y, d_up);
    else
        swiglu(gate, up, count, y);
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
