// Panels of 16 x 128 of values, the layout of cuda.py, as the lanes of a warp read them.
//
// In a product of 16 x 16 by 16 x 8, a lane holds four numbers of a row, twice. It counts bits in the bitmap to find their values, and
// reads four neighbouring values, some of which belong to other lanes. Two byte permutations put its own values and zeros in place.
// Neighbouring lanes read neighbouring values, so there are no bank conflicts.

#pragma once

#include "cuda_panels.h"

namespace {

constexpr int COLUMNS = 128;              // of a panel
constexpr int MAP = ROWS * COLUMNS / 8;   // bytes of its bitmap

template <int OFFSET>
__device__ __forceinline__ uint32_t load_half(uint32_t from) {
    uint32_t value;
    asm volatile("{.reg .u16 h; ld.shared.u16 h, [%1+%2]; cvt.u32.u16 %0, h;}" : "=r"(value) : "r"(from), "n"(OFFSET) : "memory");
    return value;
}
__device__ __forceinline__ void store_byte(uint32_t to, uint32_t value) {
    asm volatile("{.reg .u16 h; cvt.u16.u32 h, %1; st.shared.u8 [%0], h;}" ::"r"(to), "r"(value) : "memory");
}

// Count the set bits of each word of a panel's bitmap, one byte per count, the four words of a tile side by side.
__device__ __forceinline__ void count_bits(uint32_t panel, uint32_t counts, uint32_t lane) {
    const uint32_t to = counts + lane / 16 * 16 + lane % 4 * 4 + lane / 4 % 4;
    const uint32_t one = load(panel + 4 * lane), two = load(panel + 4 * lane + 4 * LANES);
    store_byte(to, __popc(one));
    store_byte(to + 32, __popc(two));
    __syncwarp();
}

// A lane's masks: `bit`, its first bit in a bitmap word; `before`, the bits of all values before its third number; `words`, per
// word of a tile, the bytes per value of the words before its own.
struct Share {
    uint32_t bit, before, words;
    __device__ __forceinline__ explicit Share(uint32_t lane)
        : bit(lane % 8), before(0x01010101u * ((1u << bit) - 1) | 0x01010000u << bit), words(0x02020202u & ((1u << lane / 8 * 8) - 1)) {
        // Keep them in registers.
        asm volatile("" : "+r"(bit), "+r"(before), "+r"(words));
    }
};

// Compute base + the dot product of two 16-bit numbers with the lower or upper two bytes.
template <bool UPPER>
__device__ __forceinline__ uint32_t choose(uint32_t numbers, uint32_t bytes, uint32_t base) {
    uint32_t result;
    if constexpr (UPPER) asm("dp2a.hi.u32.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(numbers), "r"(bytes), "r"(base));
    else asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(numbers), "r"(bytes), "r"(base));
    return result;
}

// Read four numbers of a row, in two pairs. Two values are read on either side of the middle, the nearer one first. A bit for
// the nearer number and a bit eight places higher for the farther one select the bytes: (none, none), (nearer, none), (none,
// first value), (both). values: start of the tile's values; on return, of the next tile's.
__device__ __forceinline__ void read_quad(uint32_t& low, uint32_t& high, uint32_t word, uint32_t counts, uint32_t& values, const Share& share) {
    constexpr uint32_t NONE = 0x2222, NEARER_FARTHER = 0xee0043ee;
    const uint32_t middle = __dp4a(counts, share.words, values) + 2 * __popc(word & share.before);
    values = __dp4a(counts, 0x02020202u, values);
    const uint32_t bits = word >> share.bit & 0x01010101u;
    high = permute(load_half<0>(middle), load_half<2>(middle), choose<false>(NEARER_FARTHER, bits, NONE));
    low = permute(load_half<-2>(middle), load_half<-4>(middle), choose<true>(NEARER_FARTHER, bits, NONE));
}

}  // namespace
