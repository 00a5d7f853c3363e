// y = x W^T for a sparse W as values and the gaps between them (the layout of cuda_gaps.py) and one to eight rows of x; and W unpacked.
//
// A lane goes along one row of W and adds its kept values times x, which lies in shared memory column by column. It reads eight entries
// at once; a multiplication adds up the gaps of four. A warp takes a part of a strip's groups, and begins at the columns that are stored
// for it. The order of summation is fixed.

#include "cuda_tiles.h"

#include <type_traits>

namespace {

constexpr int ENTRIES = 8;                             // of a row in a group
constexpr int VALUES = LANES * ENTRIES * 2;            // bytes of a group's values, before its gaps
constexpr int GROUP = VALUES + LANES * ENTRIES / 2;    // bytes of a group
constexpr uint32_t NIBBLES = 0x0f0f0f0f, EACH = 0x01010101;

__device__ __forceinline__ int strips_of_lanes(const Layout& w) { return (w.rows + LANES - 1) / LANES; }
// What follows the strips' first groups: the row of each lane of each strip, then each part's first columns.
__device__ __forceinline__ const int* order(const Layout& w) { return w.starts + strips_of_lanes(w) + 1; }
__device__ __forceinline__ const uint16_t* columns_before(const Layout& w, int strip, int part) {
    return reinterpret_cast<const uint16_t*>(order(w) + w.rows) + (static_cast<size_t>(strip) * w.panels + part) * LANES;
}

__device__ __forceinline__ void store_four(uint32_t to, const uint4& v) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void store_half(uint32_t to, uint32_t value) { asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "r"(value) : "memory"); }

// A lane's entries of a group, in pairs, and their gaps: byte j has that of entry j in its lower half, that of entry 4 + j in its upper one.
struct Entries {
    uint32_t pairs[4], gaps;

    __device__ __forceinline__ void read(const uint8_t* group, int lane) {
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3]) : "l"(group + lane * 16));
        asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(gaps) : "l"(group + VALUES + lane * 4));
    }

    // Call use(value's pair, whether it is the upper one, place) for each entry. at: the place reached so far; a column takes STEP.
    template <int STEP, class Use>
    __device__ __forceinline__ void walk(uint32_t& at, Use use) const {
        // Sums of four gaps times this fit in a byte.
        constexpr uint32_t FACTOR = STEP < 4 ? STEP : 4, REST = STEP / FACTOR;
        const uint32_t sums[2] = {(gaps & NIBBLES) * (FACTOR * EACH), (gaps >> 4 & NIBBLES) * (FACTOR * EACH)};
#pragma unroll
        for (int i = 0; i < ENTRIES; ++i) {
            const uint32_t place = __dp4a(sums[i / 4], REST << i % 4 * 8, at);
            use(pairs[i / 2], i % 2, place);
            if (i % 4 == 3) at = place;
        }
    }
};

// The groups of a part of a strip, the next AHEAD of them in registers.
template <int AHEAD>
struct Part {
    const uint8_t* next;
    int count;
    Entries ahead[AHEAD];

    __device__ __forceinline__ Part(const Layout& w, int strip, int part, int lane) {
        const int start = w.starts[strip], groups = w.starts[strip + 1] - start, first = groups * part / w.panels;
        count = groups * (part + 1) / w.panels - first;
        next = w.data + static_cast<size_t>(start + first) * GROUP;
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (i < count) ahead[i].read(next + i * GROUP, lane);
    }

    template <class Use>
    __device__ __forceinline__ void each(int lane, Use use) {
        for (int left = count; left > 0; left -= AHEAD) {
            next += AHEAD * GROUP;
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                if (i >= left) return;
                use(ahead[i]);
                if (i + AHEAD < left) ahead[i].read(next + i * GROUP, lane);
            }
        }
    }
};

template <typename T>
__device__ __forceinline__ float widen_half(uint32_t pair, bool upper) {
    if constexpr (std::is_same_v<T, __half>) return __half2float(__ushort_as_half(static_cast<unsigned short>(upper ? pair >> 16 : pair)));
    else return __uint_as_float(upper ? pair & 0xffff0000 : pair << 16);
}

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

// Copy rows of x to shared memory, column by column, B numbers each: zeros after the batch. A thread writes 16 bytes at a time.
template <int B>
__device__ __forceinline__ void copy_columns(const uint16_t* x, int columns, int batch, uint32_t to) {
    constexpr int WIDTH = 8 / B, WORDS = (WIDTH + 1) / 2;   // columns that a thread reads of each row, and their words
    using Vector = std::conditional_t<WIDTH == 8, uint4, std::conditional_t<WIDTH == 4, uint2, std::conditional_t<WIDTH == 2, uint32_t, uint16_t>>>;
    const bool vectors = columns % WIDTH == 0 && reinterpret_cast<uintptr_t>(x) % sizeof(Vector) == 0;
    for (int column = threadIdx.x * WIDTH; column < columns; column += blockDim.x * WIDTH) {
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
}

// Bytes of x in shared memory.
template <int B>
__host__ __device__ __forceinline__ int bytes_of_columns(int columns) { return (columns * B * 2 + 15) / 16 * 16; }

// A warp for each part (`panels`) of each of a block's strips.
template <typename T, int B, int AHEAD>
__global__ void __launch_bounds__(1024, 1) multiply_gaps(Layout w, const T* x, const T* bias, T* y, int batch) {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    const int warp = __shfl_sync(ALL, threadIdx.x / LANES, 0), together = blockDim.x / LANES / w.panels, own = warp / w.panels, part = warp - own * w.panels;
    // Beyond the last strip the last one is multiplied again, and its sums are dropped.
    const int strip = min(static_cast<int>(blockIdx.x) * together + own, strips_of_lanes(w) - 1);
    Part<AHEAD> groups(w, strip, part, lane);
    const uint32_t columns = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
    uint32_t at = columns + columns_before(w, strip, part)[lane] * B * 2;
    // The row whose sums this thread adds up.
    const int below = warp % together * LANES + lane, position = blockIdx.x * together * LANES + below;
    const int row = position < w.rows ? order(w)[position] : -1;
#if __CUDA_ARCH__ >= 900
    // As in cuda_decode.h: weights load before the previous kernel, which computes x, ends.
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    copy_columns<B>(reinterpret_cast<const uint16_t*>(x), w.columns, batch, columns);
    __syncthreads();

    float sums[B] = {};
    groups.each(lane, [&](const Entries& entries) {
        entries.walk<B * 2>(at, [&](uint32_t pair, bool upper, uint32_t column) { add_column<T, B>(sums, widen_half<T>(pair, upper), column); });
    });

    constexpr uint32_t EACH_WARP = B * LANES * 4;
    const uint32_t scratch = columns + bytes_of_columns<B>(w.columns);
#pragma unroll
    for (int b = 0; b < B; ++b) store(scratch + warp * EACH_WARP + (b * LANES + lane) * 4, __float_as_uint(sums[b]));
    __syncthreads();
    if (row < 0) return;
    const uint32_t from = scratch + below / LANES * w.panels * EACH_WARP + lane * 4;
    for (int b = warp / together; b < batch; b += w.panels)
        narrow(sum_warps(bias ? widen(bias[row]) : 0, from + b * LANES * 4, EACH_WARP, w.panels), y[static_cast<size_t>(b) * w.rows + row]);
}

// Write the dense weight (rows, columns): a block writes `width` columns of a strip, which it puts together in shared memory.
__global__ void __launch_bounds__(512, 3) expand_gaps(Layout w, uint16_t* dense, int width) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, warps = blockDim.x / LANES;
    const int windows = (w.columns + width - 1) / width, strip = blockIdx.x / windows, left = (blockIdx.x - strip * windows) * width;
    const uint32_t table = static_cast<uint32_t>(__cvta_generic_to_shared(memory)), stride = 2 * width + 16, own = table + lane * stride;
    for (uint32_t i = threadIdx.x * 16; i < LANES * stride; i += blockDim.x * 16) store_four(table + i, uint4{});
    __syncthreads();
    for (int part = warp; part < w.panels; part += warps) {
        const int first = columns_before(w, strip, part)[lane], last = part + 1 < w.panels ? columns_before(w, strip, part + 1)[lane] : w.columns;
        if (!__any_sync(ALL, first < left + width && last >= left)) continue;
        // In bytes from the window's left end: too large to its left, too.
        uint32_t at = 2 * (first - left);
        Part<2> groups(w, strip, part, lane);
        groups.each(lane, [&](const Entries& entries) {
            entries.walk<2>(at, [&](uint32_t pair, bool upper, uint32_t place) {
                const uint32_t value = upper ? pair >> 16 : pair & 0xffff;
                if (value && place < 2 * width) store_half(own + place, value);
            });
        });
    }
    __syncthreads();
    for (int r = warp; r < LANES && strip * LANES + r < w.rows; r += warps) {
        const int row = order(w)[strip * LANES + r];
        for (int column = lane * 8; column < width; column += LANES * 8) {
            const uint4 v = load_four(table + r * stride + column * 2);
            write_eight(w, dense, row, left + column, {v.x, v.y, v.z, v.w});
        }
    }
}

template <typename T, int B, int AHEAD>
cudaError_t launch(const Layout& w, const void* x, const void* bias, void* y, int batch, int together, bool overlap, cudaStream_t stream) {
    const int warps = w.panels * together, blocks = (w.rows + together * LANES - 1) / (together * LANES);
    return launch_blocks(multiply_gaps<T, B, AHEAD>, w, blocks, warps, bytes_of_columns<B>(w.columns) + warps * B * LANES * 4, overlap, stream,
                         static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(y), batch);
}

template <typename T>
cudaError_t launch_for(const Layout& w, const void* x, const void* bias, void* y, int batch, int together, bool overlap, cudaStream_t stream) {
    const auto call = batch <= 1 ? launch<T, 1, 4> : batch <= 2 ? launch<T, 2, 4> : batch <= 4 ? launch<T, 4, 3> : launch<T, 8, 2>;
    return call(w, x, bias, y, batch, together, overlap, stream);
}

}  // namespace

// As losa_matvec of cuda.cu. panels: parts of a strip, a warp for each; slot: bytes of a group; groups: strips of a block.
extern "C" int losa_matvec_gaps(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns,
                                int panels, int slot, int half, int batch, int groups, int overlap, void* stream) {
    const Layout w{static_cast<const uint8_t*>(data), static_cast<const int*>(starts), rows, columns, panels, slot};
    const auto queue = static_cast<cudaStream_t>(stream);
    return half ? launch_for<__half>(w, x, bias, y, batch, groups, overlap, queue) : launch_for<__nv_bfloat16>(w, x, bias, y, batch, groups, overlap, queue);
}

extern "C" int losa_expand_gaps(const void* data, const void* starts, void* dense, int rows, int columns, int panels, int slot, void* stream) {
    constexpr int width = 1024;
    const Layout w{static_cast<const uint8_t*>(data), static_cast<const int*>(starts), rows, columns, panels, slot};
    const int blocks = (rows + LANES - 1) / LANES * ((columns + width - 1) / width), warps = min(16, max(panels, 4));
    return launch_blocks(expand_gaps, w, blocks, warps, LANES * (2 * width + 16), false, static_cast<cudaStream_t>(stream), static_cast<uint16_t*>(dense),
                         width);
}
