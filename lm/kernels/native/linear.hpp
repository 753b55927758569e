// Matrix products with weights packed once, for any number of rows; a row's result does not depend on the others.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernel.hpp"
#include "pool.hpp"
#include "slots.hpp"

namespace INKLING_ISA {

struct Free {
    void operator()(char* p) const { std::free(p); }
};
using Memory = std::unique_ptr<char, Free>;

// Zeros, from the first address that is a multiple of `alignment` on. calloc's pages come from the system when they are
// first touched: what is never used costs nothing.
inline char* zeros(Memory& memory, size_t bytes, size_t alignment) {
    memory.reset(static_cast<char*>(std::calloc(bytes + alignment, 1)));
    if (!memory) throw std::bad_alloc();
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.get()) + alignment - 1) / alignment * alignment);
}

// Memory for many arrays that are read one after the other, in huge pages where Linux has them: reading it needs fewer
// address translations, which limit the speed of reading memory.
class Arena {
public:
    char* take(size_t bytes) {
        const size_t kHuge = 2 << 20, kChunk = 16 << 20;
        bytes = (bytes + 63) / 64 * 64;
        if (bytes > left_) {
            left_ = (std::max(bytes, kChunk) + kHuge - 1) / kHuge * kHuge;
            next_ = zeros(chunks_.emplace_back(), left_, kHuge);
#if defined(MADV_HUGEPAGE)
            // A hint: without huge pages the memory is only slower.
            (void)madvise(next_, left_, MADV_HUGEPAGE);
#endif
        }
        char* const taken = next_;
        next_ += bytes;
        left_ -= bytes;
        return taken;
    }

private:
    std::vector<Memory> chunks_;
    char* next_ = nullptr;
    size_t left_ = 0;
};

// Memory that vectors can be loaded from, zero at first; its own, or from an arena that outlives it.
template <class T>
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(size_t count, Arena* arena = nullptr)
        : data_(reinterpret_cast<T*>(arena ? arena->take(count * sizeof(T)) : zeros(raw_, count * sizeof(T), 64))) {}
    T* data() const { return data_; }
    T& operator[](size_t i) const { return data_[i]; }

    // For memory of which only a part is used: no huge pages, which would come whole.
    void in_small_pages([[maybe_unused]] size_t count) {
#if defined(MADV_NOHUGEPAGE)
        constexpr uintptr_t page = 4096;
        const uintptr_t begin = (reinterpret_cast<uintptr_t>(data_) + page - 1) / page * page,
                        end = reinterpret_cast<uintptr_t>(data_ + count) / page * page;
        if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_NOHUGEPAGE);
#endif
    }

private:
    Memory raw_;
    T* data_ = nullptr;
};

// int4: blocks of 32 inputs, each with a scale and a minimum an output: weight = code * scale + minimum, codes 0 to 15.
// [panel][block] of [4 vectors of 64 bytes][16 minima][16 scales]. A byte of vector i holds the codes of quads i and
// i + 4 of the block, for output and input as an int8 panel has them. Minima and scales are float16, as in GGUF files.
constexpr int kBlock = 32, kCodes = 256, kBlockBytes = kCodes + 64;
// int8 by blocks: bytes of 32 inputs with a scale an output. [panel][block] of [8 vectors of 64 bytes][16 scales]:
// vector i holds the bytes of quad i, as an int8 panel has them; scales are float16.
constexpr int kBytes = 512, kByteBlockBytes = kBytes + 32;

inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float bits_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
// The float32 with the value of a float16.
inline float from_half(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
    // With the exponent in place the value is 2^112 too small, also of a denormal; infinity and NaN are separate.
    const float scaled = bits_float(magnitude << 13) * 5.192296858534828e33f;
    return bits_float(sign | (magnitude >= 0x7c00 ? magnitude << 13 | 0x7f800000 : float_bits(scaled)));
}
// The nearest float16, ties to even; beyond them all, the largest.
inline uint16_t to_half(float value) {
    const uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7bff);
    // Denormals are multiples of 2^-24, the step of a float32 at 1/2.
    if (magnitude < 0x38800000) return uint16_t(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000));
    return uint16_t(sign | (((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112 << 10)));
}
// LANES of float16 as float32.
inline vec load_halves(const uint8_t* from) {
#if LANES == 16
    // All of them; without the mask GCC 12 warns about its header.
    return (vec)_mm512_maskz_cvtph_ps(__mmask16(-1), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif LANES == 8
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__ARM_NEON)
    return (vec)vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from)));
#else
    uint16_t halves[LANES];
    std::memcpy(halves, from, sizeof halves);
    vec values;
    for (int i = 0; i < LANES; ++i) values[i] = from_half(halves[i]);
    return values;
#endif
}
// The nearest float32 whose lower half is zero.
inline float upper_half(float value) {
    const uint32_t bits = float_bits(value);
    return bits_float((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
}
// The nearest bf16, ties to even, and the float32 with the value of a bf16.
inline uint16_t to_bf16(float value) { return uint16_t(float_bits(upper_half(value)) >> 16); }
inline float from_bf16(uint16_t half) { return bits_float(uint32_t(half) << 16); }

// An activation rounded to bf16, as a product takes it.
#if defined(__AVX512BF16__)
using Rounded = uint16_t;
inline void store_activations(Rounded* to, vec values) { store_rounded(to, values); }
#else
using Rounded = float;
inline void store_activations(Rounded* to, vec values) {
    const uvec bits = rounded(values);
    std::memcpy(to, &bits, sizeof bits);
}
#endif

// What is added to the bytes of weights by blocks, for the products that need one operand unsigned.
#if LANES == 16
constexpr int kWeightZero = 128;
#else
constexpr int kWeightZero = 0;
#endif

// What is added to the bytes of a row for int8 weights: the products of x86 need them unsigned, those of ARM signed.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr int kByteZero = 0;
#else
constexpr int kByteZero = 128;
#endif

using inkling::Format;

// The bytes of a block, from -127 to 127, and their scale, which has the least squared error. Values that had such bytes
// before (Q8_0) get them back, with the same scale, though the values were rounded to float16 in between.
inline uint16_t bytes_of_block(const float* from, int count, int8_t* bytes) {
    float most = 0;
    for (int i = 0; i < count; ++i) most = std::max(most, std::fabs(from[i]));
    const float inverse = most > 0 ? 127.0f / most : 0.0f;
    double along = 0, square = 0;
    for (int i = 0; i < count; ++i) {
        bytes[i] = int8_t(std::nearbyint(from[i] * inverse));
        along += double(bytes[i]) * from[i];
        square += double(bytes[i]) * bytes[i];
    }
    return to_half(square > 0 ? float(along / square) : 0.0f);
}

// A matrix (N outputs, K inputs) as panels of 16 outputs: fp32 [panel][k][16]; bf16 [panel][k / 2][16][2]; or int8 with
// a scale an output, [panel][k / 4][16][4], the order of the dot-product instructions of two and four; or int4, or int8
// by blocks, see above.
struct Packed {
    int outputs = 0, inputs = 0, panels = 0;
    bool bf16 = false, int8 = false, int4 = false, int8_blocks = false;
    Buffer<float> weights;
    Buffer<uint16_t> halves;
    Buffer<int8_t> bytes;
    Buffer<uint8_t> codes;   // by blocks
    Buffer<float> scales;    // (panels * 16): weight = byte * scale
    Buffer<int32_t> sums;    // (panels * 16): kByteZero * the sum of an output's bytes
    Buffer<float> bias;      // (panels * 16), zero where there is none

    Packed() = default;

    // `row(i)` gives the K weights of output i, or nullptr for one that only fills a panel; `offset(i)` its bias.
    template <class Row, class Offset>
    Packed(int outputs, int inputs, Format format, const Row& row, const Offset& offset)
        : Packed(outputs, inputs, format, row, offset, nullptr, nullptr) {}

    // In the memory of an arena, by several threads: `row` is called by each of them.
    template <class Row, class Offset>
    Packed(int outputs, int inputs, Format format, const Row& row, const Offset& offset, Arena* arena, Pool* pool)
        : outputs(outputs), inputs(inputs), panels(padded(outputs) / kPanel), bf16(format == Format::bf16),
          int8(format == Format::int8), int4(format == Format::int4), int8_blocks(format == Format::int8_blocks),
          bias(size_t(panels) * kPanel, arena) {
        const size_t rows = size_t(panels) * kPanel;
        if (by_blocks()) {
            codes = Buffer<uint8_t>(size_t(panels) * blocks() * block_bytes(), arena);
        } else if (int8) {
            bytes = Buffer<int8_t>(rows * quads() * 4, arena);
            scales = Buffer<float>(rows, arena);
            sums = Buffer<int32_t>(rows, arena);
        } else if (bf16) {
            halves = Buffer<uint16_t>(rows * pairs() * 2, arena);
        } else {
            weights = Buffer<float>(rows * inputs, arena);
        }
        const auto pack = [&](int panel) {
            for (int out = panel * kPanel; out < std::min(outputs, (panel + 1) * kPanel); ++out) {
                const float* from = row(out);
                bias[out] = offset(out);
                if (from == nullptr) continue;
                if (int4)
                    set_nibbles(out, from);
                else if (int8_blocks)
                    set_byte_blocks(out, from);
                else if (int8)
                    set_bytes(out, from);
                else if (bf16)
                    for (int k = 0; k < inputs; ++k) halves[half_at(out, k)] = to_bf16(from[k]);
                else
                    for (int k = 0; k < inputs; ++k)
                        weights[(size_t(panel) * inputs + k) * kPanel + out % kPanel] = from[k];
            }
        };
        if (pool)
            pool->run(panels, pack);
        else
            for (int panel = 0; panel < panels; ++panel) pack(panel);
    }

    size_t pairs() const { return (inputs + 1) / 2; }
    size_t quads() const { return (inputs + 3) / 4; }
    size_t blocks() const { return (inputs + kBlock - 1) / kBlock; }
    bool by_blocks() const { return int4 || int8_blocks; }
    size_t block_bytes() const { return int4 ? kBlockBytes : kByteBlockBytes; }

    size_t nbytes() const {
        return by_blocks() ? size_t(panels) * blocks() * block_bytes()
               : int8 ? size_t(panels) * kPanel * (quads() * 4 + 8)
               : bf16 ? size_t(panels) * kPanel * pairs() * 4
                      : size_t(panels) * kPanel * inputs * 4;
    }

    // The weight of an output and an input, not in int4; of int8 by rows the byte alone, without its scale.
    float weight(int out, int k) const {
        if (bf16) return from_bf16(halves[half_at(out, k)]);
        const size_t panel = out / kPanel, lane = out % kPanel;
        if (int8_blocks) {
            const uint8_t* block = codes.data() + (panel * blocks() + k / kBlock) * kByteBlockBytes;
            uint16_t scale;
            std::memcpy(&scale, block + kBytes + lane * 2, 2);
            return from_half(scale) * float(int8_t(block[(k % kBlock / 4 * kPanel + lane) * 4 + k % 4] - kWeightZero));
        }
        return int8 ? float(bytes[((panel * quads() + k / 4) * kPanel + lane) * 4 + k % 4])
                    : weights[(panel * inputs + k) * kPanel + lane];
    }

private:
    size_t half_at(int out, int k) const {
        return ((out / kPanel * pairs() + k / 2) * kPanel + out % kPanel) * 2 + k % 2;
    }
    void set_bytes(int out, const float* from) {
        const size_t panel = out / kPanel, lane = out % kPanel;
        float most = 0;
        for (int k = 0; k < inputs; ++k) most = std::max(most, std::fabs(from[k]));
        const float scale = most / 127.0f, inverse = most > 0 ? 127.0f / most : 0.0f;
        int32_t sum = 0;
        for (int k = 0; k < inputs; ++k) {
            const int8_t byte = int8_t(std::nearbyint(from[k] * inverse));
            bytes[((panel * quads() + k / 4) * kPanel + lane) * 4 + k % 4] = byte;
            sum += byte;
        }
        scales[out] = scale;
        sums[out] = kByteZero * sum;
    }

    // Codes 0 to 15 of a block, their scale and minimum.
    struct Levels {
        uint16_t scale = 0, minimum = 0;
        uint8_t codes[kBlock] = {};
        double error = 0;    // the sum of squares
        bool exact = true;   // but for the rounding of values to float16
    };

    // The levels from `first`, with code 0, to `last`, with code 15; their scale has the least squared error.
    static Levels levels_between(float first, float last, const float* from, int count) {
        Levels found;
        found.minimum = to_half(first);
        const float minimum = from_half(found.minimum), step = (last - first) / 15.0f;
        const float inverse = step != 0 ? 1.0f / step : 0.0f;
        double along = 0, square = 0;
        for (int i = 0; i < count; ++i) {
            const float code = std::clamp(std::nearbyint((from[i] - minimum) * inverse), 0.0f, 15.0f);
            found.codes[i] = uint8_t(code);
            along += double(code) * (from[i] - minimum);
            square += double(code) * code;
        }
        found.scale = to_half(square > 0 ? float(along / square) : 0.0f);
        for (int i = 0; i < count; ++i) {
            const double off = from[i] - (double(from_half(found.scale)) * found.codes[i] + minimum);
            found.error += off * off;
            found.exact &= std::fabs(off) <= std::fabs(double(from[i])) / 2048;
        }
        return found;
    }

    // Values that had such codes before (Q4_1, or Q4_0: eight steps from zero to the value farthest from it) get them
    // back, with the same scale, though the values were rounded to float16 in between.
    void set_nibbles(int out, const float* from) {
        const size_t lane = out % kPanel;
        for (size_t block = 0; block < blocks(); ++block) {
            const int begin = int(block) * kBlock, count = std::min(kBlock, inputs - begin);
            const auto [least, most] = std::minmax_element(from + begin, from + begin + count);
            Levels levels = levels_between(*least, *most, from + begin, count);
            const float farthest = -*least > *most ? *least : *most;
            const Levels around_zero = levels_between(farthest, -0.875f * farthest, from + begin, count);
            if (around_zero.exact || around_zero.error < levels.error) levels = around_zero;
            uint8_t* to = codes.data() + (out / kPanel * blocks() + block) * kBlockBytes;
            for (int i = 0; i < count; ++i) {
                const int quad = i / 4;
                to[(quad % 4 * kPanel + lane) * 4 + i % 4] |= uint8_t(levels.codes[i] << (quad < 4 ? 0 : 4));
            }
            std::memcpy(to + kCodes + lane * 2, &levels.minimum, 2);
            std::memcpy(to + kCodes + kPanel * 2 + lane * 2, &levels.scale, 2);
        }
    }

    void set_byte_blocks(int out, const float* from) {
        const size_t lane = out % kPanel;
        for (size_t block = 0; block < blocks(); ++block) {
            const int begin = int(block) * kBlock, count = std::min(kBlock, inputs - begin);
            uint8_t* to = codes.data() + (out / kPanel * blocks() + block) * kByteBlockBytes;
            int8_t bytes[kBlock];
            const uint16_t scale = bytes_of_block(from + begin, count, bytes);
            for (int i = 0; i < count; ++i)
                to[(i / 4 * kPanel + lane) * 4 + i % 4] = uint8_t(bytes[i] + kWeightZero);
            std::memcpy(to + kBytes + lane * 2, &scale, 2);
        }
    }
};

// Rows of inputs: pointers to K floats each; for bf16 weights the same rows rounded to bf16; for int8 weights as bytes
// with a scale each, for weights by blocks with a scale and a sum for each block.
struct Rows {
    int count = 0;
    std::vector<const float*> at;
    std::vector<const uint8_t*> bytes;
    std::vector<float> scales;
    Buffer<uint8_t> held;
    Buffer<Rounded> halves;  // (rows, stride)
    Buffer<float> block_scales, block_sums;  // (rows, stride / kBlock); sums are scaled
    Buffer<int32_t> block_starts;            // the same, less kWeightZero * the sum of the bytes
    int stride = 0;

    Rows() = default;
    Rows(int most, int inputs, Format format) : at(most), stride((inputs + 63) / 64 * 64) {
        if (format == Format::bf16) halves = Buffer<Rounded>(size_t(most) * stride);
        if (format != Format::int8 && format != Format::int4) return;
        held = Buffer<uint8_t>(size_t(most) * stride);
        bytes.resize(most);
        scales.resize(most);
        for (int row = 0; row < most; ++row) bytes[row] = held.data() + size_t(row) * stride;
        if (format != Format::int4) return;
        block_scales = Buffer<float>(size_t(most) * blocks());
        block_sums = Buffer<float>(size_t(most) * blocks());
        block_starts = Buffer<int32_t>(size_t(most) * blocks());
    }

    int blocks() const { return stride / kBlock; }

    // As the product with `w` takes them.
    void quantize(int row, const Packed& w) {
        if (w.by_blocks())
            quantize_blocks(row, w.inputs);
        else if (w.int8)
            quantize(row, w.inputs);
        else if (w.bf16)
            for (int k = 0; k < w.inputs; k += LANES)
                store_activations(halves.data() + size_t(row) * stride + k, load_few(at[row] + k, w.inputs - k));
    }

    // Bytes from -127 to 127 by the largest value of each block.
    void quantize_blocks(int row, int inputs) {
        uint8_t* to = held.data() + size_t(row) * stride;
        for (int block = 0, begin = 0; begin < inputs; ++block, begin += kBlock) {
            alignas(64) float values[kBlock] = {};
            std::memcpy(values, at[row] + begin, std::min(kBlock, inputs - begin) * 4);
            float lanes[kPanel];
            for (int i = 0; i < kPanel; ++i)
                lanes[i] = std::max(std::fabs(values[i]), std::fabs(values[i + kPanel]));
            for (int half = kPanel / 2; half > 0; half /= 2)
                for (int i = 0; i < half; ++i) lanes[i] = std::max(lanes[i], lanes[i + half]);
            const float most = lanes[0], inverse = most > 0 ? 127.0f / most : 0.0f, scale = most / 127.0f;
            int32_t sum = 0;
            for (int i = 0; i < kBlock; ++i) {
                const int32_t rounded = int32_t((values[i] * inverse + 12582912.0f) - 12582912.0f);
                to[begin + i] = uint8_t(int8_t(rounded));
                sum += rounded;
            }
            block_scales[size_t(row) * blocks() + block] = scale;
            block_sums[size_t(row) * blocks() + block] = scale * float(sum);
            block_starts[size_t(row) * blocks() + block] = -kWeightZero * sum;
        }
    }

    void set(int row, const float* from) { at[row] = from; }

    // Bytes from -127 to 127 by the largest value of the row, plus kByteZero.
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
            // Rounded by the same trick as in `exp`, which every compiler vectorizes.
            const float rounded = (from[k] * inverse + 12582912.0f) - 12582912.0f;
            to[k] = uint8_t(int32_t(rounded) + kByteZero);
        }
        for (; k % 4; ++k) to[k] = kByteZero;
        scales[row] = most / 127.0f;
    }
};

// -- the innermost loops: P panels times R rows, sums held in registers --------------------------------------------

// `ahead`: which of the P panels after these to prefetch, one bit each.

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
            const vec value = broadcast(x[r][k]);
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

// In bf16, two inputs at a time. AVX512-BF16 adds the product of the second one and then that of the first. Products of
// two bf16 are exact in fp32, so that all instruction sets give the same bits, but for denormals: it takes them as zero.
template <int P, int R>
inline void tile_of_pairs(const Packed& w, int panel, const Rows& x, int row, float* const* y, int at, unsigned ahead) {
    const size_t pairs = w.pairs(), next = pairs * kPanel * 2;
    const uint16_t* from = w.halves.data() + size_t(panel) * next;
    const Rounded* values = x.halves.data() + size_t(row) * x.stride;
    vec sums[P * kParts][R] = {};
    for (size_t pair = 0; pair < pairs; ++pair) {
        uvec both[P * kParts];
#pragma GCC unroll 32
        for (int p = 0; p < P * kParts; ++p)
            std::memcpy(&both[p], from + (p / kParts) * next + (p % kParts) * LANES * 2, sizeof both[p]);
        if constexpr (R > 1)
#pragma GCC unroll 32
            for (int p = 0; p < P; ++p)
                if (ahead >> p & 1) __builtin_prefetch(from + (P + p) * next, 0, 2);
#if defined(__AVX512BF16__)
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) {
            int32_t two;
            std::memcpy(&two, values + size_t(r) * x.stride, 4);
#pragma GCC unroll 32
            for (int p = 0; p < P; ++p)
                sums[p][r] = (vec)_mm512_dpbf16_ps((__m512)sums[p][r], (__m512bh)both[p],
                                                   (__m512bh)_mm512_set1_epi32(two));
        }
#else
#pragma GCC unroll 2
        for (int half = 1; half >= 0; --half) {
            vec part[P * kParts];
#pragma GCC unroll 32
            for (int p = 0; p < P * kParts; ++p) {
                const uvec bits = half ? both[p] & 0xffff0000u : both[p] << 16;
                std::memcpy(&part[p], &bits, sizeof bits);
            }
#pragma GCC unroll 32
            for (int r = 0; r < R; ++r) {
                const vec value = broadcast(values[size_t(r) * x.stride + half]);
#pragma GCC unroll 32
                for (int p = 0; p < P * kParts; ++p) sums[p][r] += part[p] * value;
            }
        }
#endif
        from += kPanel * 2;
        values += 2;
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
#elif defined(__ARM_FEATURE_DOTPROD)
struct Dots {
    int32x4_t sums[4];
    void clear() {
        for (auto& sum : sums) sum = vdupq_n_s32(0);
    }
    void add(const int8_t* w, uint32_t four) {
        const int8x16_t value = vreinterpretq_s8_u32(vdupq_n_u32(four));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[i] = vdotq_s32(sums[i], vld1q_s8(w + 16 * i), value);
    }
    void save(int32_t* to) const {
        for (int i = 0; i < 4; ++i) vst1q_s32(to + 4 * i, sums[i]);
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
    const size_t quads = w.quads(), next = quads * 64;
    const int8_t* from = w.bytes.data() + size_t(panel) * next;
    // A panel and a row alone: several sums, so that an addition need not wait for the one before it.
    constexpr size_t S = P * R == 1 && LANES == 16 ? 4 : 1;
    Dots dots[P][R][S];
#pragma GCC unroll 32
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r)
            for (auto& each : dots[p][r]) each.clear();
    const auto add = [&](size_t quad, size_t s) {
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) {
            uint32_t four;
            std::memcpy(&four, x[r] + 4 * quad, 4);
#pragma GCC unroll 32
            for (int p = 0; p < P; ++p) dots[p][r][s].add(from + p * next, four);
        }
        if constexpr (R > 1)
#pragma GCC unroll 32
            for (int p = 0; p < P; ++p)
                if (ahead >> p & 1) __builtin_prefetch(from + (P + p) * next, 0, 2);
        from += 64;
    };
    size_t quad = 0;
    for (; quad + S <= quads; quad += S)
#pragma GCC unroll 4
        for (size_t s = 0; s < S; ++s) add(quad + s, s);
    for (; quad < quads; ++quad) add(quad, 0);
#pragma GCC unroll 32
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) {
            alignas(64) int32_t sums[kPanel], more[kPanel];
            dots[p][r][0].save(sums);
            for (size_t s = 1; s < S; ++s) {
                dots[p][r][s].save(more);
                for (int i = 0; i < kPanel; ++i) sums[i] += more[i];
            }
            const size_t out = size_t(panel + p) * kPanel;
            float* to = y[r] + at + p * kPanel;
            for (int i = 0; i < kPanel; ++i)
                to[i] = float(sums[i] - w.sums[out + i]) * (w.scales[out + i] * scales[r]) + w.bias[out + i];
        }
}

// LANES whole numbers as floats.
inline vec floats(const void* from) {
    ivec whole;
    std::memcpy(&whole, from, sizeof whole);
    return __builtin_convertvector(whole, vec);
}

// 64 bytes of codes by blocks, int4 ones taken apart, and sums of their products with the bytes of a row, by output. A
// vector of int4 has two quads, for the bytes at `x` and at `x` + 16.
#if LANES == 16
struct Nibbles {
    __m512i low, high;
    explicit Nibbles(const uint8_t* from) {
        const __m512i both = _mm512_loadu_si512(from), mask = _mm512_set1_epi8(15);
        low = _mm512_and_si512(both, mask);
        high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    }
};
struct Bytes {
    __m512i all;
    explicit Bytes(const uint8_t* from) : all(_mm512_loadu_si512(from)) {}
};
struct BlockDots {
    __m512i sums;
    void start(int32_t sum) { sums = _mm512_set1_epi32(sum); }
    static __m512i four(const uint8_t* x) {
        int32_t bytes;
        std::memcpy(&bytes, x, 4);
        return _mm512_set1_epi32(bytes);
    }
    void add(const Nibbles& w, const uint8_t* x) {
        sums = _mm512_dpbusd_epi32(sums, w.low, four(x));
        sums = _mm512_dpbusd_epi32(sums, w.high, four(x + 16));
    }
    void add(const Bytes& w, const uint8_t* x) { sums = _mm512_dpbusd_epi32(sums, w.all, four(x)); }
    vec part(int) const { return floats(&sums); }
};
#elif LANES == 8
struct Nibbles {
    __m256i low[2], high[2];
    explicit Nibbles(const uint8_t* from) {
        const __m256i mask = _mm256_set1_epi8(15);
        for (int i = 0; i < 2; ++i) {
            const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * i));
            low[i] = _mm256_and_si256(both, mask);
            high[i] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
        }
    }
};
struct Bytes {
    __m256i all[2], sizes[2];
    explicit Bytes(const uint8_t* from) {
        for (int i = 0; i < 2; ++i) {
            all[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * i));
            sizes[i] = _mm256_abs_epi8(all[i]);
        }
    }
};
struct BlockDots {
    __m256i sums[2];
    void start(int32_t sum) { sums[0] = sums[1] = _mm256_set1_epi32(sum); }
    static __m256i four(const uint8_t* x) {
        int32_t bytes;
        std::memcpy(&bytes, x, 4);
        return _mm256_set1_epi32(bytes);
    }
    void add_pairs(int i, __m256i pairs) {
        sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    // Four products of a code and a byte are below 2^15.
    void add(const Nibbles& w, const uint8_t* x) {
        const __m256i first = four(x), second = four(x + 16);
        for (int i = 0; i < 2; ++i)
            add_pairs(i, _mm256_add_epi16(_mm256_maddubs_epi16(w.low[i], first),
                                          _mm256_maddubs_epi16(w.high[i], second)));
    }
    // Two products of bytes up to 127 are below 2^15; the weight's sign is given to the row's byte.
    void add(const Bytes& w, const uint8_t* x) {
        const __m256i bytes = four(x);
        for (int i = 0; i < 2; ++i) add_pairs(i, _mm256_maddubs_epi16(w.sizes[i], _mm256_sign_epi8(bytes, w.all[i])));
    }
    vec part(int i) const { return floats(&sums[i]); }
};
#elif defined(__ARM_FEATURE_DOTPROD)
struct Nibbles {
    int8x16_t low[4], high[4];
    explicit Nibbles(const uint8_t* from) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const uint8x16_t both = vld1q_u8(from + 16 * i);
            low[i] = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
            high[i] = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
        }
    }
};
struct Bytes {
    int8x16_t all[4];
    explicit Bytes(const uint8_t* from) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) all[i] = vreinterpretq_s8_u8(vld1q_u8(from + 16 * i));
    }
};
struct BlockDots {
    int32x4_t sums[4];
    void start(int32_t sum) {
        for (auto& each : sums) each = vdupq_n_s32(sum);
    }
    static int8x16_t four(const uint8_t* x) {
        uint32_t bytes;
        std::memcpy(&bytes, x, 4);
        return vreinterpretq_s8_u32(vdupq_n_u32(bytes));
    }
    void add(const Nibbles& w, const uint8_t* x) {
        const int8x16_t first = four(x), second = four(x + 16);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[i] = vdotq_s32(vdotq_s32(sums[i], w.low[i], first), w.high[i], second);
    }
    void add(const Bytes& w, const uint8_t* x) {
        const int8x16_t bytes = four(x);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[i] = vdotq_s32(sums[i], w.all[i], bytes);
    }
    vec part(int i) const { return floats(&sums[i]); }
};
#else
struct Nibbles {
    const uint8_t* from;
    explicit Nibbles(const uint8_t* from) : from(from) {}
};
struct Bytes {
    const uint8_t* from;
    explicit Bytes(const uint8_t* from) : from(from) {}
};
struct BlockDots {
    int32_t sums[kPanel];
    void start(int32_t sum) { std::fill_n(sums, kPanel, sum); }
    void add(const Nibbles& w, const uint8_t* x) {
        for (int i = 0; i < kPanel; ++i)
            for (int k = 0; k < 4; ++k) {
                const int both = w.from[4 * i + k];
                sums[i] += (both & 15) * int8_t(x[k]) + (both >> 4) * int8_t(x[16 + k]);
            }
    }
    void add(const Bytes& w, const uint8_t* x) {
        for (int i = 0; i < kPanel; ++i)
            for (int k = 0; k < 4; ++k) sums[i] += int8_t(w.from[4 * i + k]) * int8_t(x[k]);
    }
    vec part(int i) const { return floats(sums + i * LANES); }
};
#endif

// Of weights by blocks; Codes is Nibbles or Bytes.
template <class Codes, int P, int R>
inline void tile_of_blocks(const Packed& w, int panel, const Rows& x, int row, float* const* y, int at,
                           unsigned ahead) {
    constexpr bool kMinima = std::is_same_v<Codes, Nibbles>;
    constexpr int kVectors = kMinima ? kCodes / 64 : kBytes / 64, kSize = kMinima ? kBlockBytes : kByteBlockBytes;
    const size_t blocks = w.blocks(), next = blocks * kSize, across = x.blocks();
    const uint8_t* from = w.codes.data() + size_t(panel) * next;
    const uint8_t* bytes = x.held.data() + size_t(row) * x.stride;
    const float *scales = x.block_scales.data() + row * across, *sums = x.block_sums.data() + row * across;
    const int32_t* starts = x.block_starts.data() + row * across;
    vec totals[P * kParts][R] = {};
    for (size_t block = 0; block < blocks; ++block) {
        BlockDots dots[P][R];
#pragma GCC unroll 32
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
            for (int r = 0; r < R; ++r) dots[p][r].start(kMinima ? 0 : starts[r * across + block]);
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i)
#pragma GCC unroll 32
            for (int p = 0; p < P; ++p) {
                const Codes codes(from + p * next + i * 64);
#pragma GCC unroll 32
                for (int r = 0; r < R; ++r) dots[p][r].add(codes, bytes + size_t(r) * x.stride + 4 * i);
            }
#pragma GCC unroll 32
        for (int p = 0; p < P; ++p) {
            if constexpr (R > 1)
                if (ahead >> p & 1)
#pragma GCC unroll 9
                    for (int i = 0; i < kSize; i += 64) __builtin_prefetch(from + (P + p) * next + i, 0, 2);
#pragma GCC unroll 4
            for (int part = 0; part < kParts; ++part) {
                const uint8_t* pairs = from + p * next + kVectors * 64 + part * LANES * 2;
                const vec scale = load_halves(pairs + (kMinima ? kPanel * 2 : 0));
                vec minimum = {};
                if constexpr (kMinima) minimum = load_halves(pairs);
#pragma GCC unroll 32
                for (int r = 0; r < R; ++r) {
                    vec& total = totals[p * kParts + part][r];
                    total += dots[p][r].part(part) * (scale * broadcast(scales[r * across + block]));
                    if constexpr (kMinima) total += minimum * broadcast(sums[r * across + block]);
                }
            }
        }
        from += kSize;
        bytes += kBlock;
    }
    const float* bias = w.bias.data() + size_t(panel) * kPanel;
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
        for (int p = 0; p < P * kParts; ++p) store(y[r] + at + p * LANES, totals[p][r] + load(bias + p * LANES));
}

#if LANES == 16
// Panels for one row; panels and rows for several. One row reads its weights once: few panels at a time, which lie one
// after the other in memory, come faster from there than many streams do.
constexpr int kWide = 2, kTall = 4, kRows = 6;
constexpr int kTallBlocks = 2;
#else
constexpr int kWide = 4, kTall = 1, kRows = 6;
constexpr int kTallBlocks = 1;
#endif

template <int P, int R>
inline void block(const Packed& w, int panel, const Rows& x, int row, float* const* y, int at, unsigned ahead = 0) {
    if (w.int4)
        tile_of_blocks<Nibbles, P, R>(w, panel, x, row, y + row, at, ahead);
    else if (w.int8_blocks)
        tile_of_blocks<Bytes, P, R>(w, panel, x, row, y + row, at, ahead);
    else if (w.int8)
        tile<P, R>(w, panel, x.bytes.data() + row, x.scales.data() + row, y + row, at, ahead);
    else if (w.bf16)
        tile_of_pairs<P, R>(w, panel, x, row, y + row, at, ahead);
    else
        tile<P, R>(w, panel, x.at.data() + row, y + row, at, ahead);
}

template <int P>
inline void strip(const Packed& w, int panel, const Rows& x, float* const* y, int at) {
    // Prefetches the next panels while these are computed, some of them during each pass over the rows, so that the
    // passes do not wait for memory.
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
    auto column = [&] { return at + (panel - begin) * kPanel; };
    if (x.count == 1 && (w.int8 || w.by_blocks()))
        for (; panel < end; ++panel) block<1, 1>(w, panel, x, 0, y, column());
    else if (x.count == 1)
        for (; panel + kWide <= end; panel += kWide) block<kWide, 1>(w, panel, x, 0, y, column());
    if (w.by_blocks())
        for (; panel + kTallBlocks <= end; panel += kTallBlocks) strip<kTallBlocks>(w, panel, x, y, column());
    for (; panel + kTall <= end; panel += kTall) strip<kTall>(w, panel, x, y, column());
    for (; panel < end; ++panel) strip<1>(w, panel, x, y, column());
}

// The whole product, divided among threads in groups of `unit` panels; finish(begin, end) is called by the thread that
// has just computed those panels, for the element-wise part.
template <class Finish>
inline void multiply(Pool& pool, const Packed& w, const Rows& x, float* const* y, int unit, const Finish& finish) {
    const int units = w.panels / unit;
    const size_t work = w.nbytes() * size_t(1 + x.count / 4);
    // A part below some 32 KB of weights takes less time than starting it on another thread.
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
