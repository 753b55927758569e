// Products of bf16 on the tiles of Intel's AMX: 16 rows by 16 columns of sums, 16 slots along k at a time.
//
// With INKLING_AMX_EMULATED the same code runs on plain arrays, for tests on any processor. The real instructions
// have not been run: no such processor was available.
#pragma once

#include "slots.hpp"

#if !defined(INKLING_AMX_EMULATED)
#include <immintrin.h>
#endif

namespace INKLING_ISA {

constexpr int kTile = 16;

#if defined(INKLING_AMX_EMULATED)

struct EmulatedTile {
    uint32_t slots[kTile][kTile];
    void load(const float* from, int64_t step) {
        for (int row = 0; row < kTile; ++row) std::memcpy(slots[row], from + row * step, sizeof slots[row]);
    }
    void save(float* to) const { std::memcpy(to, slots, sizeof slots); }
    // Source: Intel, "Architecture Instruction Set Extensions Programming Reference", TDPBF16PS.
    void add(const EmulatedTile& a, const EmulatedTile& b) {
        const auto number = [](uint32_t bits) {
            float value;
            std::memcpy(&value, &bits, sizeof value);
            return value;
        };
        for (int row = 0; row < kTile; ++row)
            for (int k = 0; k < kTile; ++k)
                for (int column = 0; column < kTile; ++column) {
                    const uint32_t left = a.slots[row][k], right = b.slots[k][column];
                    float sum = number(slots[row][column]);
                    sum += number(left << 16) * number(right << 16);
                    sum += number(left & 0xffff0000u) * number(right & 0xffff0000u);
                    std::memcpy(&slots[row][column], &sum, sizeof sum);
                }
    }
};
static thread_local EmulatedTile emulated_tiles[8];
#define INKLING_TILE_ZERO(t) emulated_tiles[t] = {}
#define INKLING_TILE_LOAD(t, from, step) emulated_tiles[t].load(from, step)
#define INKLING_TILE_SAVE(t, to) emulated_tiles[t].save(to)
#define INKLING_TILE_ADD(t, a, b) emulated_tiles[t].add(emulated_tiles[a], emulated_tiles[b])

// Lets this thread use the tiles until it is destroyed.
struct Tiles {
    ~Tiles() {}
};

#else

#define INKLING_TILE_ZERO(t) _tile_zero(t)
#define INKLING_TILE_LOAD(t, from, step) _tile_loadd(t, from, (step) * 4)
#define INKLING_TILE_SAVE(t, to) _tile_stored(t, to, kTile * 4)
#define INKLING_TILE_ADD(t, a, b) _tile_dpbf16ps(t, a, b)

// The compiler does not know which memory the instructions for tiles read and write.
inline void settle_memory() { __asm__ volatile("" ::: "memory"); }

struct Tiles {
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        for (int tile = 0; tile < 8; ++tile) shape.bytes[tile] = kTile * 4, shape.rows[tile] = kTile;
        __asm__ volatile("" ::"r"(&shape) : "memory");
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

#endif

// c[r][0 .. 16 P) = (or +=) the products of D times 16 rows of slots with b[slot][0 .. 16 P); `depth` slots, a multiple
// of 16. The rows of A lie `step` apart, and 16 D of them can be read; only `rows` of C are there.
template <int P, int D>
inline void amx_tile(int rows, const float* b, int depth, const float* a, int64_t step, float* const* c, bool add) {
#if !defined(INKLING_AMX_EMULATED)
    settle_memory();
#endif
    INKLING_TILE_ZERO(0);
    if constexpr (P > 1) INKLING_TILE_ZERO(1);
    if constexpr (D > 1) INKLING_TILE_ZERO(2);
    if constexpr (P > 1 && D > 1) INKLING_TILE_ZERO(3);
    for (int k = 0; k < depth; k += kTile, b += kTile * P * kTile) {
        INKLING_TILE_LOAD(4, b, P * kTile);
        if constexpr (P > 1) INKLING_TILE_LOAD(5, b + kTile, P * kTile);
        INKLING_TILE_LOAD(6, a + k, step);
        INKLING_TILE_ADD(0, 6, 4);
        if constexpr (P > 1) INKLING_TILE_ADD(1, 6, 5);
        if constexpr (D > 1) {
            INKLING_TILE_LOAD(7, a + kTile * step + k, step);
            INKLING_TILE_ADD(2, 7, 4);
            if constexpr (P > 1) INKLING_TILE_ADD(3, 7, 5);
        }
    }
    alignas(64) float sums[4][kTile * kTile];
    INKLING_TILE_SAVE(0, sums[0]);
    if constexpr (P > 1) INKLING_TILE_SAVE(1, sums[1]);
    if constexpr (D > 1) INKLING_TILE_SAVE(2, sums[2]);
    if constexpr (P > 1 && D > 1) INKLING_TILE_SAVE(3, sums[3]);
#if !defined(INKLING_AMX_EMULATED)
    settle_memory();
#endif
    for (int r = 0; r < rows; ++r)
        for (int p = 0; p < P; ++p)
            for (int i = 0; i < kTile; i += LANES) {
                float* to = c[r] + p * kTile + i;
                const vec sum = load(sums[r / kTile * 2 + p] + r % kTile * kTile + i);
                store(to, add ? load(to) + sum : sum);
            }
}

}  // namespace INKLING_ISA
