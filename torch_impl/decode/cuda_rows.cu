// y = W x as in cuda.cu, for up to 32 rows of x: the weight is read once for all of them.
//
// A warp multiplies the same columns of STRIPS strips, so it reads x once for all of them. A block has `groups` times STRIPS strips, and
// `across` warps for each group, which share the columns. Warps of several groups read the same x at about the same time.

#include "cuda_tiles.h"

namespace {

constexpr int STRIDE = 20;                  // of a row of x in a warp's sums, in floats: lanes write to different banks
constexpr int SUMS = BATCH * STRIDE * 4;    // bytes of the sums of 16 x 8
// Threads of a block, so that the compiler uses few registers and several blocks fit on a processor.
template <int STRIPS, int TILES>
constexpr int MOST = STRIPS * TILES >= 4 ? 768 : 1024;
constexpr int COUNTS = ROWS * COLUMNS / 32; // bytes of a panel's counts of bits

// Bytes of shared memory for a warp: its panels and counts, later its sums in the same place, then barriers.
template <int STRIPS, int TILES>
__host__ __device__ __forceinline__ int bytes_of_warp(int slot) {
    return max(STRIPS * (SLOTS * slot + COUNTS), STRIPS * TILES * SUMS) + BARRIERS;
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

// A lane's numbers of 32 columns of x, eight of a row: of rows lane / 4, 8 further on and so on. down: eight rows of x. used: tile t has
// a row for this lane if it is above 8 t; lanes beyond the batch keep their zeros. left: columns to the end of the row.
template <typename T, int TILES>
__device__ __forceinline__ void read_rows(uint4 (&now)[TILES], const T* numbers, size_t down, int used, int left, int lane) {
    if (left >= 32) {
#pragma unroll
        for (int t = 0; t < TILES; ++t)
            if (used > t * BATCH) now[t] = *reinterpret_cast<const uint4*>(numbers + t * down);
    } else {
        for (int t = 0; t < TILES; ++t) now[t] = used > t * BATCH && lane % 4 * 8 < left ? *reinterpret_cast<const uint4*>(numbers + t * down) : uint4{};
    }
}

// TILES: of eight rows of x. across: warps of a group.
template <typename T, int STRIPS, int TILES>
__global__ void __launch_bounds__(MOST<STRIPS, TILES>, 1) decode_rows(Layout w, const T* x, const T* bias, T* y, int batch, int share_of_warp, int across) {
    static_assert(STRIPS <= 2, "a third strip may end the weight");
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    const int warp = __shfl_sync(ALL, threadIdx.x / LANES, 0), groups = blockDim.x / LANES / across, group = warp / across;
    const int first = (warp - group * across) * share_of_warp, count = min(share_of_warp, w.panels - first);
    // Beyond the last strip the last one is multiplied again, and its sums are dropped.
    const int strip = min((static_cast<int>(blockIdx.x) * groups + group) * STRIPS, strips(w) - 1);
    const uint32_t each = bytes_of_warp<STRIPS, TILES>(w.slot), mine = static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + warp * each;
    const uint32_t counts = mine + STRIPS * SLOTS * w.slot;
    Feed<STRIPS> feed(w, mine, mine + each - BARRIERS, lane, strip * w.panels + first, count, strip + STRIPS <= strips(w) ? w.panels : 0);
    const Share share(lane);
#if __CUDA_ARCH__ >= 900
    // As in cuda.cu: weights load before the previous kernel, which computes x, ends.
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    const T* numbers = x + static_cast<size_t>(lane / 4) * w.columns + first * COLUMNS + lane % 4 * 8;
    const size_t down = static_cast<size_t>(BATCH) * w.columns;
    const int used = batch - lane / 4;
    int left = w.columns - first * COLUMNS;
    const uint32_t words = lane / 8 * 16;

    float sums[STRIPS][TILES][4] = {};
    uint4 now[TILES] = {};
    for (int panel = 0; panel < count; ++panel) {
        // The first numbers of x are on their way while the warp waits for the weight and counts its bits.
        read_rows(now, numbers, down, used, left, lane);
        feed.wait();
        uint32_t values[STRIPS];
#pragma unroll
        for (int s = 0; s < STRIPS; ++s) {
            count_bits(feed.at + s * w.slot, counts + s * COUNTS, lane);
            values[s] = feed.at + s * w.slot + MAP;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i > 0) read_rows(now, numbers + i * 32, down, used, left - i * 32, lane);
#pragma unroll
            for (int s = 0; s < STRIPS; ++s)
                add_products<T>(sums[s], feed.at + s * w.slot + words + i * 64, counts + s * COUNTS + i * 16, values[s], share, now);
        }
        numbers += COLUMNS;
        left -= COLUMNS;
        __syncwarp();
        feed.turn(lane);
    }
    store_sums<STRIPS, TILES>(sums, mine, lane);
    __syncthreads();
    // y: the sums over the warps of a group, in a fixed order.
    const int height = groups * STRIPS * ROWS, top = static_cast<int>(blockIdx.x) * height;
    for (int i = threadIdx.x; i < height * batch; i += blockDim.x) {
        const int b = i / height, r = i - b * height;
        if (top + r >= w.rows) continue;
        float sum = bias ? widen(bias[top + r]) : 0;
        uint32_t from = place_of_sum<STRIPS, TILES>(mine - warp * each, each, across, r, b);
        for (int part = 0; part < across; ++part, from += each) sum += __uint_as_float(load(from));
        narrow(sum, y[static_cast<size_t>(b) * w.rows + top + r]);
    }
}

template <typename T, int STRIPS, int TILES>
cudaError_t launch(const Layout& w, const void* x, const void* bias, void* y, int batch, int share, int groups, bool overlap, cudaStream_t stream) {
    const int across = (w.panels + share - 1) / share, warps = across * groups, blocks = (strips(w) + groups * STRIPS - 1) / (groups * STRIPS);
    return launch_blocks(decode_rows<T, STRIPS, TILES>, w, blocks, warps, warps * bytes_of_warp<STRIPS, TILES>(w.slot), overlap, stream,
                         static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(y), batch, share, across);
}

template <typename T>
cudaError_t launch_for(const Layout& w, const void* x, const void* bias, void* y, int batch, int strips, int share, int groups, bool overlap,
                       cudaStream_t stream) {
    const auto call = batch <= 8 ? (strips == 2 ? launch<T, 2, 1> : launch<T, 1, 1>)
                    : batch <= 16 ? (strips == 2 ? launch<T, 2, 2> : launch<T, 1, 2>) : (strips == 2 ? launch<T, 2, 4> : launch<T, 1, 4>);
    return call(w, x, bias, y, batch, share, groups, overlap, stream);
}

}  // namespace

// As losa_matvec of cuda.cu, for up to 32 rows of x; `columns` is a multiple of 8 and x at a multiple of 16 bytes. A warp multiplies `share`
// panels of `strips` strips, one or two; a block has `groups` times `strips` strips.
extern "C" int losa_matvec_rows(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns,
                                int panels, int slot, int half, int batch, int strips, int share, int groups, int overlap, void* stream) {
    const Layout w{static_cast<const uint8_t*>(data), static_cast<const int*>(starts), rows, columns, panels, slot};
    const auto queue = static_cast<cudaStream_t>(stream);
    return half ? launch_for<__half>(w, x, bias, y, batch, strips, share, groups, overlap, queue)
                : launch_for<__nv_bfloat16>(w, x, bias, y, batch, strips, share, groups, overlap, queue);
}
