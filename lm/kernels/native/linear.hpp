// Matrix products with weights packed once, for any number of rows; a row's result does not depend on the others.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "pool.hpp"
#include "simd.hpp"

namespace INKLING_ISA {


// Memory that vectors can be loaded from, zero at first.
template <class T>
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(size_t count) {
        // calloc's pages come from the system when they are first touched: what is never used costs nothing.
        raw_.reset(static_cast<char*>(std::calloc(count * sizeof(T) + 64, 1)));
        if (!raw_) throw std::bad_alloc();
        data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(raw_.get()) + 63) / 64 * 64);
    }
    T* data() const { return data_; }
    T& operator[](size_t i) const { return data_[i]; }

private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    std::unique_ptr<char, Free> raw_;
    T* data_ = nullptr;
};

// A matrix (N outputs, K inputs) as panels of 16 outputs: fp32 [panel][k][16], or int8 with a scale an output,
// [panel][k / 4][16][4], as the dot-product instructions of four bytes want it.
struct Packed {
    int outputs = 0, inputs = 0, panels = 0;
    bool int8 = false;
    Buffer<float> weights;
    Buffer<int8_t> bytes;
    Buffer<float> scales;    // (panels * 16): weight = byte * scale
    Buffer<int32_t> sums;    // (panels * 16): 128 * the sum of an output's bytes
    Buffer<float> bias;      // (panels * 16), zero where there is none

    Packed() = default;

    // `row(i)` gives the K weights of output i, or nullptr for one that only fills a panel; `offset(i)` its bias.
    template <class Row, class Offset>
    Packed(int outputs, int inputs, bool int8, const Row& row, const Offset& offset)
        : outputs(outputs), inputs(inputs), panels(padded(outputs) / kPanel), int8(int8), bias(size_t(panels) * kPanel) {
        const size_t quads = (inputs + 3) / 4, rows = size_t(panels) * kPanel;
        if (int8) {
            bytes = Buffer<int8_t>(rows * quads * 4);
            scales = Buffer<float>(rows);
            sums = Buffer<int32_t>(rows);
        } else {
            weights = Buffer<float>(rows * inputs);
        }
        for (int out = 0; out < outputs; ++out) {
            const float* from = row(out);
            bias[out] = offset(out);
            if (from == nullptr) continue;
            const size_t panel = out / kPanel, lane = out % kPanel;
            if (!int8) {
                for (int k = 0; k < inputs; ++k) weights[(panel * inputs + k) * kPanel + lane] = from[k];
                continue;
            }
            float most = 0;
            for (int k = 0; k < inputs; ++k) most = std::max(most, std::fabs(from[k]));
            const float scale = most / 127.0f, inverse = most > 0 ? 127.0f / most : 0.0f;
            int32_t sum = 0;
            for (int k = 0; k < inputs; ++k) {
                const int8_t byte = int8_t(std::nearbyint(from[k] * inverse));
                bytes[((panel * quads + k / 4) * kPanel + lane) * 4 + k % 4] = byte;
                sum += byte;
            }
            scales[out] = scale;
            sums[out] = 128 * sum;
        }
    }

    size_t nbytes() const {
        return int8 ? size_t(panels) * kPanel * ((inputs + 3) / 4 * 4 + 8) : size_t(panels) * kPanel * inputs * 4;
    }
};

// Rows of inputs: pointers to K floats each, and for int8 weights the same rows as bytes, each with a scale.
struct Rows {
    int count = 0;
    std::vector<const float*> at;
    std::vector<const uint8_t*> bytes;
    std::vector<float> scales;
    Buffer<uint8_t> held;
    int stride = 0;

    Rows() = default;
    Rows(int most, int inputs, bool int8) : at(most), stride((inputs + 63) / 64 * 64) {
        if (!int8) return;
        held = Buffer<uint8_t>(size_t(most) * stride);
        bytes.resize(most);
        scales.resize(most);
        for (int row = 0; row < most; ++row) bytes[row] = held.data() + size_t(row) * stride;
    }

    void set(int row, const float* from) { at[row] = from; }

    // Bytes from 1 to 255 around 128, by the largest value of the row.
    void quantize(int row, int inputs) {
        const float* from = at[row];
        float lanes[kPanel] = {};
        int k = 0;
        for (; k + kPanel <= inputs; k += kPanel)
            for (int i = 0; i < kPanel; ++i) lanes[i] = std::max(lanes[i], std::fabs(from[k + i]));
        float most = 0;
        for (; k < inputs; ++k) most = std::max(most, std::fabs(from[k]));
        for (float lane : lanes) most = std::max(most, lane);
        const float inverse = most > 0 ? 127.0f / most : 0.0f;
        uint8_t* to = held.data() + size_t(row) * stride;
        for (k = 0; k < inputs; ++k) {
            // Rounded by the same trick as in `exp`, which every compiler turns into vectors.
            const float rounded = (from[k] * inverse + 12582912.0f) - 12582912.0f;
            to[k] = uint8_t(int32_t(rounded) + 128);
        }
        for (; k % 4; ++k) to[k] = 128;
        scales[row] = most / 127.0f;
    }
};

// -- the innermost loops: P panels times R rows, sums held in registers --------------------------------------------

// `ahead` says which of the P panels after these to call from memory meanwhile, one bit each.

template <int P, int R>
inline void tile(const Packed& w, int panel, const float* const* x, float* const* y, int at, unsigned ahead) {
    const int inputs = w.inputs;
    const float* from = w.weights.data() + size_t(panel) * inputs * kPanel;
    const size_t next = size_t(inputs) * kPanel;
    vec sums[P * kParts][R] = {};
    for (int k = 0; k < inputs; ++k) {
        vec part[P * kParts];
#pragma GCC unroll 32
        for (int p = 0; p < P * kParts; ++p) part[p] = load(from + (p / kParts) * next + (p % kParts) * LANES);
        if constexpr (R > 1)
#pragma GCC unroll 32
            for (int p = 0; p < P; ++p)
                if (ahead >> p & 1) __builtin_prefetch(from + (P + p) * next, 0, 2);
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) {
            const vec value = spread(x[r][k]);
#pragma GCC unroll 32
            for (int p = 0; p < P * kParts; ++p) sums[p][r] += part[p] * value;
        }
        from += kPanel;
    }
    const float* bias = w.bias.data() + size_t(panel) * kPanel;
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
        for (int p = 0; p < P * kParts; ++p) store(y[r] + at + p * LANES, sums[p][r] + load(bias + p * LANES));
}

#if LANES == 16
struct Dots {
    __m512i sums;
    void clear() { sums = _mm512_setzero_si512(); }
    void add(const int8_t* w, uint32_t four) {
        sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi32(int(four)), _mm512_loadu_si512(w));
    }
    void save(int32_t* to) const { _mm512_storeu_si512(to, sums); }
};
#elif LANES == 8
// Without VNNI: products of 16-bit values, which cannot overflow; neighbours are added at the end.
struct Dots {
    __m256i sums[4];
    void clear() {
        for (auto& sum : sums) sum = _mm256_setzero_si256();
    }
    void add(const int8_t* w, uint32_t four) {
        const __m256i value = _mm256_cvtepu8_epi16(_mm_set1_epi32(int(four)));
        for (int i = 0; i < 4; ++i) {
            const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16 * i)));
            sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(value, wide));
        }
    }
    void save(int32_t* to) const {
        for (int i = 0; i < 4; ++i) {
            int32_t pairs[8];
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs), sums[i]);
            for (int j = 0; j < 4; ++j) to[4 * i + j] = pairs[2 * j] + pairs[2 * j + 1];
        }
    }
};
#else
struct Dots {
    int32_t sums[kPanel];
    void clear() { std::memset(sums, 0, sizeof sums); }
    void add(const int8_t* w, uint32_t four) {
        uint8_t x[4];
        std::memcpy(x, &four, 4);
        for (int i = 0; i < kPanel; ++i)
            sums[i] += x[0] * w[4 * i] + x[1] * w[4 * i + 1] + x[2] * w[4 * i + 2] + x[3] * w[4 * i + 3];
    }
    void save(int32_t* to) const { std::memcpy(to, sums, sizeof sums); }
};
#endif

template <int P, int R>
inline void tile(const Packed& w, int panel, const uint8_t* const* x, const float* scales, float* const* y, int at,
                 unsigned ahead) {
    const size_t quads = (w.inputs + 3) / 4, next = quads * 64;
    const int8_t* from = w.bytes.data() + size_t(panel) * next;
    Dots dots[P][R];
#pragma GCC unroll 32
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) dots[p][r].clear();
    for (size_t quad = 0; quad < quads; ++quad) {
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) {
            uint32_t four;
            std::memcpy(&four, x[r] + 4 * quad, 4);
#pragma GCC unroll 32
            for (int p = 0; p < P; ++p) dots[p][r].add(from + p * next, four);
        }
        if constexpr (R > 1)
#pragma GCC unroll 32
            for (int p = 0; p < P; ++p)
                if (ahead >> p & 1) __builtin_prefetch(from + (P + p) * next, 0, 2);
        from += 64;
    }
#pragma GCC unroll 32
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) {
            alignas(64) int32_t sums[kPanel];
            dots[p][r].save(sums);
            const size_t out = size_t(panel + p) * kPanel;
            float* to = y[r] + at + p * kPanel;
            for (int i = 0; i < kPanel; ++i)
                to[i] = float(sums[i] - w.sums[out + i]) * (w.scales[out + i] * scales[r]) + w.bias[out + i];
        }
}

#if LANES == 16
constexpr int kWide = 8, kTall = 4, kRows = 6;  // panels for one row; panels and rows for several
constexpr int kWideBytes = 8, kTallBytes = 4;
#else
constexpr int kWide = 4, kTall = 1, kRows = 6;
constexpr int kWideBytes = 2, kTallBytes = 1;
#endif

template <int P, int R>
inline void block(const Packed& w, int panel, const Rows& x, int row, float* const* y, int at, unsigned ahead = 0) {
    if (w.int8)
        tile<P, R>(w, panel, x.bytes.data() + row, x.scales.data() + row, y + row, at, ahead);
    else
        tile<P, R>(w, panel, x.at.data() + row, y + row, at, ahead);
}

template <int P>
inline void strip(const Packed& w, int panel, const Rows& x, float* const* y, int at) {
    // The next panels come from memory while these are computed: a share of them during each pass over the rows, so
    // that the passes do not wait for them.
    const int passes = (x.count + kRows - 1) / kRows;
    int row = 0;
    for (int pass = 0; pass < passes; ++pass, row += kRows) {
        unsigned ahead = 0;
        for (int p = 0; p < P; ++p)
            if (p * passes / P == pass) ahead |= 1u << p;
        switch (std::min(kRows, x.count - row)) {
            case 6: block<P, 6>(w, panel, x, row, y, at, ahead); break;
            case 5: block<P, 5>(w, panel, x, row, y, at, ahead); break;
            case 4: block<P, 4>(w, panel, x, row, y, at, ahead); break;
            case 3: block<P, 3>(w, panel, x, row, y, at, ahead); break;
            case 2: block<P, 2>(w, panel, x, row, y, at, ahead); break;
            case 1: block<P, 1>(w, panel, x, row, y, at, ahead); break;
        }
    }
}

// y[row][16 * (panel - begin) ...] for the panels from begin to end.
inline void multiply(const Packed& w, const Rows& x, float* const* y, int begin, int end, int at = 0) {
    int panel = begin;
    auto place = [&] { return at + (panel - begin) * kPanel; };
    if (x.count == 1) {
        const int wide = w.int8 ? kWideBytes : kWide;
        for (; panel + wide <= end; panel += wide) {
            if (w.int8)
                block<kWideBytes, 1>(w, panel, x, 0, y, place());
            else
                block<kWide, 1>(w, panel, x, 0, y, place());
        }
    }
    for (; panel + kTall <= end; panel += kTall) strip<kTall>(w, panel, x, y, place());
    for (; panel < end; ++panel) strip<1>(w, panel, x, y, place());
}

// The whole product, shared out among threads in groups of `unit` panels; finish(begin, end) is called by the thread
// that has just computed those panels, for what goes on element by element.
template <class Finish>
inline void multiply(Pool& pool, const Packed& w, const Rows& x, float* const* y, int unit, const Finish& finish) {
    const int units = w.panels / unit;
    const size_t work = w.nbytes() * size_t(1 + x.count / 4);
    // A part below some 32 KB of weights takes less time than handing it over.
    const int most = std::max<size_t>(1, work >> 15);
    const int parts = std::min({units, most, pool.threads() * 4});
    pool.run(pool.threads() == 1 ? 1 : parts, [&](int part) {
        const int count = pool.threads() == 1 ? 1 : parts;
        const int begin = int(int64_t(units) * part / count) * unit, end = int(int64_t(units) * (part + 1) / count) * unit;
        multiply(w, x, y, begin, end, begin * kPanel);
        finish(begin, end);
    });
}
inline void multiply(Pool& pool, const Packed& w, const Rows& x, float* const* y) {
    multiply(pool, w, x, y, 1, [](int, int) {});
}

}  // namespace INKLING_ISA
