// y = W x as in cuda_rows.cu on Hopper, with x in shared memory, where the copy engine puts it once for all warps that read it.
//
// A block has `groups` times STRIPS strips and `across` parts of the columns; a warp multiplies one part of STRIPS strips. The warps of a part
// read the same tile of x, 128 columns of up to 32 rows, while the next one is copied. The blocks of a cluster have the same strips and other
// columns, and add up their sums in the end: so x is read once for many strips though a weight has too few for one block of each processor.

#include "cuda_strips.h"

namespace {

constexpr int PITCH = 2 * COLUMNS + 32;   // bytes of a row of x in a tile
constexpr int CONTROL = 32;               // bytes of the barriers and counters of a part's tiles, of which there are SLOTS

// As MOST. Two strips by four tiles need 96 registers: with 80 a panel takes a fifth more instructions.
template <int STRIPS, int TILES>
constexpr int MOST_HERE = STRIPS * TILES >= 8 ? 640 : MOST<STRIPS, TILES>;
template <int TILES>
constexpr int TILE = TILES * BATCH * PITCH;
template <int TILES>
constexpr int PART = SLOTS * TILE<TILES> + CONTROL;

// Two rows that are read together lie in different banks.
__device__ __forceinline__ uint32_t place_of_row(uint32_t row) { return row * PITCH + row % 2 * 32; }

// The tiles of x of one part of the columns, which alternate between two places in shared memory.
template <typename T, int TILES>
struct Tiles {
    const T* x;                 // the lane's row, at the tile to copy next
    int columns, ahead;         // from there to the end of the row; tiles to copy
    int batch, lane, readers;   // readers: warps of the part
    uint32_t at, both;          // place of the tile to read; sum of the two places
    uint32_t barrier, counter;  // its barrier, and how many warps have read it
    uint32_t round;

    __device__ __forceinline__ Tiles(const T* x, int columns, int count, int batch, int lane, int readers, uint32_t at)
        : x(x), columns(columns), ahead(count), batch(batch), lane(lane), readers(readers), at(at), both(2 * at + TILE<TILES>),
          barrier(at + SLOTS * TILE<TILES>), counter(barrier + 8 * SLOTS), round(0) {}

    // One warp of the part, before the block's barrier.
    __device__ __forceinline__ void begin() const {
        if (lane > 0) return;
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier + 8 * i) : "memory");
            store(counter + 4 * i, 0);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }

    // Copy a row's 128 columns by each lane. After the end of the row come zeros: what lies there need not be finite.
    __device__ __forceinline__ void copy(uint32_t to, uint32_t full) const {
        const int bytes = 2 * min(columns, COLUMNS);
        to += place_of_row(lane);
        if (lane < batch)
            for (int i = bytes; i < 2 * COLUMNS; i += 4) store(to + i, 0);
        __syncwarp();
        if (lane == 0) asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%1], %0;" ::"r"(bytes * batch), "r"(full) : "memory");
        if (lane < batch)
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                         ::"r"(to), "l"(x), "r"(bytes), "r"(full) : "memory");
        __syncwarp();
    }

    __device__ __forceinline__ void next() { x += COLUMNS, columns -= COLUMNS, --ahead; }

    // The first tiles, by one warp of the part; the others call it too.
    __device__ __forceinline__ void fill(bool mine) {
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            if (mine && ahead > 0) copy(at + i * TILE<TILES>, barrier + 8 * i);
            next();
        }
    }

    __device__ __forceinline__ void wait() const {
        asm volatile("{.reg .pred p;\n"
                     "again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
                     "@!p bra again;}" ::"r"(barrier), "r"(round) : "memory");
    }

    // All lanes have read the tile. The last warp that has copies another one to its place.
    __device__ __forceinline__ void turn() {
        if (ahead > 0) {
            uint32_t before = 0;
            if (lane == 0)
                asm volatile("atom.acq_rel.cta.shared::cta.inc.u32 %0, [%1], %2;" : "=r"(before) : "r"(counter), "r"(readers - 1) : "memory");
            if (static_cast<int>(__shfl_sync(ALL, before, 0)) == readers - 1) copy(at, barrier);
        }
        next();
        at = both - at;
        barrier ^= 8;
        counter ^= 4;
        round ^= ~barrier >> 3 & 1;
    }
};

// Number of this block in its cluster, and the cluster's blocks.
__device__ __forceinline__ int rank_in_cluster() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ int size_of_cluster() {
    uint32_t size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
// Load from the shared memory of another block of the cluster.
__device__ __forceinline__ float load_from(uint32_t at, int rank) {
    uint32_t value;
    asm volatile("{.reg .u32 a; mapa.shared::cluster.u32 a, %1, %2; ld.shared::cluster.u32 %0, [a];}" : "=r"(value) : "r"(at), "r"(rank) : "memory");
    return __uint_as_float(value);
}

template <typename T, int STRIPS, int TILES>
__global__ void __launch_bounds__(MOST_HERE<STRIPS, TILES>, 1) decode_staged(Layout w, const T* x, const T* bias, T* y, int batch, int share_of_warp, int across) {
#if __CUDA_ARCH__ >= 900
    static_assert(STRIPS <= 2, "a third strip may end the weight");
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    const int warp = __shfl_sync(ALL, threadIdx.x / LANES, 0), warps = blockDim.x / LANES, groups = warps / across, group = warp / across;
    const int part = warp - group * across, rank = rank_in_cluster(), size = size_of_cluster(), cluster = blockIdx.x / size;
    // The last parts may have no columns.
    const int first = min((rank * across + part) * share_of_warp, w.panels), count = min(share_of_warp, w.panels - first);
    // Beyond the last strip the last one is multiplied again, and its sums are dropped.
    const int strip = min((cluster * groups + group) * STRIPS, strips(w) - 1);
    const uint32_t each = bytes_of_warp<STRIPS, TILES>(w.slot), base = static_cast<uint32_t>(__cvta_generic_to_shared(memory)), mine = base + warp * each;
    const uint32_t counts = mine + STRIPS * SLOTS * w.slot + BARRIERS;
    Feed<STRIPS> feed(w, mine, lane, strip * w.panels + first, count, strip + STRIPS <= strips(w) ? w.panels : 0);
    Tiles<T, TILES> tiles(x + static_cast<size_t>(lane) * w.columns + first * COLUMNS, w.columns - first * COLUMNS, count, batch, lane, groups,
                          base + warps * each + part * PART<TILES>);
    if (group == 0) tiles.begin();
    const Share share(lane);
    __syncthreads();
    // As in cuda.cu: weights load before the previous kernel, which computes x, ends.
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
    tiles.fill(group == 0);
    const uint32_t words = lane / 8 * 16, own = place_of_row(lane / 4) + lane % 4 * 16;

    float sums[STRIPS][TILES][4] = {};
    for (int panel = 0; panel < count; ++panel) {
        feed.wait();
        uint32_t values[STRIPS];
#pragma unroll
        for (int s = 0; s < STRIPS; ++s) {
            count_bits(feed.at + s * w.slot, counts + s * COUNTS, lane);
            values[s] = feed.at + s * w.slot + MAP;
        }
        tiles.wait();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint4 now[TILES];
#pragma unroll
            for (int t = 0; t < TILES; ++t) now[t] = load_four(tiles.at + own + t * (BATCH * PITCH) + i * 64);
#pragma unroll
            for (int s = 0; s < STRIPS; ++s)
                add_products<T>(sums[s], feed.at + s * w.slot + words + i * 64, counts + s * COUNTS + i * 16, values[s], share, now);
        }
        __syncwarp();
        tiles.turn();
        feed.turn(lane);
    }
    store_sums<STRIPS, TILES>(sums, mine, lane);
    wait_for_cluster();
    // y: the sums over all parts of the cluster, in the order of the columns.
    const int height = groups * STRIPS * ROWS, top = cluster * height, threads = blockDim.x;
    for (int i = rank * threads + threadIdx.x; i < height * batch; i += size * threads) {
        const int b = i / height, r = i - b * height;
        if (top + r >= w.rows) continue;
        float sum = bias ? widen(bias[top + r]) : 0;
        const uint32_t place = place_of_sum<STRIPS, TILES>(base, each, across, r, b);
        for (int block = 0; block < size; ++block)
            for (int other = 0; other < across; ++other) sum += load_from(place + other * each, block);
        narrow(sum, y[static_cast<size_t>(b) * w.rows + top + r]);
    }
    // Others may still read this block's sums.
    wait_for_cluster();
#endif
}

template <typename T, int STRIPS, int TILES>
cudaError_t launch(const Layout& w, const void* x, const void* bias, void* y, int batch, int share, int groups, int cluster, bool overlap,
                   cudaStream_t stream) {
    const int across = ((w.panels + share - 1) / share + cluster - 1) / cluster, warps = across * groups;
    const int clusters = (strips(w) + groups * STRIPS - 1) / (groups * STRIPS);
    return launch_clusters(decode_staged<T, STRIPS, TILES>, cluster, clusters * cluster, warps,
                           warps * bytes_of_warp<STRIPS, TILES>(w.slot) + across * PART<TILES>, overlap, stream, w, static_cast<const T*>(x),
                           static_cast<const T*>(bias), static_cast<T*>(y), batch, share, across);
}

template <typename T>
cudaError_t launch_for(const Layout& w, const void* x, const void* bias, void* y, int batch, int strips, int share, int groups, int cluster,
                       bool overlap, cudaStream_t stream) {
    const auto call = batch <= 8 ? (strips == 2 ? launch<T, 2, 1> : launch<T, 1, 1>)
                    : batch <= 16 ? (strips == 2 ? launch<T, 2, 2> : launch<T, 1, 2>) : (strips == 2 ? launch<T, 2, 4> : launch<T, 1, 4>);
    return call(w, x, bias, y, batch, share, groups, cluster, overlap, stream);
}

}  // namespace

// As losa_matvec_rows, for compute capability 9.0 or later. cluster: blocks that divide the columns among them, up to 8.
extern "C" int losa_matvec_staged(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns,
                                  int panels, int slot, int half, int batch, int strips, int share, int groups, int cluster, int overlap, void* stream) {
    const Layout w{static_cast<const uint8_t*>(data), static_cast<const int*>(starts), rows, columns, panels, slot};
    const auto queue = static_cast<cudaStream_t>(stream);
    return half ? launch_for<__half>(w, x, bias, y, batch, strips, share, groups, cluster, overlap, queue)
                : launch_for<__nv_bfloat16>(w, x, bias, y, batch, strips, share, groups, cluster, overlap, queue);
}
