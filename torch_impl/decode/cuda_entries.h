// Entries of values, or of codes with scales, and gaps: strips of 32 rows, the layouts of cuda_gaps.py and cuda_coded_gaps.py, as the lanes of
// a warp read them. A lane reads eight entries of its row at once; a dot product adds up their gaps.
//
// BITS: of a value, 16, or of a code, 8 or 4.

#pragma once

#include "cuda_tiles.h"

#include <type_traits>

namespace {

constexpr int ENTRIES = 8;                             // of a row in a group
template <int BITS>
constexpr int VALUES = LANES * ENTRIES * BITS / 8;     // bytes of a group's values or codes, before its gaps
template <int BITS>
constexpr int GROUP = VALUES<BITS> + LANES * ENTRIES / 2;   // bytes of a group
constexpr int SECTION = 128;                           // columns that share a scale
constexpr uint32_t NIBBLES = 0x0f0f0f0f, EACH = 0x01010101;

__host__ __device__ __forceinline__ int strips_of_lanes(const Layout& w) { return (w.rows + LANES - 1) / LANES; }
// What follows the parts' first groups: the row of each lane of each strip, then the column that each lane has reached before each part.
__device__ __forceinline__ const int* order(const Layout& w) { return w.starts + strips_of_lanes(w) * w.panels + 1; }
__device__ __forceinline__ const uint16_t* columns_before(const Layout& w, int part) {
    return reinterpret_cast<const uint16_t*>(order(w) + w.rows) + static_cast<size_t>(part) * LANES;
}

// And then the scales of codes, fp16: of each strip, section by section, of each lane.
__host__ __device__ __forceinline__ int scale_words(const Layout& w) { return (w.columns + SECTION - 1) / SECTION * LANES / 2; }
__device__ __forceinline__ const int* scales_of(const Layout& w, int strip) {
    return order(w) + w.rows + strips_of_lanes(w) * w.panels * (LANES / 2) + strip * scale_words(w);
}

template <typename T>
__device__ __forceinline__ float widen_half(uint32_t pair, bool upper) {
    if constexpr (std::is_same_v<T, __half>) return __half2float(__ushort_as_half(static_cast<unsigned short>(upper ? pair >> 16 : pair)));
    else return __uint_as_float(upper ? pair & 0xffff0000 : pair << 16);
}

// A lane's entries of a group: values in pairs, codes + 128 in bytes, or codes + 8 and gaps in half bytes, byte j with that of entry j in its
// lower half and that of entry 4 + j in its upper one.
template <int BITS>
struct Entries {
    uint32_t words[ENTRIES * BITS / 32], gaps;

    // Not by ld.global.nc, which ptxas moves behind griddepcontrol.wait.
    __device__ __forceinline__ void read(const uint8_t* values, const uint8_t* nibbles) {
        if constexpr (BITS == 16)
            asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "l"(values));
        if constexpr (BITS == 8) asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(values));
        if constexpr (BITS == 4) asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(words[0]) : "l"(values));
        asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(gaps) : "l"(nibbles));
    }

    // Call use(number, place) for each entry. at: the place reached so far; a column takes STEP.
    template <int STEP, class Use>
    __device__ __forceinline__ void walk(uint32_t& at, Use use) const {
        const uint32_t four[2] = {gaps & NIBBLES, gaps >> 4 & NIBBLES};
#pragma unroll
        for (int i = 0; i < ENTRIES; ++i) {
            // The sum of the gaps up to this one.
            const uint32_t place = __dp4a(four[i / 4], STEP * EACH >> (3 - i % 4) * 8, at);
            use(i, place);
            if (i % 4 == 3) at = place;
        }
    }

    // The 16 bits of a value.
    __device__ __forceinline__ uint32_t bits(int i) const { return i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffff; }

    // A value; a code, times 16 if it has 4 bits: a byte is the lowest one of the number 2^23 + byte. power: bits of 2^23.
    template <typename T>
    __device__ __forceinline__ float value(int i, uint32_t power) const {
        if constexpr (BITS == 16) return widen_half<T>(words[i / 2], i % 2);
        const uint32_t four = BITS == 8 ? words[i / 4 * (BITS / 8)] : (i < 4 ? words[0] << 4 : words[0]) & 0xf0f0f0f0;
        return __uint_as_float(permute(four, power, 0x7440 | i % 4)) - (0x1p23f + 128);
    }
};

// The bits of 2^23, in a register, because a permutation has room for one constant: the compiler does not know that the slot is small.
__device__ __forceinline__ uint32_t power_of_codes(const Layout& w) { return 0x4b000000 | static_cast<uint32_t>(w.slot) >> 20; }

// What scales are multiplied by for such codes.
template <int BITS>
constexpr float UNIT = BITS == 4 ? 1.0f / 16 : 1;

// The groups of a part of a strip, the next COUNT of them in registers.
template <int BITS, int COUNT>
struct Part {
    const uint8_t *values, *nibbles;   // of this lane, in the next group to multiply
    int left;
    Entries<BITS> ahead[COUNT];

    // part: its number in the whole weight.
    __device__ __forceinline__ Part(const Layout& w, int part, int lane) {
        const int start = w.starts[part];
        left = w.starts[part + 1] - start;
        const uint8_t* group = w.data + static_cast<size_t>(start) * GROUP<BITS>;
        values = group + lane * (VALUES<BITS> / LANES), nibbles = group + VALUES<BITS> + lane * 4;
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if (i < left) ahead[i].read(values + i * GROUP<BITS>, nibbles + i * GROUP<BITS>);
    }

    template <class Use>
    __device__ __forceinline__ void each(Use use) {
        for (; left > 0; left -= COUNT, values += COUNT * GROUP<BITS>, nibbles += COUNT * GROUP<BITS>) {
            // Two pointers, not one and a difference that is added before each reading.
            asm volatile("" : "+l"(values), "+l"(nibbles));
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                if (i >= left) return;
                use(ahead[i]);
                if (i + COUNT < left) ahead[i].read(values + (i + COUNT) * GROUP<BITS>, nibbles + (i + COUNT) * GROUP<BITS>);
            }
        }
    }
};

}  // namespace
