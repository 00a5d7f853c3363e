// What cuda_rows.cu and cuda_staged.cu share: products of one or two strips of panels with up to 32 rows of x, and the sums of a warp.

#pragma once

#include "cuda_tiles.h"

namespace {

constexpr int STRIDE = 20;                  // of a row of x in a warp's sums, in floats: lanes write to different banks
constexpr int SUMS = BATCH * STRIDE * 4;    // bytes of the sums of 16 x 8
// Threads of a block, so that the compiler uses few registers and several blocks fit on a processor.
template <int STRIPS, int TILES>
constexpr int MOST = STRIPS * TILES >= 4 ? 768 : 1024;
constexpr int COUNTS = ROWS * COLUMNS / 32; // bytes of a panel's counts of bits

// Bytes of shared memory for a warp: its panels, later its sums in the same place.
template <int STRIPS, int TILES>
__host__ __device__ __forceinline__ int bytes_of_warp(int slot) {
    return max(STRIPS * (SLOTS * slot + COUNTS) + BARRIERS, STRIPS * TILES * SUMS);
}

// Add the products of 32 columns of a strip, the first ones in `at`, with x.
template <typename T, int TILES>
__device__ __forceinline__ void add_products(float (&sums)[TILES][4], uint32_t at, uint32_t counts, uint32_t& values, const Share& share,
                                             const uint4 (&now)[TILES]) {
    const uint4 word = load_four(at), count = load_four(counts);
    uint32_t one[4], two[4];
    read_quad(one[0], one[2], word.x, count.x, values, share);
    read_quad(one[1], one[3], word.y, count.y, values, share);
    read_quad(two[0], two[2], word.z, count.z, values, share);
    read_quad(two[1], two[3], word.w, count.w, values, share);
#pragma unroll
    for (int t = 0; t < TILES; ++t) multiply<T>(sums[t], one, now[t].x, now[t].y);
#pragma unroll
    for (int t = 0; t < TILES; ++t) multiply<T>(sums[t], two, now[t].z, now[t].w);
}

// Store a warp's sums from `mine` on.
template <int STRIPS, int TILES>
__device__ __forceinline__ void store_sums(const float (&sums)[STRIPS][TILES][4], uint32_t mine, int lane) {
#pragma unroll
    for (int i = 0; i < STRIPS * TILES * 4; ++i) {
        const int tile = i / 4;
        store(mine + tile * SUMS + ((lane % 4 * 2 + i % 2) * STRIDE + lane / 4 + i / 2 % 2 * 8) * 4, __float_as_uint(sums[tile / TILES][tile % TILES][i % 4]));
    }
}

// Where the first warp of its group has the sum of row r of a block's and row b of x, `each` bytes a warp.
template <int STRIPS, int TILES>
__device__ __forceinline__ uint32_t place_of_sum(uint32_t memory, uint32_t each, int across, int r, int b) {
    const int tile = r / ROWS % STRIPS * TILES + b / BATCH;
    return memory + r / (ROWS * STRIPS) * across * each + tile * SUMS + (b % BATCH * STRIDE + r % ROWS) * 4;
}

}  // namespace
