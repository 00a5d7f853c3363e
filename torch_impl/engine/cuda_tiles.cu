// Y = X Wᵀ for a sparse W (the layout of cuda_decode.py) and up to 8 rows of X, by the matrix units.
//
// A lane still follows one stream, a row's part of some columns, but puts its values where they belong: into the warp's ring
// in shared memory, 32 rows by RING columns, zero elsewhere. Columns that all lanes are past are multiplied, WINDOW at a time,
// and zeroed again. What a value costs does not grow with the batch.
//
// In the ring two neighbouring columns of a row share a word, word (pair p, row l) at 128 p + (4 l ^ 32 (p / 8 % 4)), so that
// neither the 32 rows of a pair nor what a warp reads for one product meet in a bank. Inside a window the matrix units' columns
// are permuted, the same way for X: thread t of a group of four reads 16 columns side by side, from 16 t on.

#include "cuda_layout.cuh"

namespace {

constexpr int RING = 256;               // columns; a value further ahead of the slowest lane is multiplied one by one
constexpr int WINDOW = 64;
constexpr int RING_BYTES = RING * LANES * 2;
constexpr int MOST = 8;                 // rows of X
constexpr int SPILL_BYTES = MOST * LANES * 4;
constexpr int TILE_THREADS = 384;
template <int BITS>                     // of shared memory, a warp; rings begin at multiples of 128
constexpr int WARP_BYTES = (RING_BYTES + SPILL_BYTES + Feed<BITS>::BYTES + 127) / 128 * 128;
constexpr int AHEAD = 0x7fffffff;

__device__ __forceinline__ void store_half(uint32_t to, uint32_t value) {
    asm volatile("{.reg .u16 h; cvt.u16.u32 h, %1; st.shared.u16 [%0], h;}" ::"r"(to), "r"(value) : "memory");
}
__device__ __forceinline__ void clear_four(uint32_t at) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%1,%1,%1};" ::"r"(at), "r"(0) : "memory");
}

// sum (16 rows, 8) += left (16 rows, 16 columns) · right (16 columns, 8)
template <typename T>
__device__ __forceinline__ void multiply_tile(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply_tile<__nv_bfloat16>(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                                             uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_tile<__half>(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Eight numbers of X from any place in memory, zeros from `columns` on.
__device__ __noinline__ uint4 load_octet(const uint16_t* from, int columns) {
    uint32_t words[4] = {};
#pragma unroll
    for (int j = 0; j < 8; ++j)
        if (j < columns) words[j / 2] |= static_cast<uint32_t>(from[j]) << (j % 2 * 16);
    return uint4{words[0], words[1], words[2], words[3]};
}

// The columns of X that a lane multiplies in one window: row lane / 4, 16 columns from 16 (lane % 4) on; zeros outside.
template <typename T>
__device__ __forceinline__ void load_inputs(uint4 (&to)[2], const T* x, int columns, int batch, int column, int lane, bool whole) {
    const int row = lane / 4, first = column + 16 * (lane % 4);
    const T* from = x + static_cast<size_t>(row) * columns + first;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int left = row < batch ? columns - first - 8 * half : 0;
        to[half] = uint4{0, 0, 0, 0};
        if (!whole) to[half] = load_octet(reinterpret_cast<const uint16_t*>(from + 8 * half), left);
        else if (left > 0) to[half] = *reinterpret_cast<const uint4*>(from + 8 * half);
    }
}

// A chunk too far ahead of the slowest lane: one value after the other, into sums of its lane.
template <typename T, int BITS>
__device__ __noinline__ void spill_chunk(float* sums, uint4 values, uint32_t codes, int column, const T* x, int columns, int batch) {
    const uint64_t halves[2] = {values.x | static_cast<uint64_t>(values.y) << 32, values.z | static_cast<uint64_t>(values.w) << 32};
#pragma unroll 1
    for (int i = 0; i < CHUNK; ++i) {
        const uint16_t bits = static_cast<uint16_t>((i < 4 ? halves[0] : halves[1]) >> (i % 4 * 16));
        column += codes >> (i * BITS) & ((1 << BITS) - 1);
        if (bits & 0x7fff) {
            const float value = widen_one(*reinterpret_cast<const T*>(&bits));
#pragma unroll 1
            for (int b = 0; b < batch; ++b) sums[b * LANES] += value * widen_one(x[static_cast<size_t>(b) * columns + column]);
        }
        ++column;
    }
}

template <typename T, int BITS>
__global__ void __launch_bounds__(TILE_THREADS, 1) tiles(Layout w, const T* x, const T* bias, T* y, int batch) {
    constexpr int BYTES = WARP_BYTES<BITS>;
    extern __shared__ __align__(128) unsigned char memory[];
    const int lane = threadIdx.x % LANES, warp = __shfl_sync(ALL, threadIdx.x / LANES, 0), warps = blockDim.x / LANES;
    const uint32_t ring = address_of(memory) + warp * BYTES;
    float* spill = reinterpret_cast<float*>(memory + warp * BYTES + RING_BYTES) + lane;

    // A warp takes neighbouring segments, whose chunks follow each other in memory.
    const int share = (w.segments + warps - 1) / warps, first = min(warp * share, w.segments), behind = min(first + share, w.segments);
    const int task = blockIdx.x * w.segments;
    Feed<BITS> feed(w, ring + RING_BYTES + SPILL_BYTES, lane, w.bases[task + first], w.bases[task + behind]);
    int coming = first < behind ? w.counts[(task + first) * LANES + lane] : 0;
    for (int i = lane * 16; i < RING_BYTES; i += LANES * 16) clear_four(ring + i);
    __syncwarp();
    wait_for_input();

    const bool whole = w.columns % 8 == 0 && w.segment % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
    uint4 inputs[2];
    int inputs_of = first * w.segment;  // the column of X that `inputs` begin at
    load_inputs(inputs, x, w.columns, batch, inputs_of, lane, whole);
    float sum[2][4] = {};
    bool spilled = false;
    uint32_t below;
    asm volatile("mov.u32 %0, %%lanemask_lt;" : "=r"(below));
    const uint32_t group = lane / 4, thread = lane % 4;
    const uint32_t write_to = ring + lane * 4, read_from = ring + thread * 1024 + ((group * 16) ^ (thread * 32));

    for (int segment = first; segment < behind; ++segment) {
        const int mine = coming, most = __reduce_max_sync(ALL, mine), least = __reduce_min_sync(ALL, mine);
        if (segment + 1 < behind) coming = w.counts[(task + segment + 1) * LANES + lane];
        const int here = segment * w.segment, width = min(w.segment, w.columns - here);
        uint32_t from = 0;              // 64 × the column in the segment behind the lane's last value
        int done = 0;                   // columns of the segment that are multiplied
        auto scatter = [&](const uint4& four, uint32_t codes) {
            const uint32_t words[4] = {four.x, four.y, four.z, four.w}, before = from;
            uint32_t at[CHUNK];
            places<BITS, 6>(at, codes, from);
            from = at[CHUNK - 1] + 64;
            if (at[CHUNK - 1] < static_cast<uint32_t>(done + RING) * 64) {
#pragma unroll
                for (int i = 0; i < CHUNK; ++i) {
                    const uint32_t to = (write_to + (at[i] & (RING_BYTES - 128))) ^ (at[i] >> 5 & 0x62);
                    store_half(to, i % 2 ? words[i / 2] >> 16 : words[i / 2]);
                }
            } else {
                if (!spilled)
                    for (int b = 0; b < MOST; ++b) spill[b * LANES] = 0;
                spilled = true;
                spill_chunk<T, BITS>(spill, four, codes, here + (before >> 6), x, w.columns, batch);
            }
        };
        // Two chunks at a time while all lanes have them, then one for those that do.
        for (int step = 0; step < most;) {
            uint32_t codes, more_codes;
            if (step + 2 <= least) {
                const unsigned place = feed.advance(2 * LANES) + lane;
                const uint4 values = feed.read(place, codes), more = feed.read(place + LANES, more_codes);
                scatter(values, codes);
                scatter(more, more_codes);
                step += 2;
            } else {
                const uint32_t who = __ballot_sync(ALL, step < mine);
                const unsigned place = feed.advance(__popc(who)) + __popc(who & below);
                if (step < mine) {
                    const uint4 values = feed.read(place, codes);
                    scatter(values, codes);
                }
                ++step;
            }
            const int past = __reduce_min_sync(ALL, step >= mine ? AHEAD : static_cast<int>(from >> 6));
            while (done < width && past >= done + WINDOW) {
                if (inputs_of != here + done) load_inputs(inputs, x, w.columns, batch, here + done, lane, whole);
                const uint4 right[2] = {inputs[0], inputs[1]};
                inputs_of = here + (done + WINDOW < width ? done + WINDOW : w.segment);
                load_inputs(inputs, x, w.columns, batch, inputs_of, lane, whole);
                const uint32_t at = read_from + (done * 64 & (RING_BYTES - 1));
                __syncwarp();
#pragma unroll
                for (int s = 0; s < 4; ++s) {
                    const uint4 a = read_four(at + s * 256), b = read_four(at + s * 256 + 128);
                    clear_four(at + s * 256);
                    clear_four(at + s * 256 + 128);
                    const uint32_t b0 = (&right[s / 2].x)[s % 2 * 2], b1 = (&right[s / 2].x)[s % 2 * 2 + 1];
                    multiply_tile<T>(sum[0], a.x, a.y, b.x, b.y, b0, b1);
                    multiply_tile<T>(sum[1], a.z, a.w, b.z, b.w, b0, b1);
                }
                __syncwarp();
                done += WINDOW;
            }
        }
    }

    // The sum of a row over its warps, always in the same order.
    __syncwarp();
    float* sums = reinterpret_cast<float*>(memory + warp * BYTES);
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[(2 * thread + i % 2) * LANES + 4 * group + i / 4 * 2 + i % 4 / 2] = sum[i / 4][i % 4];
    __syncwarp();
    if (spilled)
        for (int b = 0; b < batch; ++b) sums[b * LANES + lane] += spill[b * LANES];
    __syncthreads();
    for (int i = threadIdx.x; i < batch * LANES; i += blockDim.x) {
        const int row = blockIdx.x * LANES + i % LANES;
        if (row >= w.rows) continue;
        float total = 0;
        for (int s = 0; s < warps; ++s) total += reinterpret_cast<const float*>(memory + s * BYTES)[i];
        y[static_cast<size_t>(i / LANES) * w.rows + row] = narrow<T>(bias ? total + widen_one(bias[row]) : total);
    }
}

template <typename T, int BITS>
cudaError_t launch_tiles(const Layout& w, const void* x, const void* bias, void* y, int batch, int warps, bool overlap, cudaStream_t stream) {
    const int shared = warps * WARP_BYTES<BITS>;
    return launch_early(tiles<T, BITS>, (w.rows + LANES - 1) / LANES, warps, shared, overlap, stream, w, static_cast<const T*>(x),
                        static_cast<const T*>(bias), static_cast<T*>(y), batch);
}

template <typename T>
cudaError_t coded_tiles(const Layout& w, const void* x, const void* bias, void* y, int bits, int batch, int warps, bool overlap, cudaStream_t stream) {
    if (bits == 2) return launch_tiles<T, 2>(w, x, bias, y, batch, warps, overlap, stream);
    if (bits == 3) return launch_tiles<T, 3>(w, x, bias, y, batch, warps, overlap, stream);
    return launch_tiles<T, 4>(w, x, bias, y, batch, warps, overlap, stream);
}

}  // namespace

// Returns a cudaError_t. half: fp16 numbers, else bf16. overlap: the device lets a kernel begin before the last one ends.
extern "C" int losa_tiles(const void* data, const void* counts, const void* bases,
                          const void* x, const void* bias, void* y, int rows, int columns, int segment, int segments, int bits,
                          int half, int batch, int warps, int overlap, void* stream) {
    const Layout w{static_cast<const uint8_t*>(data), static_cast<const uint8_t*>(counts), static_cast<const int*>(bases), rows, columns, segment, segments};
    const auto queue = static_cast<cudaStream_t>(stream);
    return half ? coded_tiles<__half>(w, x, bias, y, bits, batch, warps, overlap, queue)
                : coded_tiles<__nv_bfloat16>(w, x, bias, y, bits, batch, warps, overlap, queue);
}
