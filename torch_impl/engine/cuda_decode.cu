// y = W x for a sparse W whose kept values are coded by their gaps (the layout of cuda_decode.py), batch 1 to 8.
//
// A lane follows one stream, a row's part of some columns. Per value: two integer instructions that turn the gap into an
// address, one read of x from shared memory, conversions and multiply-adds in float32. Loads run DEPTH chunks ahead, and begin
// before the kernel waits for the one that makes x: weights do not change. Sums are always taken in the same order.

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace {

constexpr int LANES = 32;
constexpr int CHUNK = 8;        // values of one 16-byte load
constexpr unsigned ALL = 0xffffffffu;

struct Layout {
    const uint4* values;        // (chunks) eight 16-bit values
    const void* low;            // (chunks) bits 0-15 of their codes (0-31 of four-bit codes)
    const uint8_t* high;        // (chunks) bits 16-23 of three-bit codes
    const uint8_t* counts;      // (tasks, 32) chunks of each lane
    const int* bases;           // (tasks) first chunk
    int rows, columns, segment, segments;
};

// Before this, nothing of the kernel before may be read; after it, the next kernel may begin to load its weights.
__device__ __forceinline__ void wait_for_input() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ uint32_t address_of(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

// Loads that only some lanes do, without a branch: the others' registers stay as they are.
__device__ __forceinline__ void load_values(uint4& to, const uint4* from, bool mine) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];}"
                 : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w) : "l"(from), "r"(static_cast<uint32_t>(mine)));
}

template <int BYTES>
__device__ __forceinline__ void load_codes(uint32_t& to, const void* from, bool mine) {
    const uint32_t flag = mine;
    if constexpr (BYTES == 4) asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.nc.u32 %0, [%1];}" : "+r"(to) : "l"(from), "r"(flag));
    if constexpr (BYTES == 2) asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.nc.u16 %0, [%1];}" : "+r"(to) : "l"(from), "r"(flag));
    if constexpr (BYTES == 1) asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.nc.u8 %0, [%1];}" : "+r"(to) : "l"(from), "r"(flag));
}

// Conversions by name: torch builds with the operators switched off.
template <typename T>
__device__ __forceinline__ float widen_one(T value);
template <>
__device__ __forceinline__ float widen_one<__nv_bfloat16>(__nv_bfloat16 value) { return __bfloat162float(value); }
template <>
__device__ __forceinline__ float widen_one<__half>(__half value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T narrow(float value);
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) { return __float2bfloat16(value); }
template <>
__device__ __forceinline__ __half narrow<__half>(float value) { return __float2half(value); }

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
__device__ __forceinline__ void multiply(float (&acc)[BATCH], const uint32_t (&words)[4], const uint32_t (&at)[CHUNK]) {
    constexpr int PAIRS = (BATCH + 1) / 2;
    constexpr int TOGETHER = BATCH <= 2 ? CHUNK : BATCH == 4 ? 4 : 2;  // columns whose x are read before any is used
#pragma unroll
    for (int first = 0; first < CHUNK; first += TOGETHER) {
        uint32_t x[TOGETHER][PAIRS];
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            const uint32_t from = at[first + i];
            if constexpr (BATCH == 1) asm volatile("{.reg .u16 h; ld.shared.u16 h, [%1]; cvt.u32.u16 %0, h;}" : "=r"(x[i][0]) : "r"(from));
            if constexpr (BATCH == 2) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x[i][0]) : "r"(from));
            if constexpr (BATCH == 4) asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(x[i][0]), "=r"(x[i][1]) : "r"(from));
            if constexpr (BATCH == 8)
                asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                             : "=r"(x[i][0]), "=r"(x[i][1]), "=r"(x[i][2]), "=r"(x[i][3]) : "r"(from));
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
            for (int b = 0; b < BATCH; b += 2) {
                const uint32_t one = (&rows[b].x)[j / 2], two = (&rows[b + 1].x)[j / 2];
                words[(j * BATCH + b) / 2] = __byte_perm(one, two, j % 2 ? 0x7632 : 0x5410);
            }
    }
}

template <typename T, int BITS, int BATCH, int DEPTH, int THREADS>
__global__ void __launch_bounds__(THREADS) decode(Layout w, const T* x, const T* bias, T* y, int batch) {
    constexpr int BYTES = 2 * BATCH;
    constexpr int SHIFT = BYTES == 2 ? 1 : BYTES == 4 ? 2 : BYTES == 8 ? 3 : 4;
    constexpr uint32_t MASK = (1u << BITS) - 1;
    extern __shared__ __align__(16) unsigned char memory[];

    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int task = blockIdx.x * w.segments + warp;
    const int mine = w.counts[task * LANES + lane];
    int next = w.bases[task];
    const int steps = __reduce_max_sync(ALL, mine);
    uint32_t below;
    asm volatile("mov.u32 %0, %%lanemask_lt;" : "=r"(below));

    uint4 values[DEPTH] = {};
    uint32_t codes[DEPTH] = {}, high[DEPTH] = {};
    auto issue = [&](int step, int slot) {
        const bool active = step < mine;
        const uint32_t who = __ballot_sync(ALL, active);
        const int chunk = next + __popc(who & below);
        next += __popc(who);
        load_values(values[slot], w.values + chunk, active);
        load_codes<BITS == 4 ? 4 : 2>(codes[slot], static_cast<const uint8_t*>(w.low) + static_cast<size_t>(chunk) * (BITS == 4 ? 4 : 2), active);
        if constexpr (BITS == 3) load_codes<1>(high[slot], w.high + chunk, active);
    };
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) issue(d, d);
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
        store_octet<BATCH>(memory + column * BYTES, rows);
    }
    __syncthreads();

    float acc[BATCH] = {};
    uint32_t address = address_of(memory) + warp * w.segment * BYTES;
    for (int step = 0; step < steps; step += DEPTH) {
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            if (step + d < mine) {
                uint32_t c = codes[d];
                if constexpr (BITS == 3) c |= high[d] << 16;
                const uint32_t words[4] = {values[d].x, values[d].y, values[d].z, values[d].w};
                uint32_t at[CHUNK];
#pragma unroll
                for (int i = 0; i < CHUNK; ++i) {
                    const uint32_t field = c & (MASK << (i * BITS));
                    address += i * BITS >= SHIFT ? field >> (i * BITS - SHIFT) : field << (SHIFT - i * BITS);
                    at[i] = address + i * BYTES;
                }
                address += CHUNK * BYTES;
                multiply<T, BATCH>(acc, words, at);
            }
            issue(step + d + DEPTH, d);
        }
    }

    // The sum of a row over its warps, always in the same order.
    __syncthreads();
    float* sums = reinterpret_cast<float*>(memory);
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

template <typename T, int BITS, int BATCH, int DEPTH, int THREADS>
cudaError_t launch(const Layout& w, const void* x, const void* bias, void* y, int batch, bool overlap, cudaStream_t stream) {
    auto kernel = decode<T, BITS, BATCH, DEPTH, THREADS>;
    const int sums = w.segments * BATCH * LANES * 4;
    const int numbers = (w.segments * w.segment + 2 * CHUNK) * 2 * BATCH;
    const int shared = sums > numbers ? sums : numbers;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3((w.rows + LANES - 1) / LANES);
    config.blockDim = dim3(w.segments * LANES);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = overlap ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, w, static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(y), batch);
}

template <typename T, int BITS, int BATCH, int DEPTH>
cudaError_t sized(const Layout& w, const void* x, const void* bias, void* y, int batch, bool overlap, cudaStream_t stream) {
    if (w.segments <= 16) return launch<T, BITS, BATCH, DEPTH, 512>(w, x, bias, y, batch, overlap, stream);
    return launch<T, BITS, BATCH, DEPTH, 1024>(w, x, bias, y, batch, overlap, stream);
}

template <typename T, int BITS>
cudaError_t batched(const Layout& w, const void* x, const void* bias, void* y, int batch, int depth, bool overlap, cudaStream_t stream) {
    if (batch == 1 && depth == 8) return sized<T, BITS, 1, 8>(w, x, bias, y, batch, overlap, stream);
    if (batch == 1) return sized<T, BITS, 1, 4>(w, x, bias, y, batch, overlap, stream);
    if (batch == 2) return sized<T, BITS, 2, 4>(w, x, bias, y, batch, overlap, stream);
    if (batch <= 4) return sized<T, BITS, 4, 4>(w, x, bias, y, batch, overlap, stream);
    return sized<T, BITS, 8, 4>(w, x, bias, y, batch, overlap, stream);
}

template <typename T>
cudaError_t coded(const Layout& w, const void* x, const void* bias, void* y, int bits, int batch, int depth, bool overlap,
                  cudaStream_t stream) {
    if (bits == 2) return batched<T, 2>(w, x, bias, y, batch, depth, overlap, stream);
    if (bits == 3) return batched<T, 3>(w, x, bias, y, batch, depth, overlap, stream);
    return batched<T, 4>(w, x, bias, y, batch, depth, overlap, stream);
}

// The dense weight (rows, columns), which is zero before: every lane puts its stream's values where they belong.
template <int BITS>
__global__ void expand(Layout w, uint16_t* dense) {
    const int lane = threadIdx.x % LANES, segment = threadIdx.x / LANES;
    const int task = blockIdx.x * w.segments + segment, row = blockIdx.x * LANES + lane;
    const int mine = w.counts[task * LANES + lane], steps = __reduce_max_sync(ALL, mine);
    int next = w.bases[task], column = segment * w.segment - 1;
    for (int step = 0; step < steps; ++step) {
        const uint32_t who = __ballot_sync(ALL, step < mine);
        const int chunk = next + __popc(who & ((1u << lane) - 1));
        next += __popc(who);
        if (step >= mine) continue;
        uint32_t codes = BITS == 4 ? static_cast<const uint32_t*>(w.low)[chunk] : static_cast<const uint16_t*>(w.low)[chunk];
        if (BITS == 3) codes |= static_cast<uint32_t>(w.high[chunk]) << 16;
        const uint16_t* values = reinterpret_cast<const uint16_t*>(w.values + chunk);
        for (int i = 0; i < CHUNK; ++i) {
            column += (codes >> (i * BITS) & ((1u << BITS) - 1)) + 1;
            if (values[i] & 0x7fff) dense[static_cast<size_t>(row) * w.columns + column] = values[i];
        }
    }
}

}  // namespace

// Both return a cudaError_t. half: fp16 numbers, else bf16. overlap: the device lets a kernel begin before the last one ends.
extern "C" int losa_matvec(const void* values, const void* low, const void* high, const void* counts, const void* bases,
                           const void* x, const void* bias, void* y, int rows, int columns, int segment, int segments, int bits,
                           int half, int batch, int depth, int overlap, void* stream) {
    const Layout w{static_cast<const uint4*>(values), low, static_cast<const uint8_t*>(high), static_cast<const uint8_t*>(counts),
                   static_cast<const int*>(bases), rows, columns, segment, segments};
    const auto queue = static_cast<cudaStream_t>(stream);
    return half ? coded<__half>(w, x, bias, y, bits, batch, depth, overlap, queue)
                : coded<__nv_bfloat16>(w, x, bias, y, bits, batch, depth, overlap, queue);
}

extern "C" int losa_expand(const void* values, const void* low, const void* high, const void* counts, const void* bases,
                           void* dense, int rows, int columns, int segment, int segments, int bits, void* stream) {
    const Layout w{static_cast<const uint4*>(values), low, static_cast<const uint8_t*>(high), static_cast<const uint8_t*>(counts),
                   static_cast<const int*>(bases), rows, columns, segment, segments};
    const int blocks = (rows + LANES - 1) / LANES;
    const auto queue = static_cast<cudaStream_t>(stream);
    auto* to = static_cast<uint16_t*>(dense);
    if (bits == 2) expand<2><<<blocks, segments * LANES, 0, queue>>>(w, to);
    else if (bits == 3) expand<3><<<blocks, segments * LANES, 0, queue>>>(w, to);
    else expand<4><<<blocks, segments * LANES, 0, queue>>>(w, to);
    return cudaGetLastError();
}
