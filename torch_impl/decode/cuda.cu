// y = W x for a sparse W in panels of 16 x 128 (the layout of cuda.py) and one to eight rows of x, on the tensor cores, by the kernel of
// cuda_decode.h; and W unpacked.

#include "cuda_decode.h"
#include "cuda_tiles.h"

namespace {

// Panels of values, as `decode` multiplies with them.
struct Values {
    static constexpr int HEAD = 0;   // bytes of shared memory before those of the warps
    Share share;

    __device__ __forceinline__ Values(uint32_t, int lane) : share(lane) {}

    // Add the products of a warp's panels with x. first: number of the first panel in its strip.
    template <typename T>
    __device__ __forceinline__ void multiply(float (&sums)[4], Feed<>& feed, const Layout& w, const T* x, int first, int count, int batch,
                                             uint32_t scratch, int lane) const {
        const T* numbers = x + static_cast<size_t>(lane / 4) * w.columns + first * COLUMNS + lane % 4 * 8;
        // How many numbers of x can be read eight at a time.
        int whole = w.columns % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0 ? w.columns - first * COLUMNS : 0;
        const uint32_t words = lane / 8 * 16;

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
                ::multiply<T>(sums, one, now[i].x, now[i].y);
                ::multiply<T>(sums, two, now[i].z, now[i].w);
            }
            __syncwarp();
            feed.turn(lane);
        }
    }
};

// Write the dense weight (rows, columns), `share` panels per warp.
__global__ void expand(Layout w, uint16_t* dense, int share_of_warp) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int first = (blockIdx.x * (blockDim.x / LANES) + warp) * share_of_warp, count = min(share_of_warp, strips(w) * w.panels - first);
    if (count <= 0) return;
    const uint32_t each = SLOTS * w.slot + BARRIERS + SCRATCH, mine = static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + warp * each;
    const uint32_t counts = mine + each - SCRATCH;
    Feed<> feed(w, mine, mine + SLOTS * w.slot, lane, first, count);
    const Share share(lane);
    for (int panel = first; panel < first + count; ++panel) {
        feed.wait();
        count_bits(feed.at, counts, lane);
        uint32_t values = feed.at + MAP;
        const int row = panel / w.panels * ROWS + lane / 4, column = panel % w.panels * COLUMNS + lane % 4 * 8;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint4 word = load_four(feed.at + lane / 8 * 16 + i * 64), count = load_four(counts + i * 16);
            uint32_t upper[4], lower[4];
            read_quad(upper[0], upper[1], word.x, count.x, values, share);
            read_quad(lower[0], lower[1], word.y, count.y, values, share);
            read_quad(upper[2], upper[3], word.z, count.z, values, share);
            read_quad(lower[2], lower[3], word.w, count.w, values, share);
            write_eight(w, dense, row, column + i * 32, upper);
            write_eight(w, dense, row + 8, column + i * 32, lower);
        }
        __syncwarp();
        feed.turn(lane);
    }
}

}  // namespace

// Both return a cudaError_t. half: fp16 numbers, otherwise bf16. share: panels of a warp; groups: strips of a block. overlap: the device can start a kernel before the previous one ends.
extern "C" int losa_matvec(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns,
                           int panels, int slot, int half, int batch, int share, int groups, int overlap, void* stream) {
    const Layout w{static_cast<const uint8_t*>(data), static_cast<const int*>(starts), rows, columns, panels, slot};
    const auto queue = static_cast<cudaStream_t>(stream);
    return half ? launch<__half, Values, PLAIN>(w, x, bias, y, batch, share, groups, overlap, {}, queue)
                : launch<__nv_bfloat16, Values, PLAIN>(w, x, bias, y, batch, share, groups, overlap, {}, queue);
}

// A product in bf16 with another ending, as in cuda_decode.h. overlap: 2, the next kernel can start before the previous one ends, too.
extern "C" int losa_ending(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns, int panels,
                           int slot, int batch, int share, int overlap, int ending, void* squares, int parts, float eps, void* total,
                           const void* gain, void* stream) {
    const Layout w{static_cast<const uint8_t*>(data), static_cast<const int*>(starts), rows, columns, panels, slot};
    const Around around{static_cast<float*>(squares), parts, eps, static_cast<uint16_t*>(total), static_cast<const uint16_t*>(gain), 0, overlap == 2};
    return launch_ending<Values>(ending, w, x, bias, y, batch, share, overlap, around, static_cast<cudaStream_t>(stream));
}

extern "C" int losa_expand(const void* data, const void* starts, void* dense, int rows, int columns, int panels, int slot, void* stream) {
    const Layout w{static_cast<const uint8_t*>(data), static_cast<const int*>(starts), rows, columns, panels, slot};
    constexpr int WARPS = 4, SHARE = 4;
    const int blocks = (strips(w) * panels + WARPS * SHARE - 1) / (WARPS * SHARE);
    return launch_blocks(expand, w, blocks, WARPS, WARPS * (SLOTS * slot + BARRIERS + SCRATCH), false, static_cast<cudaStream_t>(stream),
                         static_cast<uint16_t*>(dense), SHARE);
}
