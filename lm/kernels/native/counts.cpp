// Compiled once, for all instruction sets: looking up counts is limited by memory latency.
#include "counts.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace inkling {

Counts::Counts(const std::vector<CountLevel>& levels, int vocab_size)
    : vocab_size_(vocab_size), unigrams_(vocab_size) {
    if (levels.empty() || levels.size() > kLongestContext + 1 || levels[0].contexts != 1)
        throw std::invalid_argument("counts have 1 to 32 levels, the first with one context");
    if (vocab_size < 1 || vocab_size >= 1 << 29) throw std::invalid_argument("counts of such a vocabulary do not fit");
    int64_t parents = 0;
    for (const CountLevel& from : levels) {
        if (from.contexts >= UINT32_MAX || from.pairs >= UINT32_MAX) throw std::invalid_argument("too many counts");
        if (from.starts[0] != 0 || from.starts[from.contexts] != from.pairs)
            throw std::invalid_argument("the contexts of counts do not cover their pairs");
        can_leave_out_ &= from.counts && from.totals && from.discount;
        Level& level = levels_.emplace_back();
        level.nodes.resize(from.contexts + 1);
        level.pairs.resize(from.pairs);
        if (from.discount) std::copy_n(from.discount, 4, level.discount);
        for (int64_t i = 0; i < from.contexts; ++i) {
            const int64_t key = from.keys[i];
            if (key < 0 || (i > 0 && key <= from.keys[i - 1]) || from.starts[i] > from.starts[i + 1])
                throw std::invalid_argument("the contexts of counts are not sorted");
            Node& node = level.nodes[i];
            node.token = uint32_t(key % vocab_size);
            node.first_pair = uint32_t(from.starts[i]);
            node.backoff = float(from.backoff[i]);
            node.total = from.totals ? uint32_t(std::min(from.totals[i], double(UINT32_MAX))) : 0;
        }
        level.nodes.back().first_pair = uint32_t(from.pairs);
        for (int64_t i = 0; i < from.pairs; ++i) {
            if (from.tokens[i] >= uint32_t(vocab_size))
                throw std::invalid_argument("a counted token lies outside the vocabulary");
            level.pairs[i] = {from.tokens[i] * 8 + (from.counts ? std::min(from.counts[i], kMany) : kMany),
                              from.shares[i]};
        }
        if (parents > 0) {
            std::vector<Node>& above = levels_[levels_.size() - 2].nodes;
            if (from.contexts > 0 && from.keys[from.contexts - 1] / vocab_size >= parents)
                throw std::invalid_argument("a context of counts has no shorter one");
            int64_t next = 0;
            for (int64_t parent = 0; parent <= parents; ++parent) {
                while (next < from.contexts && from.keys[next] / vocab_size < parent) ++next;
                above[parent].first_child = uint32_t(next);
            }
        }
        parents = from.contexts;
    }
    const Node& root = levels_[0].nodes[0];
    std::fill(unigrams_.begin(), unigrams_.end(), root.backoff / float(vocab_size));
    for (const Pair& pair : levels_[0].pairs) unigrams_[pair.token()] += pair.share;
}

size_t Counts::nbytes() const {
    size_t sum = unigrams_.size() * sizeof(float);
    for (const Level& level : levels_) sum += level.nodes.size() * sizeof(Node) + level.pairs.size() * sizeof(Pair);
    return sum;
}

int64_t Counts::child(int k, uint32_t node, int64_t token) const {
    const Node* parent = levels_[k].nodes.data() + node;
    const Node* children = levels_[k + 1].nodes.data();
    uint32_t first = parent[0].first_child, end = parent[1].first_child;
    while (first < end) {
        const uint32_t middle = first + (end - first) / 2;
        if (children[middle].token < token)
            first = middle + 1;
        else
            end = middle;
    }
    return first < parent[1].first_child && children[first].token == token ? int64_t(first) : -1;
}

template <class Token>
int Counts::find(const Token* history, uint32_t* nodes) const {
    nodes[0] = 0;
    const int most = context_size();
    for (int k = 0; k < most; ++k) {
        const int64_t token = history[most - 1 - k];
        const int64_t next = token < 0 ? -1 : child(k, nodes[k], token);
        if (next < 0) return k;
        nodes[k + 1] = uint32_t(next);
    }
    return most;
}

// From the longest context to the shortest: `weight` is the product of the backoff weights so far.
void Counts::interpolate(const uint32_t* nodes, int longest, float* out) const {
    std::fill_n(out, vocab_size_, 0.0f);
    double weight = 1;
    for (int k = longest; k > 0; --k) {
        const Node* node = levels_[k].nodes.data() + nodes[k];
        const Pair* pairs = levels_[k].pairs.data();
        const float scale = float(weight);
        for (uint32_t i = node[0].first_pair; i < node[1].first_pair; ++i) out[pairs[i].token()] += pairs[i].share * scale;
        weight *= node->backoff;
    }
    const float scale = float(weight);
    for (int i = 0; i < vocab_size_; ++i) out[i] += unigrams_[i] * scale;
}

// The same, if `token` had one occurrence less in the longest context that has it; if its count becomes zero, so does
// the continuation count of the next shorter pair, and so on.
void Counts::interpolate_without(const uint32_t* nodes, int longest, uint32_t token, float* out) const {
    std::fill_n(out, vocab_size_, 0.0f);
    double weight = 1;
    bool pending = true;
    for (int k = longest; k >= 0; --k) {
        const Level& level = levels_[k];
        const Node* node = level.nodes.data() + nodes[k];
        const Pair* begin = level.pairs.data() + node[0].first_pair;
        const Pair* end = level.pairs.data() + node[1].first_pair;
        const Pair* own = end;
        if (pending) own = std::lower_bound(begin, end, token, [](const Pair& a, uint32_t b) { return a.token() < b; });
        if (own == end || own->token() != token) {
            const float scale = float(weight);
            for (const Pair* pair = begin; pair != end; ++pair) out[pair->token()] += pair->share * scale;
            weight *= node->backoff;
            continue;
        }
        const uint32_t count = own->count();
        pending = count == 1;
        // A context without other occurrences has neither shares nor a discount.
        if (node->total == 1) continue;
        const double left = node->total - 1.0, scale = weight * node->total / left;
        const double discount = level.discount[std::min(count, 3u)], lower = level.discount[count - 1 < 3 ? count - 1 : 3];
        // Small counts are exact: a difference of rounded shares would not be.
        const double remaining =
            count < kMany ? (count - 1 - lower) / left : (own->share * node->total + discount - lower - 1) / left;
        const float replaced = float(out[token] + weight * remaining);
        for (const Pair* pair = begin; pair != end; ++pair) out[pair->token()] += pair->share * float(scale);
        out[token] = replaced;
        weight *= (double(node->backoff) * node->total - discount + lower) / left;
    }
    const float uniform = float(weight / vocab_size_);
    for (int i = 0; i < vocab_size_; ++i) out[i] += uniform;
}

void Counts::distribution(const int32_t* history, float* out) const {
    uint32_t nodes[kLongestContext + 1];
    interpolate(nodes, find(history, nodes), out);
}

void Counts::distributions(const int64_t* histories, const int64_t* left_out, int64_t begin, int64_t end,
                           float* out) const {
    // Contexts are scattered in memory. The nodes of several rows are found together, level by level, so that their
    // cache misses overlap; their pairs are prefetched.
    constexpr int kTogether = 16;
    const int most = context_size();
    uint32_t nodes[kTogether][kLongestContext + 1];
    int longest[kTogether];
    for (int64_t first = begin; first < end; first += kTogether) {
        const int rows = int(std::min<int64_t>(kTogether, end - first));
        for (int row = 0; row < rows; ++row) nodes[row][0] = 0, longest[row] = 0;
        for (int k = 0; k < most; ++k)
            for (int row = 0; row < rows; ++row) {
                if (longest[row] < k) continue;
                const int64_t token = histories[(first + row + 1) * most - 1 - k];
                const int64_t next = token < 0 ? -1 : child(k, nodes[row][k], token);
                if (next < 0) continue;
                nodes[row][k + 1] = uint32_t(next);
                longest[row] = k + 1;
                const Node& node = levels_[k + 1].nodes[next];
                __builtin_prefetch(levels_[k + 1].pairs.data() + node.first_pair);
                if (k + 2 <= most) __builtin_prefetch(levels_[k + 2].nodes.data() + node.first_child);
            }
        for (int row = 0; row < rows; ++row) {
            float* to = out + (first + row) * vocab_size_;
            if (left_out)
                interpolate_without(nodes[row], longest[row], uint32_t(left_out[first + row]), to);
            else
                interpolate(nodes[row], longest[row], to);
        }
    }
}

void Counts::log_probabilities(const int64_t* ids, int64_t begin, int64_t end, double* out) const {
    for (int64_t i = begin; i < end; ++i) {
        const uint32_t token = uint32_t(ids[i + 1]);
        double probability = 1.0 / vocab_size_;
        uint32_t node = 0;
        for (int k = 0;; ++k) {
            const Level& level = levels_[k];
            const Node* at = level.nodes.data() + node;
            const Pair *first = level.pairs.data() + at[0].first_pair, *last = level.pairs.data() + at[1].first_pair;
            const Pair* pair = std::lower_bound(first, last, token, [](const Pair& a, uint32_t b) { return a.token() < b; });
            probability *= at->backoff;
            if (pair != last && pair->token() == token) probability += pair->share;
            if (k == context_size() || i < k) break;
            const int64_t next = child(k, node, ids[i - k]);
            if (next < 0) break;
            node = uint32_t(next);
        }
        out[i] = std::log(probability);
    }
}

}  // namespace inkling
