// What the Python side sees of a kernel, whichever instruction set it was compiled for.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace inkling {

// A row-major float matrix that somebody else owns; rows == 0 where there is none.
struct Matrix {
    const float* data = nullptr;
    int rows = 0, columns = 0;
    const float* row(int i) const { return data + int64_t(i) * columns; }
    explicit operator bool() const { return rows > 0; }
};

// Memory of the kernel that Python may look into and change: (slots, ...) float32 or int32.
struct View {
    void* data;
    bool integer;
    std::vector<size_t> shape;
};

struct Layer {  // of a recurrent model: gates * hidden outputs
    Matrix input, hidden;
    const float *input_bias = nullptr, *hidden_bias = nullptr;
};
struct Head {
    Matrix weight;
    const float* bias = nullptr;
};

struct RecurrentParts {
    std::string cell;  // rnn-tanh, rnn-relu, gru, lstm
    Matrix embedding;
    std::vector<Layer> layers;
    std::vector<Head> heads;  // applied one after the other; the last gives the logits
};

struct Block {
    Matrix query, key, value, output, gate, up, down;
    const float *input_norm = nullptr, *query_norm = nullptr, *key_norm = nullptr, *mlp_norm = nullptr;
};

struct TransformerParts {
    Matrix embedding, head;
    std::vector<Block> blocks;
    const float* norm = nullptr;
    Matrix cosines, sines;  // (context, head_size / 2)
    int heads = 0, kv_heads = 0;
    float epsilon = 0;
};

struct Settings {
    int slots = 1, threads = 1;
    bool int8 = false;
};

constexpr int kRowsAtOnce = 64;  // tokens of one text that are read together

class Kernel {
public:
    virtual ~Kernel() = default;

    // One token in each of several different slots; row i of `logits` belongs to slots[i].
    virtual void step(const int* slots, const int* ids, int count) = 0;
    // Several tokens of one text; logits after the last in row 0, or after each in `all` (count, vocab_size).
    virtual void read(int slot, const int* ids, int count, float* all) = 0;

    // Forget a slot's text; make a slot hold another's.
    virtual void clear(int slot) = 0;
    virtual void copy(int from, int to) = 0;

    std::map<std::string, View> views;  // the state of the slots, by name
    float* logits = nullptr;            // (rows, stride), good until the next call
    int vocab_size = 0, stride = 0, rows = 0, slots = 0;
    size_t weight_bytes = 0;  // read for one token
    std::string name;
};

}  // namespace inkling
