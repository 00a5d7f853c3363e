// y = W x for a sparse W whose kept values are coded by their gaps (the layout of cuda_decode.py), batch 1 to 8.
//
// A lane follows one stream, a row's part of some columns. Per value: three integer instructions that turn the gap into an
// address, one read of x from shared memory, conversions and multiply-adds in float32. Weights are on their way before the
// kernel waits for the one that makes x: they do not change. Sums are always taken in the same order.

#include "cuda_layout.cuh"

namespace {

template <typename T>
__device__ __forceinline__ float2 widen(uint32_t pair);
template <>
__device__ __forceinline__ float2 widen<__nv_bfloat16>(uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 widen<__half>(uint32_t pair) {
    return __half22float2(*reinterpret_cast<__half2*>(&pair));
}

// acc[b] += Σ value · x[b] over a chunk; the batch's numbers of one column lie side by side in shared memory.
template <typename T, int BATCH>
__device__ __forceinline__ void multiply(float (&acc)[BATCH], const uint4& values, const uint32_t (&at)[CHUNK]) {
    constexpr int PAIRS = (BATCH + 1) / 2;
    constexpr int TOGETHER = BATCH <= 2 ? CHUNK : BATCH == 4 ? 4 : 2;  // columns whose x are read before any is used
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int first = 0; first < CHUNK; first += TOGETHER) {
        uint32_t x[TOGETHER][PAIRS];
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            const uint32_t from = at[first + i];
            if constexpr (BATCH == 1) asm("{.reg .u16 h; ld.shared.u16 h, [%1]; cvt.u32.u16 %0, h;}" : "=r"(x[i][0]) : "r"(from));
            if constexpr (BATCH == 2) asm("ld.shared.u32 %0, [%1];" : "=r"(x[i][0]) : "r"(from));
            if constexpr (BATCH == 4) asm("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(x[i][0]), "=r"(x[i][1]) : "r"(from));
            if constexpr (BATCH == 8)
                asm("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x[i][0]), "=r"(x[i][1]), "=r"(x[i][2]), "=r"(x[i][3]) : "r"(from));
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            const float2 pair = widen<T>(words[(first + i) / 2]);
            const float value = (first + i) % 2 ? pair.y : pair.x;
#pragma unroll
            for (int b = 0; b < BATCH; b += 2) {
                const float2 two = widen<T>(x[i][b / 2]);
                acc[b] = fmaf(value, two.x, acc[b]);
                if constexpr (BATCH > 1) acc[b + 1] = fmaf(value, two.y, acc[b + 1]);
            }
        }
    }
}

// Eight columns of BATCH rows, transposed: the rows' numbers of one column side by side.
template <int BATCH>
__device__ __forceinline__ void store_octet(unsigned char* to, const uint4 (&rows)[BATCH]) {
    if constexpr (BATCH == 1) {
        *reinterpret_cast<uint4*>(to) = rows[0];
    } else {
        uint32_t* words = reinterpret_cast<uint32_t*>(to);
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int b = 0; b < BATCH; b += 2)
                words[(j * BATCH + b) / 2] = __byte_perm((&rows[b].x)[j / 2], (&rows[b + 1].x)[j / 2], j % 2 ? 0x7632 : 0x5410);
    }
}

// Many rows of x take long over a chunk and much shared memory, so that fewer chunks come ahead.
template <int BITS, int BATCH>
using FeedOf = Feed<BITS, BATCH <= 2 ? 4 : 2>;

template <typename T, int BITS, int BATCH>
__global__ void __launch_bounds__(1024) decode(Layout w, const T* x, const T* bias, T* y, int batch) {
    constexpr int BYTES = 2 * BATCH, SHIFT = BATCH == 8 ? 4 : BATCH == 4 ? 3 : BATCH;   // what a column takes of shared memory
    extern __shared__ __align__(16) unsigned char memory[];

    const int lane = threadIdx.x % LANES, warp = __shfl_sync(ALL, threadIdx.x / LANES, 0);
    const int task = blockIdx.x * w.segments + warp;
    FeedOf<BITS, BATCH> feed(w, address_of(memory) + warp * FeedOf<BITS, BATCH>::BYTES, lane, w.bases[task], w.bases[task + 1]);
    const int mine = w.counts[task * LANES + lane];
    const int most = __reduce_max_sync(ALL, mine), least = __reduce_min_sync(ALL, mine);
    unsigned char* numbers = memory + w.segments * FeedOf<BITS, BATCH>::BYTES;
    wait_for_input();

    // x into shared memory, the batch's numbers of a column side by side; behind the end zeros, which unused entries read.
    const bool whole = w.columns % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
    const int octets = (w.segments * w.segment + 2 * CHUNK) / 8;
    for (int i = threadIdx.x; i < octets; i += blockDim.x) {
        const int column = i * 8;
        uint4 rows[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            rows[b] = uint4{0, 0, 0, 0};
            if (b >= batch) continue;
            const T* from = x + static_cast<size_t>(b) * w.columns + column;
            if (whole) {
                if (column < w.columns) rows[b] = *reinterpret_cast<const uint4*>(from);
            } else {
                const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
                uint32_t words[4] = {};
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    if (column + j < w.columns) words[j / 2] |= static_cast<uint32_t>(halves[j]) << (j % 2 * 16);
                rows[b] = uint4{words[0], words[1], words[2], words[3]};
            }
        }
        store_octet<BATCH>(numbers + column * BYTES, rows);
    }
    __syncthreads();

    float acc[BATCH] = {};
    uint32_t from = address_of(numbers) + warp * w.segment * BYTES;
    // Two chunks at a time, which do not wait for each other. What a lane does not have counts as zeros.
    float other[BATCH] = {};
    uint32_t below;
    asm volatile("mov.u32 %0, %%lanemask_lt;" : "=r"(below));
    for (int step = 0; step < most; step += 2) {
        int ahead = lane, then = LANES + lane, taken = 2 * LANES;
        if (step + 2 > least) {
            const uint32_t who = __ballot_sync(ALL, step < mine), again = __ballot_sync(ALL, step + 1 < mine);
            ahead = __popc(who & below), then = __popc(who) + __popc(again & below), taken = __popc(who) + __popc(again);
        }
        const unsigned place = feed.advance(taken);
        if (step < mine) {
            uint32_t codes, more_codes, at[CHUNK], further[CHUNK];
            const uint4 values = feed.read(place, ahead, codes);
            uint4 more = feed.read(place, then, more_codes);
            if (step + 1 >= mine) more = uint4{0, 0, 0, 0}, more_codes = 0;
            places<BITS, SHIFT>(at, codes, from);
            places<BITS, SHIFT>(further, more_codes, at[CHUNK - 1] + BYTES);
            from = further[CHUNK - 1] + BYTES;
            multiply<T, BATCH>(acc, values, at);
            multiply<T, BATCH>(other, more, further);
        }
    }
#pragma unroll
    for (int b = 0; b < BATCH; ++b) acc[b] += other[b];

    // The sum of a row over its warps, always in the same order; in the place of x, since barriers must stay what they are.
    __syncthreads();
    float* sums = reinterpret_cast<float*>(numbers);
#pragma unroll
    for (int b = 0; b < BATCH; ++b) sums[(warp * BATCH + b) * LANES + lane] = acc[b];
    __syncthreads();
    for (int i = threadIdx.x; i < BATCH * LANES; i += blockDim.x) {
        const int row = blockIdx.x * LANES + i % LANES, b = i / LANES;
        if (row >= w.rows || b >= batch) continue;
        float sum = 0;
        for (int s = 0; s < w.segments; ++s) sum += sums[s * BATCH * LANES + i];
        y[static_cast<size_t>(b) * w.rows + row] = narrow<T>(bias ? sum + widen_one(bias[row]) : sum);
    }
}

template <typename T, int BITS, int BATCH>
cudaError_t launch(const Layout& w, const void* x, const void* bias, void* y, int batch, int room, bool overlap, cudaStream_t stream) {
    const int numbers = (w.segments * w.segment + 2 * CHUNK) * 2 * BATCH, sums = w.segments * BATCH * LANES * 4;
    const int shared = w.segments * FeedOf<BITS, BATCH>::BYTES + (numbers > sums ? numbers : sums);
    const auto kernel = decode<T, BITS, BATCH>;
    const int asked = shared > room ? shared : room;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, asked);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3((w.rows + LANES - 1) / LANES);
    config.blockDim = dim3(w.segments * LANES);
    config.dynamicSmemBytes = asked;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = overlap ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, w, static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(y), batch);
}

template <typename T, int BITS>
cudaError_t batched(const Layout& w, const void* x, const void* bias, void* y, int batch, int room, bool overlap, cudaStream_t stream) {
    if (batch == 1) return launch<T, BITS, 1>(w, x, bias, y, batch, room, overlap, stream);
    if (batch == 2) return launch<T, BITS, 2>(w, x, bias, y, batch, room, overlap, stream);
    if (batch <= 4) return launch<T, BITS, 4>(w, x, bias, y, batch, room, overlap, stream);
    return launch<T, BITS, 8>(w, x, bias, y, batch, room, overlap, stream);
}

template <typename T>
cudaError_t coded(const Layout& w, const void* x, const void* bias, void* y, int bits, int batch, int room, bool overlap, cudaStream_t stream) {
    if (bits == 2) return batched<T, 2>(w, x, bias, y, batch, room, overlap, stream);
    if (bits == 3) return batched<T, 3>(w, x, bias, y, batch, room, overlap, stream);
    return batched<T, 4>(w, x, bias, y, batch, room, overlap, stream);
}

// The dense weight (rows, columns), which is zero before: every lane puts its stream's values where they belong.
template <int BITS>
__global__ void expand(Layout w, uint16_t* dense) {
    using P = Parts<BITS>;
    const int lane = threadIdx.x % LANES, segment = threadIdx.x / LANES;
    const int task = blockIdx.x * w.segments + segment, row = blockIdx.x * LANES + lane;
    const int mine = w.counts[task * LANES + lane], steps = __reduce_max_sync(ALL, mine);
    int next = w.bases[task], column = segment * w.segment - 1;
    for (int step = 0; step < steps; ++step) {
        const uint32_t who = __ballot_sync(ALL, step < mine);
        const int chunk = next + __popc(who & ((1u << lane) - 1));
        next += __popc(who);
        if (step >= mine) continue;
        const uint8_t* group = w.data + static_cast<size_t>(chunk / GROUP) * P::BYTES;
        const int within = chunk % GROUP;
        const uint8_t* low = group + P::VALUES + within * P::LOW;
        uint32_t codes = BITS == 4 ? *reinterpret_cast<const uint32_t*>(low) : *reinterpret_cast<const uint16_t*>(low);
        if (BITS == 3) codes |= static_cast<uint32_t>(group[P::VALUES + GROUP * P::LOW + within]) << 16;
        const uint16_t* values = reinterpret_cast<const uint16_t*>(group + within * 16);
        for (int i = 0; i < CHUNK; ++i) {
            column += (codes >> (i * BITS) & ((1u << BITS) - 1)) + 1;
            if (values[i] & 0x7fff) dense[static_cast<size_t>(row) * w.columns + column] = values[i];
        }
    }
}

}  // namespace

// Both return a cudaError_t. half: fp16 numbers, else bf16. room: bytes of shared memory that a block takes at least, so that no
// more blocks than wanted share a processor. overlap: the device lets a kernel begin before the last one ends.
extern "C" int losa_matvec(const void* data, const void* counts, const void* bases,
                           const void* x, const void* bias, void* y, int rows, int columns, int segment, int segments, int bits,
                           int half, int batch, int room, int overlap, void* stream) {
    const Layout w{static_cast<const uint8_t*>(data), static_cast<const uint8_t*>(counts), static_cast<const int*>(bases), rows, columns, segment, segments};
    const auto queue = static_cast<cudaStream_t>(stream);
    return half ? coded<__half>(w, x, bias, y, bits, batch, room, overlap, queue)
                : coded<__nv_bfloat16>(w, x, bias, y, bits, batch, room, overlap, queue);
}

extern "C" int losa_expand(const void* data, const void* counts, const void* bases,
                           void* dense, int rows, int columns, int segment, int segments, int bits, void* stream) {
    const Layout w{static_cast<const uint8_t*>(data), static_cast<const uint8_t*>(counts), static_cast<const int*>(bases), rows, columns, segment, segments};
    const int blocks = (rows + LANES - 1) / LANES;
    const auto queue = static_cast<cudaStream_t>(stream);
    auto* to = static_cast<uint16_t*>(dense);
    if (bits == 2) expand<2><<<blocks, segments * LANES, 0, queue>>>(w, to);
    else if (bits == 3) expand<3><<<blocks, segments * LANES, 0, queue>>>(w, to);
    else expand<4><<<blocks, segments * LANES, 0, queue>>>(w, to);
    return cudaGetLastError();
}
