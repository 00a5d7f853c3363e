// y = x W^T for a sparse W as values, or codes with scales, and the gaps between them (the layouts of cuda_gaps.py and cuda_coded_gaps.py)
// and one to eight rows of x; and W unpacked.
//
// A lane goes along one row of W and adds its kept values times x, which lies in shared memory column by column. A warp takes a part of
// a strip's groups, and begins at the columns that are stored for it. Four codes of a row share a scale, which lies in shared memory,
// too. The order of summation is fixed.

#pragma once

#include "cuda_decode.h"
#include "cuda_entries.h"

namespace {

__device__ __forceinline__ void store_four(uint32_t to, const uint4& v) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void store_half(uint32_t to, uint32_t value) { asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "r"(value) : "memory"); }

// Add a value times a column of x, B numbers.
template <typename T, int B>
__device__ __forceinline__ void add_column(float (&sums)[B], float value, uint32_t column) {
    uint32_t x[4];
    if constexpr (B == 1) x[0] = load_half<0>(column);
    if constexpr (B == 2) x[0] = load(column);
    if constexpr (B == 4) asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(column) : "memory");
    if constexpr (B == 8) {
        const uint4 all = load_four(column);
        x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
    }
#pragma unroll
    for (int b = 0; b < B; ++b) sums[b] += value * widen_half<T>(x[b / 2], b % 2);
}

__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}

// Copy rows of x to shared memory, column by column, B numbers each: zeros after the batch. A thread writes 16 bytes at a time. One row
// is not copied through registers: the copy would wait for the weights, because ptxas counts all loads by one scoreboard.
template <int B>
__device__ __forceinline__ void copy_columns(const uint16_t* x, int columns, int batch, uint32_t to) {
    constexpr int WIDTH = 8 / B, WORDS = (WIDTH + 1) / 2;   // columns that a thread reads of each row, and their words
    using Vector = std::conditional_t<WIDTH == 8, uint4, std::conditional_t<WIDTH == 4, uint2, std::conditional_t<WIDTH == 2, uint32_t, uint16_t>>>;
    const bool vectors = columns % WIDTH == 0 && reinterpret_cast<uintptr_t>(x) % sizeof(Vector) == 0;
    for (int column = threadIdx.x * WIDTH; column < columns; column += blockDim.x * WIDTH) {
        if (B == 1 && vectors) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + column * 2), "l"(x + column) : "memory");
            continue;
        }
        uint32_t rows[B][WORDS] = {};
#pragma unroll
        for (int b = 0; b < B; ++b) {
            if (b >= batch) break;
            const uint16_t* from = x + static_cast<size_t>(b) * columns + column;
            if (vectors) {
                const Vector read = *reinterpret_cast<const Vector*>(from);
                memcpy(rows[b], &read, sizeof(read));
            } else {
#pragma unroll
                for (int i = 0; i < WIDTH; ++i)
                    if (column + i < columns) rows[b][i / 2] |= static_cast<uint32_t>(from[i]) << i % 2 * 16;
            }
        }
        uint32_t words[4];
        // Of two rows, the numbers of each column next to each other.
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int place = 2 * i / B, pair = 2 * i % B;
            words[i] = B == 1 ? rows[0][i % WORDS] : permute(rows[pair][place / 2], rows[(pair + 1) % B][place / 2], place % 2 ? 0x7632 : 0x5410);
        }
        store_four(to + column * B * 2, uint4{words[0], words[1], words[2], words[3]});
    }
    if (B == 1) wait_for_copies();
}

// Start copying a strip's scales to shared memory: a warp of each part its share.
__device__ __forceinline__ void copy_scales(const Layout& w, int strip, int part, int lane, uint32_t to) {
    const int* from = scales_of(w, strip);
    for (int i = part * LANES + lane; i < scale_words(w); i += w.panels * LANES)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to + 4 * i), "l"(from + i) : "memory");
}

// A scale of fp16 in shared memory.
__device__ __forceinline__ float load_scale(uint32_t from) { return __half2float(__ushort_as_half(static_cast<unsigned short>(load_half<0>(from)))); }

// Bytes of x in shared memory.
template <int B>
__host__ __device__ __forceinline__ int bytes_of_columns(int columns) { return (columns * B * 2 + 15) / 16 * 16; }

// LARGE: a block has up to 32 warps, otherwise 24, whose lanes have 40 registers, so that a processor holds 48 warps.
template <bool LARGE>
constexpr int MOST_GAP_WARPS = LARGE ? 32 : 24;
template <int B, bool LARGE>
constexpr int AHEAD = LARGE && B <= 2 ? 4 : B == 1 ? 3 : 2;

// A warp for each part of each of `together` strips; GATED: of a strip of gate and the one of up with the same rows. inverse: of `panels`,
// times 2^16, rounded up.
template <typename T, int BITS, int B, bool LARGE, Ending ENDING>
__global__ void __launch_bounds__(MOST_GAP_WARPS<LARGE> * LANES, LARGE ? 1 : 2)
    multiply_gaps(Layout w, const T* x, const T* bias, T* y, int batch, int together, uint32_t inverse, Around around) {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    const int warp = __shfl_sync(ALL, threadIdx.x / LANES, 0), own = warp * inverse >> 16, part = warp - own * w.panels;
    // Beyond the last strip the last one is multiplied again, and its sums are dropped.
    const int wanted = ENDING == GATED ? blockIdx.x + own * (strips_of_lanes(w) / 2) : blockIdx.x * together + own;
    const int strip = min(wanted, strips_of_lanes(w) - 1);
    Part<BITS, AHEAD<B, LARGE>> groups(w, strip * w.panels + part, lane);
    const uint32_t columns = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
    uint32_t at = columns + columns_before(w, strip * w.panels + part)[lane] * B * 2;
    // The row of this lane's sums.
    const int row = wanted * LANES + lane < w.rows ? order(w)[wanted * LANES + lane] : -1;
    constexpr bool READS = ENDING == NORMED || ENDING == GATED;
    constexpr uint32_t EACH_WARP = B * LANES * 4;
    const uint32_t sums_of_warps = columns + bytes_of_columns<B>(w.columns), squares = sums_of_warps + blockDim.x / LANES * EACH_WARP;
    const uint32_t roots = squares + 4 * batch * around.parts, scales = (READS ? roots + 4 * batch : squares) + own * scale_words(w) * 4;
    if constexpr (BITS != 16) copy_scales(w, strip, part, lane, scales);
    uint32_t gain = 0, before = 0;
    if (ENDING == ADDED && row >= 0) gain = around.gain[row];
#if __CUDA_ARCH__ >= 900
    // As in cuda_decode.h: weights load before the previous kernel, which computes x, ends.
    if (ENDING != PLAIN && around.early) asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    if (READS) copy_squares(around, squares, warp, lane, batch);
    if (ENDING == ADDED && row >= 0 && part < batch) before = around.total[static_cast<size_t>(part) * w.rows + row];
    copy_columns<B>(reinterpret_cast<const uint16_t*>(x), w.columns, batch, columns);
    if (BITS != 16 && B > 1) wait_for_copies();
    __syncthreads();

    const uint32_t power = power_of_codes(w);
    float sums[B] = {}, four[B];
    groups.each([&](const auto& entries) {
        entries.template walk<B * 2>(at, [&](int i, uint32_t column) {
            const float value = entries.template value<T>(i, power);
            if constexpr (BITS == 16) {
                add_column<T, B>(sums, value, column);
            } else {
#pragma unroll
                for (int b = 0; b < B; ++b) four[b] = i % 4 ? four[b] : 0;
                add_column<T, B>(four, value, column);
                if (i % 4 < 3) return;
                // The last entry's column tells their section.
                uint32_t section = (column - columns) / (SECTION * B * 2);
                asm("" : "+r"(section));
                const float scale = load_scale(scales + 2 * lane + section * (LANES * 2));
#pragma unroll
                for (int b = 0; b < B; ++b) sums[b] += scale * four[b];
            }
        });
    });

    // A warp's sums, and then those of its strip.
    const uint32_t from = sums_of_warps + own * w.panels * EACH_WARP + lane * 4;
#pragma unroll
    for (int b = 0; b < B; ++b) store(from + part * EACH_WARP + b * LANES * 4, __float_as_uint(sums[b] * UNIT<BITS>));
    if (READS) find_roots(around, squares, roots, warp, lane, batch, w.columns);
    __syncthreads();
    if (ENDING == GATED && own) return;
    for (int b = part; b < batch; b += w.panels) {
        float square = 0;
        if (row >= 0) {
            const uint32_t first = from + b * LANES * 4;
            const float sum = sum_warps(0, first, EACH_WARP, w.panels);
            const float other = ENDING == GATED ? sum_warps(0, first + w.panels * EACH_WARP, EACH_WARP, w.panels) : 0;
            if (ENDING == ADDED && b != part) before = around.total[static_cast<size_t>(b) * w.rows + row];
            square = finish<ENDING>(around, bias, y, w.rows, row, b, sum, other, roots, before, gain);
        }
        if (ENDING == ADDED) {
            square = sum_lanes(square, lane, LANES);
            if (lane == 0) around.squares[b * strips_of_lanes(w) + strip] = square;
        }
    }
}

template <typename T>
__device__ __forceinline__ uint32_t bits_of(T value) {
    uint16_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

constexpr int UNPACKING_WARPS = 8;   // of a block

// Write the dense weight (rows, columns): a block writes `width` columns of a strip, which it puts together in shared memory. A processor
// has several blocks, of which some write while others read.
template <typename T, int BITS>
__global__ void __launch_bounds__(UNPACKING_WARPS * LANES, 4) expand_gaps(Layout w, T* dense, int width) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int windows = (w.columns + width - 1) / width, strip = blockIdx.x / windows, left = (blockIdx.x - strip * windows) * width;
    const uint32_t table = static_cast<uint32_t>(__cvta_generic_to_shared(memory)), stride = 2 * width + 16, own = table + lane * stride;
    for (uint32_t i = threadIdx.x * 16; i < LANES * stride; i += blockDim.x * 16) store_four(table + i, uint4{});
    __syncthreads();
    for (int part = warp; part < w.panels; part += UNPACKING_WARPS) {
        const uint16_t* reached = columns_before(w, strip * w.panels + part) + lane;
        const int first = reached[0], last = part + 1 < w.panels ? reached[LANES] : w.columns;
        if (!__any_sync(ALL, first < left + width && last >= left)) continue;
        // In bytes from the window's left end: too large to its left, too.
        uint32_t at = 2 * (first - left);
        Part<BITS, 4> groups(w, strip * w.panels + part, lane);
        groups.each([&](const auto& entries) {
            entries.template walk<2>(at, [&](int i, uint32_t place) {
                if constexpr (BITS == 16) {
                    if (entries.bits(i) && place < 2 * width) store_half(own + place, entries.bits(i));
                } else {
                    const float code = entries.template value<T>(i, power_of_codes(w)) * UNIT<BITS>;
                    if (code == 0 || place >= 2 * width) return;
                    const auto* scales = reinterpret_cast<const __half*>(scales_of(w, strip));
                    T value;
                    narrow(code * __half2float(scales[(left + place / 2) / SECTION * LANES + lane]), value);
                    store_half(own + place, bits_of(value));
                }
            });
            // The last one, if all lanes are beyond the window.
            if (!__any_sync(ALL, static_cast<int>(at) < 2 * width)) groups.left = 0;
        });
    }
    __syncthreads();
    for (int r = warp; r < LANES && strip * LANES + r < w.rows; r += UNPACKING_WARPS) {
        const int row = order(w)[strip * LANES + r];
        for (int column = lane * 8; column < width; column += LANES * 8) {
            const uint4 v = load_four(table + r * stride + column * 2);
            write_eight(w, reinterpret_cast<uint16_t*>(dense), row, left + column, {v.x, v.y, v.z, v.w});
        }
    }
}

template <typename T, int BITS, Ending ENDING, int B>
cudaError_t launch_rows(const Layout& w, const void* x, const void* bias, void* y, int batch, int together, bool overlap, const Around& around,
                        cudaStream_t stream) {
    constexpr bool READS = ENDING == NORMED || ENDING == GATED;
    const int warps = w.panels * together, strips = (strips_of_lanes(w) >> (ENDING == GATED)), of_block = ENDING == GATED ? 1 : together;
    const int shared = bytes_of_columns<B>(w.columns) + warps * B * LANES * 4 + (READS ? 4 * batch * (around.parts + 1) : 0) +
                       (BITS == 16 ? 0 : together * scale_words(w) * 4);
    // Eight rows of x need more registers.
    const auto kernel = B == BATCH || warps > MOST_GAP_WARPS<false> ? multiply_gaps<T, BITS, B, true, ENDING> : multiply_gaps<T, BITS, B, B == BATCH, ENDING>;
    return launch_blocks(kernel, w, (strips + of_block - 1) / of_block, warps, shared, overlap, stream, static_cast<const T*>(x),
                         static_cast<const T*>(bias), static_cast<T*>(y), batch, together, (1u << 16) / w.panels + 1, around);
}

template <typename T, int BITS, Ending ENDING = PLAIN>
cudaError_t launch_gaps(const Layout& w, const void* x, const void* bias, void* y, int batch, int together, bool overlap, const Around& around,
                        cudaStream_t stream) {
    const auto call = batch <= 1   ? launch_rows<T, BITS, ENDING, 1>
                      : batch <= 2 ? launch_rows<T, BITS, ENDING, 2>
                      : batch <= 4 ? launch_rows<T, BITS, ENDING, 4>
                                   : launch_rows<T, BITS, ENDING, 8>;
    return call(w, x, bias, y, batch, together, overlap, around, stream);
}

template <int BITS>
cudaError_t launch_ending_gaps(int ending, const Layout& w, const void* x, const void* bias, void* y, int batch, bool overlap, const Around& around,
                               cudaStream_t stream) {
    using T = __nv_bfloat16;
    const auto call = ending == NORMED ? launch_gaps<T, BITS, NORMED> : ending == GATED ? launch_gaps<T, BITS, GATED> : launch_gaps<T, BITS, ADDED>;
    return call(w, x, bias, y, batch, ending == GATED ? 2 : 1, overlap, around, stream);
}

// width: columns of a block, a multiple of 8.
template <typename T, int BITS>
cudaError_t launch_expand(const Layout& w, void* dense, int width, cudaStream_t stream) {
    const int blocks = (w.rows + LANES - 1) / LANES * ((w.columns + width - 1) / width);
    return launch_blocks(expand_gaps<T, BITS>, w, blocks, UNPACKING_WARPS, LANES * (2 * width + 16), false, stream, static_cast<T*>(dense), width);
}

}  // namespace
