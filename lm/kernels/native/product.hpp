// Products of large matrices, C = A B or C += A B, for training: blocked, packed on the way, any layout. Operands and
// sums are fp32; an object with INKLING_BF16 rounds both operands to bf16 where it packs them.
//
// An element's sum goes along k in blocks of kDeep; other rows and the number of threads do not change it.
#pragma once

#include <algorithm>
#include <vector>

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#include "linear.hpp"
#include "slots.hpp"
#if defined(INKLING_AMX)
#include "amx.hpp"
#elif defined(INKLING_BFMMLA)
#include "bfmmla.hpp"
#endif

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

#if defined(INKLING_AMX)
constexpr int kAcross = 2, kDown = 32;  // panels and rows of C held in tiles
#elif LANES == 16
constexpr int kAcross = 3, kDown = 8;  // panels and rows of C held in registers
#else
constexpr int kAcross = 1, kDown = 6;
#endif
constexpr int kDeep = 512;           // of k at a time: a tile's rows of A stay in the first cache

// Columns at a time: the block of B takes 15 of 32 parts of the second cache, as the system reports it, or of 1 MB. No
// sum depends on it.
inline int broad() {
    static const int columns = [] {
        long bytes = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
        bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
        if (bytes <= 0) bytes = 1 << 20;
        const long most = bytes / 32 * 15 / (slots(kDeep) * 4);
        constexpr long kUnit = kAcross * kPanel;
        return int(std::clamp(most / kUnit * kUnit, 2 * kUnit, 20 * kUnit));
    }();
    return columns;
}
#if defined(INKLING_BF16)
constexpr int kGroup = kDown > 16 ? kDown : 16;    // rows of A that are rounded at a time
constexpr int kRowStep = slots(kDeep) + kPanel;    // from row to row of them
constexpr int kHeld = kGroup * kRowStep;
#else
constexpr int kGroup = kDown, kHeld = kDeep * kDown;
#endif

#if defined(INKLING_AMX)

// As below; the rows of A lie at equal distances, and kDown of them can be read, of which only `rows` are there.
inline void tile_of(int panels, int rows, const float* b, int depth, const float* const* a, int64_t, float* const* c,
                    bool add) {
    const int64_t step = rows > 1 ? a[1] - a[0] : 0;
    if (panels == 1)
        rows > kTile ? amx_tile<1, 2>(rows, b, depth, a[0], step, c, add) : amx_tile<1, 1>(rows, b, depth, a[0], step, c, add);
    else
        rows > kTile ? amx_tile<2, 2>(rows, b, depth, a[0], step, c, add) : amx_tile<2, 1>(rows, b, depth, a[0], step, c, add);
}

#else

struct Tiles {
    ~Tiles() {}
};

#if defined(INKLING_BFMMLA)

template <int P, int R>
inline void tile_of(const float* b, int depth, const float* const* a, int64_t, float* const* c, bool add) {
    static_assert(P == 1);
    bfmmla_tile<R>(b, depth, a, c, add);
}

#else

// c[r][0 .. 16 P) = (or +=) the sum over `depth` slots of a[r][k * step] * b[k][0 .. 16 P)
template <int P, int R>
inline void tile_of(const float* b, int depth, const float* const* a, int64_t step, float* const* c, bool add) {
    vec sums[P * kParts][R] = {};
    for (int k = 0; k < depth; ++k) {
        vec part[P * kParts];
#pragma GCC unroll 32
        for (int p = 0; p < P * kParts; ++p) part[p] = load(b + p * LANES);
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) {
            const vec value = broadcast_slot(a[r][k * step]);
#pragma GCC unroll 32
            for (int p = 0; p < P * kParts; ++p) add_products(sums[p][r], part[p], value);
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

#endif

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

#endif

// How many of `left` rows the next tile takes: divided evenly among tiles of at most `most`.
inline int next_rows(int left, int most) { return (left + (left + most - 1) / most - 1) / ((left + most - 1) / most); }

#if defined(INKLING_BF16)

// Columns [begin, end) of a matrix with `depth` rows (B as it is) as groups of kAcross panels: [group][slot][16 * panels].
inline void pack_straight(const ConstRows& b, int64_t first, int depth, int begin, int end, float* to) {
    for (int column = begin; column < end; column += kAcross * kPanel) {
        const int wide = std::min(kAcross * kPanel, padded(end - column)), real = std::min(wide, end - column);
        for (int k = 0; k < slots(depth) * kPair; k += kPair, to += wide) {
            const float* rows[kPair] = {k < depth ? b[first + k] + column : nullptr,
                                        k + 1 < depth ? b[first + k + 1] + column : nullptr};
            for (int i = 0; i < wide; i += LANES) {
                const auto of = [&](const float* row) { return row && i < real ? load_few(row + i, real - i) : vec{}; };
                store(to + i, paired(of(rows[0]), of(rows[1])));
            }
        }
    }
}

// The same where B's columns are the rows of `b` (weights: outputs, inputs).
inline void pack_transposed(const ConstRows& b, int64_t first, int depth, int begin, int end, float* to) {
    for (int column = begin; column < end; column += kAcross * kPanel) {
        const int wide = std::min(kAcross * kPanel, padded(end - column));
        for (int i = 0; i < wide; i += LANES) {
            const float* rows[LANES];
            for (int row = 0; row < LANES; ++row)
                rows[row] = column + i + row < end ? b[column + i + row] + first : nullptr;
            for (int slot = 0; slot < slots(depth); slot += LANES) {
                vec square[LANES];
#pragma GCC unroll 32
                for (int row = 0; row < LANES; ++row)
                    square[row] = rows[row] ? load_slots(rows[row] + slot * kPair, depth - slot * kPair) : vec{};
                transpose(square);
                const int count = std::min(LANES, slots(depth) - slot);
                for (int k = 0; k < count; ++k) store(to + int64_t(slot + k) * wide + i, square[k]);
            }
        }
        to += int64_t(slots(depth)) * wide;
    }
}

#else

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
inline void pack_transposed(const ConstRows& b, int64_t first, int depth, int begin, int end, float* to) {
    for (int column = begin; column < end; column += kAcross * kPanel) {
        const int wide = std::min(kAcross * kPanel, padded(end - column)), real = std::min(wide, end - column);
        if (real < wide) std::memset(to, 0, int64_t(depth) * wide * 4);
        for (int i = 0; i < real; i += LANES)
            for (int k = 0; k < depth; k += LANES) {
                float* corner = to + int64_t(k) * wide + i;
                const int down = std::min(LANES, depth - k), across = std::min(LANES, real - i);
                if (down == LANES && across == LANES) {
                    vec square[LANES];
#pragma GCC unroll 32
                    for (int row = 0; row < LANES; ++row) square[row] = load(b[column + i + row] + first + k);
                    transpose(square);
#pragma GCC unroll 32
                    for (int row = 0; row < LANES; ++row) store(corner + int64_t(row) * wide, square[row]);
                } else {
                    for (int row = 0; row < across; ++row)
                        for (int j = 0; j < down; ++j)
                            corner[int64_t(j) * wide + row] = b[column + i + row][first + k + j];
                }
            }
        to += int64_t(depth) * wide;
    }
}

#endif

// A product's operands. A is (rows, depth), or stored as (depth, rows) where `a_transposed`; B is (depth, columns), or
// stored as (columns, depth) where `b_transposed`.
struct Product {
    ConstRows a;
    bool a_transposed;
    ConstRows b;
    bool b_transposed;
    MutableRows c;
    int rows, depth, columns;
    bool add = false;             // C += A B
    const float* bias = nullptr;  // (columns), added to every row where C is not added to
    const float* whole = nullptr;  // all of B from `pack`, or none: packed on the way

    // How many floats all of B comes to.
    static size_t packed_size(int depth, int columns) { return size_t(slots(depth)) * padded(columns); }
    // All of B, for products with these operands; block after block, in the order in which `run` reads them.
    void pack(float* to) const {
        for (int left = 0; left < columns; left += broad())
            for (int deep = 0; deep < depth; deep += kDeep) pack_block(left, deep, to + block_at(left, deep));
    }

    // The same for columns [begin, end) alone.
    Product between(int begin, int end) const {
        Product part = *this;
        part.b = b_transposed ? b.below(begin) : b.shifted(begin);
        part.c = c.shifted(begin);
        part.columns = end - begin;
        if (bias) part.bias = bias + begin;
        return part;
    }

    // Rows [begin, end) of C; `packed` holds kDeep * broad() floats where B is not packed already.
    void run(int begin, int end, float* packed) const {
        alignas(64) float held[kHeld];
        float spare[kDown][kAcross * kPanel];
        const float* from[kGroup];
        float *to[kDown], *rows_of_c[kDown];
        const float* deeper[kDeep];
        const Tiles tiles;
        for (int left = 0; left < columns; left += broad()) {
            const int right = std::min(columns, left + broad());
            for (int deep = 0; deep < std::max(depth, 1); deep += kDeep) {
                const int many = std::min(kDeep, depth - deep);
                const float* block = whole ? whole + block_at(left, deep) : packed;
                if (!whole) pack_block(left, deep, packed);
                const bool adds = add || deep > 0;
                if (a_transposed)
                    for (int k = 0; k < many; ++k) deeper[k] = a[deep + k];
                for (int group = begin, rows_in; group < end; group += rows_in) {
                    rows_in = next_rows(end - group, kGroup);
                    const int64_t step = hold(group, rows_in, end, deep, many, deeper, held, from);
                    for (int first = 0, count; first < rows_in; first += count) {
                        count = next_rows(rows_in - first, kDown);
                        for (int r = 0; r < count; ++r) rows_of_c[r] = c[group + first + r];
                        const float* weights = block;
                        for (int column = left; column < right; column += kAcross * kPanel) {
                            const int wide = std::min(kAcross * kPanel, padded(right - column));
                            const int real = std::min(wide, right - column);
                            for (int r = 0; r < count; ++r) {
                                float* direct = rows_of_c[r] + column;
                                to[r] = real == wide ? direct : spare[r];
                                if (real < wide && adds) std::memcpy(spare[r], direct, real * 4);
                            }
                            tile_of(wide / kPanel, count, weights, slots(many), from + first, step, to, adds);
                            for (int r = 0; r < count; ++r) {
                                if (bias && !adds)
                                    for (int i = 0; i < real; ++i) to[r][i] += bias[column + i];
                                if (real < wide) std::memcpy(rows_of_c[r] + column, spare[r], real * 4);
                            }
                            weights += int64_t(slots(many)) * wide;
                        }
                    }
                }
            }
        }
    }

private:
    // The offset of the packed block of B that begins at a column and a row.
    int64_t block_at(int left, int deep) const {
        return int64_t(left) * slots(depth) + int64_t(slots(deep)) * padded(std::min(broad(), columns - left));
    }

    // Where a tile reads `count` rows of A from `row` on, their slots at [deep, deep + many): from[r], and how far it is
    // from slot to slot. `deeper`: the rows of a transposed A; `held`: memory for rows that have to be copied.
#if !defined(INKLING_BF16)
    int64_t hold(int row, int count, int end, int deep, int many, const float* const* deeper, float* held,
                 const float** from) const {
        if (!a_transposed) {
            for (int r = 0; r < count; ++r) from[r] = a[row + r] + deep;
            return 1;
        }
        if (row + kDown <= end)
            for (int k = 0; k < many; ++k) std::memcpy(held + k * kDown, deeper[k] + row, kDown * 4);
        else
            for (int k = 0; k < many; ++k) std::memcpy(held + k * kDown, deeper[k] + row, count * 4);
        for (int r = 0; r < count; ++r) from[r] = held + r;
        return kDown;
    }
#else
    int64_t hold(int row, int count, int, int deep, int many, const float* const* deeper, float* held,
                 const float** from) const {
        if (!a_transposed) {
            for (int r = 0; r < count; ++r) {
                const float* numbers = a[row + r] + deep;
                from[r] = held + r * kRowStep;
                for (int k = 0; k < slots(many); k += LANES)
                    store(held + r * kRowStep + k, load_slots(numbers + k * kPair, many - k * kPair));
            }
            return 1;
        }
        const auto slot_of = [&](int slot, int r) {  // of rows r, r + 1, ... of the group
            const int k = slot * kPair, few = count - r;
            return paired(k < many ? load_few(deeper[k] + row + r, few) : vec{},
                          k + 1 < many ? load_few(deeper[k + 1] + row + r, few) : vec{});
        };
#if defined(INKLING_AMX) || defined(INKLING_BFMMLA)
        for (int r = 0; r < count; r += LANES)
            for (int slot = 0; slot < slots(many); slot += LANES) {
                vec square[LANES];
                for (int k = 0; k < LANES; ++k) square[k] = slot_of(slot + k, r);
                transpose(square);
                for (int i = 0; i < LANES; ++i) store(held + (r + i) * kRowStep + slot, square[i]);
            }
        for (int r = 0; r < count; ++r) from[r] = held + r * kRowStep;
        return 1;
#else
        for (int slot = 0; slot < slots(many); ++slot)
            for (int r = 0; r < count; r += LANES) store(held + slot * kGroup + r, slot_of(slot, r));
        for (int r = 0; r < count; ++r) from[r] = held + r;
        return kGroup;
#endif
    }
#endif


    void pack_block(int left, int deep, float* to) const {
        const int right = std::min(columns, left + broad()), many = std::min(kDeep, depth - deep);
        if (b_transposed)
            pack_transposed(b, deep, many, left, right, to);
        else
            pack_straight(b, deep, many, left, right, to);
    }
};

// Memory for products, kept from call to call; one buffer a part.
class ProductSpace {
public:
    float* packed(int part) { return held_[part].data(); }
    void reserve(int parts) {
        while (int(held_.size()) < parts) held_.emplace_back(size_t(slots(kDeep)) * broad());
    }

private:
    std::vector<Buffer<float>> held_;
};

inline void multiply(Pool& pool, ProductSpace& space, const Product& product) {
    // Each part packs all of B's rows for its columns: a wide product is divided by columns, another one by rows.
    const bool across = product.columns >= 2 * broad() || product.rows < 4 * kDown * pool.threads();
    const int unit = across ? kAcross * kPanel : kDown, size = across ? product.columns : product.rows;
    const double work = double(product.rows) * product.depth * product.columns;
    // Below some 2 million multiplications a second thread costs more than it gains.
    const int parts = std::max(1, std::min({pool.threads(), size / ((across ? 1 : 4) * unit), int(work / 2e6)}));
    space.reserve(parts);
    if (parts > 1) pool.wake();
    const int units = (size + unit - 1) / unit;
    pool.run(parts, [&](int part) {
        const int begin = int(int64_t(units) * part / parts) * unit;
        const int end = std::min(size, int(int64_t(units) * (part + 1) / parts) * unit);
        if (across)
            product.between(begin, end).run(0, product.rows, space.packed(part));
        else
            product.run(begin, end, space.packed(part));
    });
}

}  // namespace INKLING_ISA
