// y = W x for a sparse W in panels (the layout of cuda.py) and one to eight rows of x, on the tensor cores.
//
// A warp reads panels of 16 x 128 one after the other. In a product of 16 x 16 by 16 x 8, a lane holds four numbers of a row,
// twice. It counts bits in the bitmap to find their values, and reads four neighbouring values, some of which belong to other
// lanes. Two byte permutations put its own values and zeros in place. Neighbouring lanes read neighbouring values, so there are
// no bank conflicts. The order of summation is fixed.

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

template <typename T>
__global__ void __launch_bounds__(1024, 1) decode(Layout w, const T* x, const T* bias, T* y, int batch, int share_of_warp) {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    const int warp = __shfl_sync(ALL, threadIdx.x / LANES, 0);
    const int first = warp * share_of_warp, count = min(share_of_warp, w.panels - first);
    const uint32_t each = SLOTS * w.slot + BARRIERS + SCRATCH, mine = static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + warp * each;
    const uint32_t scratch = mine + each - SCRATCH;
    Feed feed(w, mine, lane, blockIdx.x * w.panels + first, count);
    const Share share(lane);
#if __CUDA_ARCH__ >= 900
    // Weights do not change, so they load before the previous kernel, which computes x, ends. Let the next kernel do the same.
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    const T* numbers = x + static_cast<size_t>(lane / 4) * w.columns + first * COLUMNS + lane % 4 * 8;
    // How many numbers of x can be read eight at a time.
    int whole = w.columns % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0 ? w.columns - first * COLUMNS : 0;
    const uint32_t words = lane / 8 * 16;

    float sums[4] = {};
    uint4 now[4] = {};
    uint32_t used = lane < 4 * batch;
    asm volatile("" : "+r"(used));
    for (int panel = 0; panel < count; ++panel) {
        // Lanes beyond the batch keep their zeros.
        if (used) {
            if (whole >= COLUMNS) {
#pragma unroll
                for (int i = 0; i < 4; ++i) now[i] = *reinterpret_cast<const uint4*>(numbers + i * 32);
            } else {
                const int left = w.columns - (first + panel) * COLUMNS - lane % 4 * 8;
#pragma unroll
                for (int i = 0; i < 4; ++i) now[i] = read_end(numbers + i * 32, left - i * 32);
            }
        }
        numbers += COLUMNS;
        whole -= COLUMNS;
        feed.wait();
        count_bits(feed.at, scratch, lane);
        uint32_t values = feed.at + MAP;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // Four tiles of 8 x 16: two halves of two products.
            const uint4 word = load_four(feed.at + words + i * 64), counts = load_four(scratch + i * 16);
            uint32_t one[4], two[4];
            read_quad(one[0], one[2], word.x, counts.x, values, share);
            read_quad(one[1], one[3], word.y, counts.y, values, share);
            read_quad(two[0], two[2], word.z, counts.z, values, share);
            read_quad(two[1], two[3], word.w, counts.w, values, share);
            multiply<T>(sums, one, now[i].x, now[i].y);
            multiply<T>(sums, two, now[i].z, now[i].w);
        }
        __syncwarp();
        feed.turn(lane);
    }
    add_warps(w, sums, scratch, each, warp, lane, bias, y, batch);
}

// Write the dense weight (rows, columns), one panel per warp.
__global__ void expand(Layout w, uint16_t* dense) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int panel = blockIdx.x * (blockDim.x / LANES) + warp;
    unsigned char* mine = memory + warp * (w.slot + SCRATCH);
    if (panel >= (w.rows + ROWS - 1) / ROWS * w.panels) return;
    const int start = w.starts[panel], pieces = w.starts[panel + 1] - start;
    for (int i = lane; i < pieces; i += LANES)
        reinterpret_cast<uint4*>(mine)[i] = reinterpret_cast<const uint4*>(w.data)[static_cast<size_t>(start) + i];
    __syncwarp();
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(mine)), counts = at + w.slot;
    const Share share(lane);
    count_bits(at, counts, lane);
    uint32_t values = at + MAP;
    for (int tile = 0; tile < 16; ++tile) {
        const int word = tile / 4 * 64 + lane / 8 * 16 + tile % 4 * 4;
        uint32_t pairs[2];
        read_quad(pairs[0], pairs[1], load(at + word), load(counts + 4 * tile), values, share);
        const int row = panel / w.panels * ROWS + tile % 2 * 8 + lane / 4;
        const int column = panel % w.panels * COLUMNS + tile / 4 * 32 + lane % 4 * 8 + tile / 2 % 2 * 4;
        for (int j = 0; j < 4; ++j)
            if (row < w.rows && column + j < w.columns)
                dense[static_cast<size_t>(row) * w.columns + column + j] = static_cast<uint16_t>(pairs[j / 2] >> (j % 2 * 16));
    }
}

template <typename T>
cudaError_t launch(const Layout& w, const void* x, const void* bias, void* y, int batch, int share, bool overlap, cudaStream_t stream) {
    const int warps = (w.panels + share - 1) / share;
    return launch_strips(decode<T>, w, warps, warps * (SLOTS * w.slot + BARRIERS + SCRATCH), overlap, stream, static_cast<const T*>(x),
                         static_cast<const T*>(bias), static_cast<T*>(y), batch, share);
}

}  // namespace

// Both return a cudaError_t. half: fp16 numbers, otherwise bf16. overlap: the device can start a kernel before the previous one ends.
extern "C" int losa_matvec(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns,
                           int panels, int slot, int half, int batch, int share, int overlap, void* stream) {
    const Layout w{static_cast<const uint8_t*>(data), static_cast<const int*>(starts), rows, columns, panels, slot};
    const auto queue = static_cast<cudaStream_t>(stream);
    return half ? launch<__half>(w, x, bias, y, batch, share, overlap, queue)
                : launch<__nv_bfloat16>(w, x, bias, y, batch, share, overlap, queue);
}

extern "C" int losa_expand(const void* data, const void* starts, void* dense, int rows, int columns, int panels, int slot, void* stream) {
    const Layout w{static_cast<const uint8_t*>(data), static_cast<const int*>(starts), rows, columns, panels, slot};
    constexpr int WARPS = 4;
    const int all = (rows + ROWS - 1) / ROWS * panels;
    expand<<<(all + WARPS - 1) / WARPS, WARPS * LANES, WARPS * (slot + SCRATCH), static_cast<cudaStream_t>(stream)>>>(w, static_cast<uint16_t*>(dense));
    return cudaGetLastError();
}
