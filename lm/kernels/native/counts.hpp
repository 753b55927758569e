// Smoothed n-gram counts as a trie of contexts, and the distribution of the next token; as lm.models.kneser_ney.
//
// A context's children are the contexts that have one older token more. A level holds all contexts of one length; its
// nodes lie in the order of their parents, then of their oldest token.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace inkling {

// All contexts of one length, as Python passes them.
struct CountLevel {
    int64_t contexts = 0, pairs = 0;
    const int64_t* keys = nullptr;      // (contexts) sorted: index of the parent * vocab_size + oldest token
    const int64_t* starts = nullptr;    // (contexts + 1) index of the first pair of each context
    const uint32_t* tokens = nullptr;   // (pairs) the next tokens, sorted within a context
    const float* shares = nullptr;      // (pairs) probability without backoff
    const double* backoff = nullptr;    // (contexts) weight of the shorter context's distribution
    const uint32_t* counts = nullptr;   // (pairs), or none: then no occurrence can be left out
    const double* totals = nullptr;     // (contexts) sums of the counts, or none
    const double* discount = nullptr;   // (4) of the counts 0, 1, 2, and 3 or more, or none
};

constexpr int kLongestContext = 31;

constexpr uint32_t kMany = 4;  // counts from here on have the same discount before and after a removal

class Counts {
public:
    // Throws std::invalid_argument if the levels do not fit together.
    Counts(const std::vector<CountLevel>& levels, int vocab_size);

    int vocab_size() const { return vocab_size_; }
    // Tokens that a prediction depends on.
    int context_size() const { return int(levels_.size()) - 1; }
    bool can_leave_out() const { return can_leave_out_; }
    std::size_t nbytes() const;

    // The distribution (vocab_size) of the next token after a history of `context_size` tokens, newest last; a
    // negative token is before the start of the text.
    void distribution(const int32_t* history, float* out) const;
    // The distributions of rows `begin` to `end`, each without one occurrence of its token of `left_out`, or none.
    void distributions(const int64_t* histories, const int64_t* left_out, int64_t begin, int64_t end,
                       float* out) const;
    // Log-probabilities of the tokens ids[begin + 1] to ids[end], each given the tokens before it.
    void log_probabilities(const int64_t* ids, int64_t begin, int64_t end, double* out) const;

private:
    struct Node {
        uint32_t token = 0, first_pair = 0, first_child = 0;
        float backoff = 1;
        uint32_t total = 0;
    };
    struct Pair {
        uint32_t token_and_count;  // 8 * token + min(count, kMany)
        float share;
        uint32_t token() const { return token_and_count / 8; }
        uint32_t count() const { return token_and_count % 8; }
    };
    struct Level {
        std::vector<Node> nodes;  // and one more, that ends the last one's pairs and children
        std::vector<Pair> pairs;
        double discount[4] = {};
    };

    // The child of a node of level `k` by its oldest token; -1: there is none.
    int64_t child(int k, uint32_t node, int64_t token) const;
    // The nodes of the known contexts of a history, from length 0; returns the longest length.
    template <class Token>
    int find(const Token* history, uint32_t* nodes) const;
    void interpolate(const uint32_t* nodes, int longest, float* out) const;
    void interpolate_without(const uint32_t* nodes, int longest, uint32_t token, float* out) const;

    int vocab_size_;
    bool can_leave_out_ = true;
    std::vector<Level> levels_;
    std::vector<float> unigrams_;  // (vocab_size) the distribution of the empty context
};

}  // namespace inkling
