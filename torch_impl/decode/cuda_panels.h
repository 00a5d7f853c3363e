// What the kernels of cuda.cu, cuda_rows.cu and cuda_coded.cu share: panels of sparse weights that a warp copies to shared memory ahead of its
// products, the products themselves, and the sum over warps.

#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace {

constexpr int LANES = 32;
constexpr int ROWS = 16;                  // of a panel
constexpr int BATCH = 8;                  // rows of x
constexpr int SCRATCH = ROWS * BATCH * 4; // bytes of shared memory for a warp's sums
constexpr int SLOTS = 2;                  // panels that a warp loads ahead
constexpr int BARRIERS = 8 * SLOTS;       // bytes of shared memory for their barriers
constexpr unsigned ALL = 0xffffffffu;

struct Layout {
    const uint8_t* data;   // panels
    const int* starts;     // (panels of all strips + 1) start of each, in units of 16 bytes
    int rows, columns, panels, slot;   // panels: per strip of 16 rows; slot: bytes of the largest panel
};

extern __shared__ __align__(128) unsigned char memory[];

// Access shared memory by an address in a register.
__device__ __forceinline__ uint32_t load(uint32_t from) {
    uint32_t value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(from) : "memory");
    return value;
}
__device__ __forceinline__ uint4 load_four(uint32_t from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
    return v;
}
__device__ __forceinline__ void store(uint32_t to, uint32_t value) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory"); }

__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t which) {
    uint32_t result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(which));
    return result;
}

template <typename T>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t x0, uint32_t x1);
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t x0, uint32_t x1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x0), "r"(x1));
}
template <>
__device__ __forceinline__ void multiply<__half>(float (&sum)[4], const uint32_t (&a)[4], uint32_t x0, uint32_t x1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x0), "r"(x1));
}

// Loads a warp's panels ahead, alternating between two places in shared memory. A place holds a panel of each of STRIPS strips,
// `slot` bytes apart. On Hopper the copy engine copies the panels and a barrier counts their bytes. Before Hopper all lanes copy, and
// wait for all pending copies.
template <int STRIPS = 1>
struct Feed {
    const uint8_t* data;
    uint32_t at, barrier;       // place of the next panels
    uint32_t both;              // sum of the two places
    uint32_t round, slot;
    int starts[STRIPS];         // of each strip, the start of the panel with this lane's number
    int start[STRIPS];          // starts of the panels to copy next
    int next;                   // their number

    // at, barrier: where the places and their barriers are. Nothing else may be stored where the barriers are, not even later: the
    // hardware may still write to one when those who waited for it have gone on. first: number of the first panel; the same one of the
    // following strips is `step` panels later. count: panels of a strip.
    __device__ __forceinline__ Feed(const Layout& w, uint32_t at, uint32_t barrier, int lane, int first, int count, int step = 0)
        : data(w.data), at(at), barrier(barrier), both(2 * at + STRIPS * w.slot), round(0), slot(w.slot), next(0) {
#pragma unroll
        for (int s = 0; s < STRIPS; ++s) starts[s] = w.starts[first + s * step + min(lane, count)];
#if __CUDA_ARCH__ >= 900
        if (chosen()) {
#pragma unroll
            for (int i = 0; i < SLOTS; ++i) asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier + 8 * i) : "memory");
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        __syncwarp();
#endif
#pragma unroll
        for (int s = 0; s < STRIPS; ++s) start[s] = __shfl_sync(ALL, starts[s], 0);
        copy(at, barrier, lane);
        copy(at + STRIPS * w.slot, barrier + 8, lane);
    }

#if __CUDA_ARCH__ >= 900
    __device__ __forceinline__ static bool chosen() {
        uint32_t yes;
        asm volatile("{.reg .pred p; elect.sync _|p, -1; selp.u32 %0, 1, 0, p;}" : "=r"(yes));
        return yes;
    }
#endif

    // Lanes after the last panel hold its end, so nothing more is copied. This needs SLOTS spare lanes.
    __device__ __forceinline__ void copy(uint32_t to, uint32_t counter, int lane) {
        ++next;
        const uint8_t* from[STRIPS];
        int bytes[STRIPS];
#pragma unroll
        for (int s = 0; s < STRIPS; ++s) {
            const int end = __shfl_sync(ALL, starts[s], next);
            bytes[s] = (end - start[s]) * 16;
            from[s] = data + static_cast<size_t>(start[s]) * 16;
            start[s] = end;
        }
#if __CUDA_ARCH__ >= 900
        // A panel is never empty, so the strips' panels end together.
        if (bytes[0] > 0 && chosen()) {
            int all = 0;
#pragma unroll
            for (int s = 0; s < STRIPS; ++s) all += bytes[s];
            asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%1], %0;" ::"r"(all), "r"(counter) : "memory");
#pragma unroll
            for (int s = 0; s < STRIPS; ++s)
                asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                             ::"r"(to + s * slot), "l"(from[s]), "r"(bytes[s]), "r"(counter) : "memory");
        }
#else
#pragma unroll
        for (int s = 0; s < STRIPS; ++s)
            for (int i = lane * 16; i < bytes[s]; i += LANES * 16)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + s * slot + i), "l"(from[s] + i) : "memory");
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }

    // Switch to the other place, which holds the following panels, and start loading others into this one.
    __device__ __forceinline__ void turn(int lane) {
        copy(at, barrier, lane);
        at = both - at;
        barrier ^= 8;
        round ^= ~barrier >> 3 & 1;
    }

    __device__ __forceinline__ void wait() const {
#if __CUDA_ARCH__ >= 900
        asm volatile("{.reg .pred p;\n"
                     "again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
                     "@!p bra again;}" ::"r"(barrier), "r"(round) : "memory");
#else
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncwarp();
#endif
    }
};

// Read eight numbers of one row of x; zeros after `left` numbers, the end of the row.
template <typename T>
__device__ __forceinline__ uint4 read_end(const T* from, int left) {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
    uint32_t words[4] = {};
#pragma unroll
    for (int j = 0; j < 8; ++j)
        if (j < left) words[j / 2] |= static_cast<uint32_t>(halves[j]) << (j % 2 * 16);
    return uint4{words[0], words[1], words[2], words[3]};
}

// Write eight neighbouring numbers of a row.
__device__ __forceinline__ void write_eight(const Layout& w, uint16_t* dense, int row, int column, const uint32_t (&pairs)[4]) {
    if (row >= w.rows || column >= w.columns) return;
    uint16_t* to = dense + static_cast<size_t>(row) * w.columns + column;
    if (w.columns % 8 == 0) {
        *reinterpret_cast<uint4*>(to) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
        return;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j)
        if (column + j < w.columns) to[j] = static_cast<uint16_t>(pairs[j / 2] >> j % 2 * 16);
}

// Conversion functions, because torch builds without the conversion operators.
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16& to) { to = __float2bfloat16(value); }
__device__ __forceinline__ void narrow(float value, __half& to) { to = __float2half(value); }

// Leave the lane's sums of a product in shared memory. scratch: of this warp.
__device__ __forceinline__ void store_sums(const float (&sums)[4], uint32_t scratch, int lane) {
    const uint32_t to = scratch + lane / 4 * 32 + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) store(to + i / 2 * (SCRATCH / 2) + i % 2 * 4, __float_as_uint(sums[i]));
}

// Add what `count` warps have left, the first one in `from`, the others `each` bytes apart, in a fixed order.
__device__ __forceinline__ float sum_warps(float sum, uint32_t from, uint32_t each, int count) {
    for (int s = 0; s < count; ++s, from += each) sum += __uint_as_float(load(from));
    return sum;
}

// The lane's sums of a product in shared memory, then y: the sum over the `across` warps of a strip. scratch: of this warp, `each` bytes
// after that of the warp before.
template <typename T>
__device__ __forceinline__ void add_warps(const Layout& w, const float (&sums)[4], uint32_t scratch, uint32_t each, int warp, int lane, int across,
                                          const T* bias, T* y, int batch) {
    store_sums(sums, scratch, lane);
    __syncthreads();
    const int height = blockDim.x / LANES / across * ROWS;
    for (int i = threadIdx.x; i < height * batch; i += blockDim.x) {
        const int b = i / height, below = i - b * height, r = blockIdx.x * height + below;
        if (r >= w.rows) continue;
        const uint32_t from = scratch - warp * each + below / ROWS * across * each + below % ROWS * 32 + b * 4;
        narrow(sum_warps(bias ? widen(bias[r]) : 0, from, each, across), y[static_cast<size_t>(b) * w.rows + r]);
    }
}

// The strips of a weight.
__host__ __device__ __forceinline__ int strips(const Layout& w) { return (w.rows + ROWS - 1) / ROWS; }

// Launch a kernel. overlap: it may start before the previous kernel ends.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_blocks(void (*kernel)(Parameters...), const Layout& w, int blocks, int warps, int shared, bool overlap, cudaStream_t stream,
                          Arguments... arguments) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(warps * LANES);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = overlap ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, w, arguments...);
}

}  // namespace
