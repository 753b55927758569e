// Products of large fp32 matrices, C = A B or C += A B, for training: blocked, packed on the way, any layout.
//
// An element's sum goes along k in blocks of kDeep, whatever the rows beside it or the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "linear.hpp"

namespace INKLING_ISA {

// Where the rows of a matrix lie: row i at data + (i / inner) * outer + (i % inner) * step. The order (time, batch) of
// a (batch, time, ...) tensor is such a matrix, so that nothing has to be transposed.
template <class T>
struct RowsAt {
    T* data = nullptr;
    int64_t step = 0;
    int64_t inner = INT64_MAX, outer = 0;
    T* operator[](int64_t i) const {
        return i < inner ? data + i * step : data + (i / inner) * outer + (i % inner) * step;
    }
    RowsAt shifted(int64_t columns) const { return {data + columns, step, inner, outer}; }
    // The rows from `first` on; a multiple of `inner`, where that is not all.
    RowsAt below(int64_t first) const { return {(*this)[first], step, inner, outer}; }
};
using ConstRows = RowsAt<const float>;
using MutableRows = RowsAt<float>;

#if LANES == 16
constexpr int kAcross = 3, kDown = 8;  // panels and rows of C held in registers
#else
constexpr int kAcross = 1, kDown = 6;
#endif
constexpr int kDeep = 512;           // of k at a time: a tile's rows of A stay in the first cache
constexpr int kBroad = 15 * kPanel;  // columns at a time: the block of B stays in the second

// c[r][0 .. 16 P) = (or +=) the sum over k of a[r][k * step] * b[k][0 .. 16 P)
template <int P, int R>
inline void tile_of(const float* b, int depth, const float* const* a, int64_t step, float* const* c, bool add) {
    vec sums[P * kParts][R] = {};
    for (int k = 0; k < depth; ++k) {
        vec part[P * kParts];
#pragma GCC unroll 32
        for (int p = 0; p < P * kParts; ++p) part[p] = load(b + p * LANES);
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) {
            const vec value = spread(a[r][k * step]);
#pragma GCC unroll 32
            for (int p = 0; p < P * kParts; ++p) sums[p][r] += part[p] * value;
        }
        b += P * kPanel;
    }
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
        for (int p = 0; p < P * kParts; ++p) {
            float* to = c[r] + p * LANES;
            store(to, add ? load(to) + sums[p][r] : sums[p][r]);
        }
}

template <int P>
inline void tile_of(int rows, const float* b, int depth, const float* const* a, int64_t step, float* const* c,
                    bool add) {
    switch (rows) {
#if LANES == 16
        case 8: return tile_of<P, 8>(b, depth, a, step, c, add);
        case 7: return tile_of<P, 7>(b, depth, a, step, c, add);
#endif
        case 6: return tile_of<P, 6>(b, depth, a, step, c, add);
        case 5: return tile_of<P, 5>(b, depth, a, step, c, add);
        case 4: return tile_of<P, 4>(b, depth, a, step, c, add);
        case 3: return tile_of<P, 3>(b, depth, a, step, c, add);
        case 2: return tile_of<P, 2>(b, depth, a, step, c, add);
        default: return tile_of<P, 1>(b, depth, a, step, c, add);
    }
}

inline void tile_of(int panels, int rows, const float* b, int depth, const float* const* a, int64_t step,
                    float* const* c, bool add) {
    switch (panels) {
        case 1: return tile_of<1>(rows, b, depth, a, step, c, add);
#if LANES == 16
        case 2: return tile_of<2>(rows, b, depth, a, step, c, add);
        case 3: return tile_of<3>(rows, b, depth, a, step, c, add);
#endif
    }
}

// How many of `left` rows the next tile takes: evenly shared out among tiles of at most `most`.
inline int next_rows(int left, int most) { return (left + (left + most - 1) / most - 1) / ((left + most - 1) / most); }

// Columns [begin, end) of a matrix with `depth` rows (B as it is) as groups of kAcross panels: [group][k][16 * panels].
inline void pack_straight(const ConstRows& b, int64_t first, int depth, int begin, int end, float* to) {
    for (int column = begin; column < end; column += kAcross * kPanel) {
        const int wide = std::min(kAcross * kPanel, padded(end - column)), real = std::min(wide, end - column);
        for (int k = 0; k < depth; ++k, to += wide) {
            const float* from = b[first + k] + column;
            if (real == wide) {
                for (int i = 0; i < wide; i += LANES) store(to + i, load(from + i));
            } else {
                std::memcpy(to, from, real * 4);
                std::memset(to + real, 0, (wide - real) * 4);
            }
        }
    }
}

// The same where B's columns are the rows of `b` (weights: outputs, inputs).
inline void pack_turned(const ConstRows& b, int64_t first, int depth, int begin, int end, float* to) {
    for (int column = begin; column < end; column += kAcross * kPanel) {
        const int wide = std::min(kAcross * kPanel, padded(end - column)), real = std::min(wide, end - column);
        if (real < wide) std::memset(to, 0, int64_t(depth) * wide * 4);
        for (int i = 0; i < real; i += LANES)
            for (int k = 0; k < depth; k += LANES) {
                float* place = to + int64_t(k) * wide + i;
                const int down = std::min(LANES, depth - k), across = std::min(LANES, real - i);
                if (down == LANES && across == LANES) {
                    vec square[LANES];
#pragma GCC unroll 32
                    for (int row = 0; row < LANES; ++row) square[row] = load(b[column + i + row] + first + k);
                    transpose(square);
#pragma GCC unroll 32
                    for (int row = 0; row < LANES; ++row) store(place + int64_t(row) * wide, square[row]);
                } else {
                    for (int row = 0; row < across; ++row)
                        for (int j = 0; j < down; ++j) place[int64_t(j) * wide + row] = b[column + i + row][first + k + j];
                }
            }
        to += int64_t(depth) * wide;
    }
}

// A product's operands. A is (rows, depth), or stored as (depth, rows) where `a_turned`; B is (depth, columns), or
// stored as (columns, depth) where `b_turned`.
struct Product {
    ConstRows a;
    bool a_turned;
    ConstRows b;
    bool b_turned;
    MutableRows c;
    int rows, depth, columns;
    bool add = false;             // C += A B
    const float* bias = nullptr;  // (columns), added to every row where C is not added to
    const float* whole = nullptr;  // all of B from `pack`, or none: packed on the way

    // How many floats all of B comes to.
    static size_t packed_size(int depth, int columns) { return size_t(depth) * padded(columns); }
    // All of B, for products with these operands; block after block, as `run` wants them.
    void pack(float* to) const {
        for (int left = 0; left < columns; left += kBroad)
            for (int deep = 0; deep < depth; deep += kDeep) pack_block(left, deep, to + block_at(left, deep));
    }

    // The same for columns [begin, end) alone.
    Product between(int begin, int end) const {
        Product part = *this;
        part.b = b_turned ? b.below(begin) : b.shifted(begin);
        part.c = c.shifted(begin);
        part.columns = end - begin;
        if (bias) part.bias = bias + begin;
        return part;
    }

    // Rows [begin, end) of C; `packed` holds kDeep * kBroad floats where B is not packed already, `turned` kDeep * kDown
    // where A is turned.
    void run(int begin, int end, float* packed, float* turned) const {
        float spare[kDown][kAcross * kPanel];
        const float* from[kDown];
        float *to[kDown], *rows_of_c[kDown];
        const float* deeper[kDeep];
        for (int left = 0; left < columns; left += kBroad) {
            const int right = std::min(columns, left + kBroad);
            for (int deep = 0; deep < std::max(depth, 1); deep += kDeep) {
                const int many = std::min(kDeep, depth - deep);
                const float* block = whole ? whole + block_at(left, deep) : packed;
                if (!whole) pack_block(left, deep, packed);
                const bool adds = add || deep > 0;
                if (a_turned)
                    for (int k = 0; k < many; ++k) deeper[k] = a[deep + k];
                int count;
                for (int row = begin; row < end; row += count) {
                    count = next_rows(end - row, kDown);
                    if (a_turned) {
                        if (row + kDown <= end)
                            for (int k = 0; k < many; ++k) std::memcpy(turned + k * kDown, deeper[k] + row, kDown * 4);
                        else
                            for (int k = 0; k < many; ++k) std::memcpy(turned + k * kDown, deeper[k] + row, count * 4);
                        for (int r = 0; r < count; ++r) from[r] = turned + r;
                    } else {
                        for (int r = 0; r < count; ++r) from[r] = a[row + r] + deep;
                    }
                    for (int r = 0; r < count; ++r) rows_of_c[r] = c[row + r];
                    const float* weights = block;
                    for (int column = left; column < right; column += kAcross * kPanel) {
                        const int wide = std::min(kAcross * kPanel, padded(right - column));
                        const int real = std::min(wide, right - column);
                        for (int r = 0; r < count; ++r) {
                            float* place = rows_of_c[r] + column;
                            to[r] = real == wide ? place : spare[r];
                            if (real < wide && adds) std::memcpy(spare[r], place, real * 4);
                        }
                        tile_of(wide / kPanel, count, weights, many, from, a_turned ? kDown : 1, to, adds);
                        for (int r = 0; r < count; ++r) {
                            if (bias && !adds)
                                for (int i = 0; i < real; ++i) to[r][i] += bias[column + i];
                            if (real < wide) std::memcpy(rows_of_c[r] + column, spare[r], real * 4);
                        }
                        weights += int64_t(many) * wide;
                    }
                }
            }
        }
    }

private:
    // Where the block of B from a column and a row on lies among all of them.
    int64_t block_at(int left, int deep) const {
        return int64_t(left) * depth + int64_t(deep) * padded(std::min(kBroad, columns - left));
    }
    void pack_block(int left, int deep, float* to) const {
        const int right = std::min(columns, left + kBroad), many = std::min(kDeep, depth - deep);
        if (b_turned)
            pack_turned(b, deep, many, left, right, to);
        else
            pack_straight(b, deep, many, left, right, to);
    }
};

// Memory for products, kept from call to call; one part's share each.
class ProductSpace {
public:
    float* packed(int part) { return held(part); }
    float* turned(int part) { return held(part) + kDeep * kBroad; }
    void reserve(int parts) {
        while (int(held_.size()) < parts) held_.emplace_back(size_t(kDeep) * (kBroad + kDown));
    }

private:
    float* held(int part) { return held_[part].data(); }
    std::vector<Buffer<float>> held_;
};

inline void multiply(Pool& pool, ProductSpace& space, const Product& product) {
    // Each part packs all of B's rows for its columns: of a wide product every part takes columns, of another one rows.
    const bool across = product.columns >= 2 * kBroad || product.rows < 4 * kDown * pool.threads();
    const int unit = across ? kAcross * kPanel : kDown, size = across ? product.columns : product.rows;
    const double work = double(product.rows) * product.depth * product.columns;
    // Below some 2 million multiplications handing over costs more than it brings.
    const int parts = std::max(1, std::min({pool.threads(), size / ((across ? 1 : 4) * unit), int(work / 2e6)}));
    space.reserve(parts);
    if (parts > 1) pool.wake();
    const int units = (size + unit - 1) / unit;
    pool.run(parts, [&](int part) {
        const int begin = int(int64_t(units) * part / parts) * unit;
        const int end = std::min(size, int(int64_t(units) * (part + 1) / parts) * unit);
        if (across)
            product.between(begin, end).run(0, product.rows, space.packed(part), space.turned(part));
        else
            product.run(begin, end, space.packed(part), space.turned(part));
    });
}

}  // namespace INKLING_ISA
