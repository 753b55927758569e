// The interface of a kernel to Python, the same for all instruction sets.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "counts.hpp"

namespace inkling {

// A row-major float matrix, not owned; rows == 0 if there is none.
struct Matrix {
    const float* data = nullptr;
    int rows = 0, columns = 0;
    const float* row(int i) const { return data + int64_t(i) * columns; }
    explicit operator bool() const { return rows > 0; }
};

// A matrix in the format of a file: float32, or float16 where `half`.
struct StoredMatrix {
    const void* data = nullptr;
    bool half = false;
    int rows = 0, columns = 0;
};

// Memory of the kernel that Python may read and write: (slots, ...) float32 or int32.
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

struct Table {  // a context table: the last row is for incomplete contexts
    int order = 0;
    bool hashed = false;
    Matrix weight;
};

struct MixtureParts {  // of a hybrid: its counts, and the gate that mixes them with the network
    const Counts* counts = nullptr;
    const float* gate = nullptr;  // (hidden + 1) the weights of the cell's outputs and of the counts' entropy
    float bias = 0;
};

struct RecurrentParts {
    std::string cell;  // rnn-tanh, rnn-relu, gru, lstm
    Matrix embedding;
    std::vector<Layer> layers;
    std::vector<Head> heads;  // applied one after the other; the last gives the logits
    std::vector<Table> tables;
    MixtureParts mixture;  // without counts: the network alone
};

struct Block {
    StoredMatrix query, key, value, output, gate, up, down;
    const float *input_norm = nullptr, *query_norm = nullptr, *key_norm = nullptr, *mlp_norm = nullptr;
    const float* bias = nullptr;  // of queries, keys and values, one after the other; or none
};

struct TransformerParts {
    StoredMatrix embedding, head;  // the same where they are tied
    std::vector<Block> blocks;
    std::vector<Table> tables;
    const float* norm = nullptr;
    Matrix cosines, sines;  // (context, head_size / 2)
    int heads = 0, kv_heads = 0;
    float epsilon = 0;
};

// Of packed weights. With int4 the blocks of a Transformer are int4, its embedding and output matrix int8 by blocks.
enum class Format { fp32, bf16, int8, int4, int8_blocks };

struct Settings {
    int slots = 1, threads = 1;
    Format format = Format::fp32;
};

// One recurrent layer over whole texts, (batch, time, ...), forward and backward: inputs and outputs.
// A pointer may be null where the comment says "or none". Matrices and vectors are those of torch.nn.GRU and LSTM.
struct Sequence {
    bool lstm = false;
    int batch = 0, time = 0, inputs = 0, hidden = 0;
    // The inputs (batch, time, inputs) with the strides of rows and steps; or, where there are ids (batch, time), the
    // embedding (vocab_size, inputs) that they are looked up in.
    const float* x = nullptr;
    int64_t x_row = 0, x_step = 0;
    const int64_t* ids = nullptr;
    int vocab_size = 0;
    const float *weight_ih = nullptr, *weight_hh = nullptr, *bias_ih = nullptr, *bias_hh = nullptr;
    const float *first_hidden = nullptr, *first_cell = nullptr;  // (batch, hidden), or none: zeros
    float* outputs = nullptr;                                    // (batch, time, hidden)
    float *last_hidden = nullptr, *last_cell = nullptr;          // (batch, hidden)
    // Between forward and backward, which leaves gradients in it: (time, batch, 4 (LSTM: 6), hidden up to 16s).
    float* memory = nullptr;

    const float* d_outputs = nullptr;  // or none; with its strides
    int64_t d_row = 0, d_step = 0;
    const float *d_last_hidden = nullptr, *d_last_cell = nullptr;                             // or none
    float *d_x = nullptr, *d_first_hidden = nullptr, *d_first_cell = nullptr;                 // or none: not computed
    float *d_weight_ih = nullptr, *d_weight_hh = nullptr, *d_bias_ih = nullptr, *d_bias_hh = nullptr;
};

// C = A B; all row-major; a step is the distance from row to row. A is (rows, depth), or stored
// (depth, rows) where `a_transposed`; B is (depth, columns), or stored (columns, depth) where `b_transposed`.
struct Operands {
    const float* a = nullptr;
    int64_t a_step = 0;
    bool a_transposed = false;
    const float* b = nullptr;
    int64_t b_step = 0;
    bool b_transposed = false;
    float* c = nullptr;
    int64_t c_step = 0;
    int rows = 0, depth = 0, columns = 0;
    bool add = false;             // C += A B
    const float* bias = nullptr;  // (columns), added to every row where C is not added to; or none
};

// RMSNorm, rotary positions or both, for (rows, heads, width), forward or, where there are gradients, backward.
struct Norms {
    int64_t rows = 0;
    int heads = 1, width = 0;
    float epsilon = 0;
    const float* x = nullptr;
    const float* weight = nullptr;                          // (width), or none: no norm
    const float *cosines = nullptr, *sines = nullptr;       // (rows, width / 2), or none: no rotation
    float* y = nullptr;
    float* scales = nullptr;                                // (rows, heads) kept for backward; with a norm
    const float* dy = nullptr;
    float *dx = nullptr, *d_weight = nullptr;
};

struct Floats {
    float* data = nullptr;
    int64_t count = 0;
};

// Weights that AdamW updates.
struct Adam {
    float* weights = nullptr;
    const float* grads = nullptr;
    float *means = nullptr, *squares = nullptr;  // running means of the gradient and its square
    int64_t count = 0;
    float decay = 1;       // 1 - learning rate * weight decay
    float rate = 0;        // learning rate / (1 - beta1^steps)
    float root_scale = 1;  // 1 / sqrt(1 - beta2^steps)
};

// Rows of logits, and the gradients of their cross-entropies: softmax(logits) - one_hot(target).
struct Entropies {
    const float* logits = nullptr;  // (rows, columns)
    const int64_t* targets = nullptr;
    int rows = 0, columns = 0;
    float weight = 1;          // factor of the gradients
    float* grads = nullptr;   // (rows, columns); may be the logits
    float* nats = nullptr;     // (rows)
    float* d_bias = nullptr;   // (columns), to which the gradients of all rows are added; or none
};

// Embedding: rows of a matrix (?, width), looked up; `back`: the gradients of such rows, added to the rows of `to`.
struct LookUp {
    const int64_t* ids = nullptr;
    int64_t count = 0;
    int width = 0;
    const float* from = nullptr;
    float* to = nullptr;
    bool back = false;
};

// Causal attention over (batch, time, heads, width), forward or, where there are gradients, backward.
struct Attention {
    int batch = 0, time = 0, heads = 0, kv_heads = 0, width = 0;
    const float *queries = nullptr, *keys = nullptr, *values = nullptr;
    float* outputs = nullptr;
    float* log_sums = nullptr;  // (batch, heads, time), kept for backward
    const float* d_outputs = nullptr;
    float *d_queries = nullptr, *d_keys = nullptr, *d_values = nullptr;
    bool adds = false;  // to the gradients of keys and values
    uint64_t seed = 0;  // dropout of the probabilities
    float drop = 0;
};

// A block of a Transformer over whole texts, forward or, where there is a gradient `dy`, backward; see block.hpp.
// Matrices (outputs, inputs) are those of torch.nn.Linear.
struct BlockPass {
    int batch = 0, time = 0, size = 0, heads = 0, kv_heads = 0, width = 0, inner = 0;
    float epsilon = 0, drop = 0;
    uint64_t attention_seed = 0, mixed_seed = 0, mlp_seed = 0;     // of dropout
    const float *x = nullptr, *cosines = nullptr, *sines = nullptr;  // (batch, time, size), (batch * time, width / 2)
    const float *input_norm = nullptr, *query = nullptr, *key = nullptr, *value = nullptr;
    const float *query_norm = nullptr, *key_norm = nullptr;  // or none
    const float *output = nullptr, *mlp_norm = nullptr, *gate = nullptr, *up = nullptr, *down = nullptr;
    float *y = nullptr, *keys = nullptr, *values = nullptr;  // (batch, time, size); (batch, time, kv_heads, width)
    float* memory = nullptr;                                 // between forward and backward, which changes it

    const float* dy = nullptr;
    float *d_keys = nullptr, *d_values = nullptr;  // changed; of keys and values as such, where `adds`
    bool adds = false;
    float *dx = nullptr, *d_input_norm = nullptr, *d_query = nullptr, *d_key = nullptr, *d_value = nullptr;
    float *d_query_norm = nullptr, *d_key_norm = nullptr;  // gradients of norms are added to
    float *d_output = nullptr, *d_mlp_norm = nullptr, *d_gate = nullptr, *d_up = nullptr, *d_down = nullptr;
};

constexpr int kRowsAtOnce = 64;  // tokens of one text that are read together

class Kernel {
public:
    // Defined in module.cpp alone, and with it the table of virtual functions.
    virtual ~Kernel();

    // One token in each of several different slots; row i of `logits` belongs to slots[i].
    virtual void step(const int* slots, const int* ids, int count) = 0;
    // Several tokens of one text; logits after the last in row 0, or after each in `all` (count, vocab_size).
    virtual void read(int slot, const int* ids, int count, float* all) = 0;

    // Clear a slot; copy one slot to another.
    virtual void clear(int slot) = 0;
    virtual void copy(int from, int to) = 0;

    std::map<std::string, View> views;  // the state of the slots, by name
    float* logits = nullptr;            // (rows, stride), valid until the next call
    int vocab_size = 0, stride = 0, rows = 0, slots = 0;
    size_t weight_bytes = 0;  // read for one token
    std::string name;
};

}  // namespace inkling
