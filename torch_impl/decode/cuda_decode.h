// y = x W^T for one to eight rows of x, and what a decoder block computes next of it: one kernel for the panels of cuda.cu and of cuda_coded.cu.
// cuda_gaps.h has the same endings.
//
// PLAIN     y, with a bias or none.
// NORMED    of RMSNorm(t) W^T: x is t times the norm's gain, so the product is divided by the root of t's mean square, which each block
//           computes from sums over parts of t's rows.
// GATED     as NORMED for the rows of gate and then of up: SiLU(gate) * up. A block multiplies a strip of each.
// ADDED     t, in place, with y added; t times the gain of the next norm; and per row and strip the sum of t's squares.
//
// A warp reads panels of its strip one after the other. The order of summation is fixed.

#pragma once

#include "cuda_panels.h"

#include <type_traits>

namespace {

enum Ending { PLAIN, NORMED, GATED, ADDED };

// What endings read and write besides y. Its numbers are bf16.
struct Around {
    float* squares;         // (batch, parts) read, or (batch, strips) written
    int parts;
    float eps;
    uint16_t* total;        // t (batch, rows)
    const uint16_t* gain;   // (rows)
    int across;             // warps of a strip
    bool early;             // let the next kernel load its weights before this one has its x
};

__device__ __forceinline__ float widen_bits(uint32_t bits) { return __uint_as_float(bits << 16); }
template <typename T>
__device__ __forceinline__ float rounded(float value) {
    T narrowed;
    narrow(value, narrowed);
    return widen(narrowed);
}

// Start copying the sums of squares to shared memory: a warp those of each row that is its own, a lane those that it adds.
__device__ __forceinline__ void copy_squares(const Around& a, uint32_t to, int warp, int lane, int batch) {
    for (int b = warp; b < batch; b += static_cast<int>(blockDim.x / LANES))
        for (int i = lane; i < a.parts; i += LANES)
            asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to + 4 * (b * a.parts + i)), "l"(a.squares + b * a.parts + i) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Add up a number of `count` neighbouring lanes.
__device__ __forceinline__ float sum_lanes(float sum, int lane, int count) {
    for (int step = count / 2; step > 0; step /= 2) sum += __uint_as_float(__shfl_sync(ALL, __float_as_uint(sum), lane ^ step));
    return sum;
}

// From those sums, what the product of each row is multiplied by.
__device__ __forceinline__ void find_roots(const Around& a, uint32_t squares, uint32_t roots, int warp, int lane, int batch, int columns) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    for (int b = warp; b < batch; b += static_cast<int>(blockDim.x / LANES)) {
        float sum = 0;
        for (int i = lane; i < a.parts; i += LANES) sum += __uint_as_float(load(squares + 4 * (b * a.parts + i)));
        sum = sum_lanes(sum, lane, LANES);
        if (lane == 0) store(roots + 4 * b, __float_as_uint(rsqrtf(sum / static_cast<float>(columns) + a.eps)));
    }
}

// Write what a row's sum becomes for row b of x; return the square of t. other: the sum of up's row. roots: in shared memory; before: t so far.
template <Ending ENDING, typename T>
__device__ __forceinline__ float finish(const Around& a, const T* bias, T* y, int rows, int row, int b, float sum, float other, uint32_t roots,
                                        uint32_t before, uint32_t gain) {
    const size_t place = static_cast<size_t>(b) * rows + row;
    const float own_bias = bias ? widen(bias[row]) : 0;
    if constexpr (ENDING == PLAIN) narrow(sum + own_bias, y[place]);
    if constexpr (ENDING == NORMED) narrow(sum * __uint_as_float(load(roots + 4 * b)) + own_bias, y[place]);
    if constexpr (ENDING == GATED) {
        const int inner = rows / 2;
        const float root = __uint_as_float(load(roots + 4 * b)), other_bias = bias ? widen(bias[inner + row]) : 0;
        const float gate = rounded<T>(sum * root + own_bias), up = rounded<T>(other * root + other_bias);
        narrow(rounded<T>(gate / (1 + expf(-gate))) * up, y[static_cast<size_t>(b) * inner + row]);
    }
    if constexpr (ENDING == ADDED) {
        T total;
        narrow(widen_bits(before) + rounded<T>(sum + own_bias), total);
        // Not by memcpy: stored by bytes, the lower one is wrong, since ptxas converts the number to an integer (CUDA 13.0).
        reinterpret_cast<T*>(a.total)[place] = total;
        narrow(widen(total) * widen_bits(gain), y[place]);
        return widen(total) * widen(total);
    }
    return 0;
}

template <typename T, class Panels, Ending ENDING>
__global__ void __launch_bounds__(1024, 1) decode(Layout w, const T* x, const T* bias, T* y, int batch, int share_of_warp, Around around) {
    static_assert(ENDING == PLAIN || std::is_same_v<T, __nv_bfloat16>, "x times a gain may be too large for fp16");
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    const int warp = __shfl_sync(ALL, threadIdx.x / LANES, 0);
    int first = warp * share_of_warp, strip = blockIdx.x;
    if (ENDING == PLAIN) {
        // A block has several strips. Beyond the last one the last one is multiplied again, and its sums are dropped.
        const int groups = blockDim.x / LANES / around.across, group = warp / around.across;
        first -= group * around.across * share_of_warp;
        strip = min(strip * groups + group, strips(w) - 1);
    }
    if (ENDING == GATED && warp >= around.across && warp < 2 * around.across) {
        first -= around.across * share_of_warp;
        strip += strips(w) / 2;
    }
    // Not positive for warps that only write: all their lanes find the strip's end, and copy nothing.
    const int count = min(share_of_warp, w.panels - first);
    const uint32_t each = SLOTS * w.slot + BARRIERS + SCRATCH, table = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
    const uint32_t mine = table + Panels::HEAD + warp * each, scratch = mine + each - SCRATCH;
    Feed<> feed(w, mine, mine + SLOTS * w.slot, lane, strip * w.panels + first, count);
    Panels panels(table, lane);
    // The thread's number of the result.
    const int b = threadIdx.x / ROWS, row = blockIdx.x * ROWS + threadIdx.x % ROWS;
    const bool own = b < batch && row < w.rows;
    const size_t place = static_cast<size_t>(b) * w.rows + row;
    uint32_t gain = 0, before = 0;
    if (ENDING == ADDED && own) gain = around.gain[row];
#if __CUDA_ARCH__ >= 900
    // Weights do not change, so they load before the previous kernel, which computes x, ends. Let the next kernel do the same.
    if (ENDING != PLAIN && around.early) asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    // What the ending needs is on its way while the warp multiplies.
    const uint32_t squares = table + Panels::HEAD + blockDim.x / LANES * each, roots = squares + 4 * batch * around.parts;
    if (ENDING == ADDED && own) before = around.total[place];
    if (ENDING == NORMED || ENDING == GATED) copy_squares(around, squares, warp, lane, batch);

    float sums[4] = {};
    panels.multiply(sums, feed, w, x, first, count, batch, scratch, lane);
    if constexpr (ENDING == PLAIN) {
        add_warps(w, sums, scratch, each, warp, lane, around.across, bias, y, batch);
        return;
    }
    store_sums(sums, scratch, lane);
    if (ENDING == NORMED || ENDING == GATED) find_roots(around, squares, roots, warp, lane, batch, w.columns);
    __syncthreads();
    const uint32_t from = table + Panels::HEAD + each - SCRATCH + threadIdx.x % ROWS * 32 + b * 4;
    float square = 0;
    if (own) {
        const float sum = sum_warps(0, from, each, around.across), other = ENDING == GATED ? sum_warps(0, from + around.across * each, each, around.across) : 0;
        square = finish<ENDING>(around, bias, y, w.rows, row, b, sum, other, roots, before, gain);
    }
    if (ENDING == ADDED && warp * LANES < ROWS * batch) {
        square = sum_lanes(square, lane, ROWS);
        if (b < batch && threadIdx.x % ROWS == 0) around.squares[b * strips(w) + blockIdx.x] = square;
    }
}

template <typename T, class Panels, Ending ENDING>
cudaError_t launch(const Layout& w, const void* x, const void* bias, void* y, int batch, int share, int groups, int overlap, Around around,
                   cudaStream_t stream) {
    constexpr bool TWICE = ENDING == GATED, READS = ENDING == NORMED || ENDING == GATED;
    around.across = (w.panels + share - 1) / share;
    int warps = (around.across << TWICE) * groups, blocks = ((strips(w) >> TWICE) + groups - 1) / groups;
    // A thread for each number of the result.
    if (ENDING != PLAIN) warps = max(warps, (ROWS * batch + LANES - 1) / LANES);
    const int shared = Panels::HEAD + warps * (SLOTS * w.slot + BARRIERS + SCRATCH) + (READS ? 4 * batch * (around.parts + 1) : 0);
    return launch_blocks(decode<T, Panels, ENDING>, w, blocks, warps, shared, overlap, stream, static_cast<const T*>(x), static_cast<const T*>(bias),
                         static_cast<T*>(y), batch, share, around);
}

template <class Panels>
cudaError_t launch_ending(int ending, const Layout& w, const void* x, const void* bias, void* y, int batch, int share, int overlap, const Around& around,
                          cudaStream_t stream) {
    using T = __nv_bfloat16;
    const auto call = ending == NORMED ? launch<T, Panels, NORMED> : ending == GATED ? launch<T, Panels, GATED> : launch<T, Panels, ADDED>;
    return call(w, x, bias, y, batch, share, 1, overlap, around, stream);
}

}  // namespace
