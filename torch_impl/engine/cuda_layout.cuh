// What the decoding kernels share: the layout of cuda_decode.py, the way its chunks take through shared memory, and conversions.

#pragma once

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
    const uint8_t* low;         // (chunks) bits 0-15 of their codes (0-31 of four-bit codes)
    const uint8_t* high;        // (chunks) bits 16-23 of three-bit codes
    const uint8_t* counts;      // (tasks, 32) chunks of each lane
    const int* bases;           // (tasks + 1) first chunk
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

__device__ __forceinline__ uint4 read_four(uint32_t from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
    return v;
}

// A warp's chunks, in the order in which they are stored, on their way through a ring in shared memory. Copies are
// asynchronous and come PIECES pieces ahead: loads into registers would share a handful of scoreboards, and waiting for one
// would wait for many.
template <int BITS>
struct Feed {
    static constexpr int PIECE = 32, PIECES = 8, HELD = PIECE * PIECES, LOW = BITS == 4 ? 4 : 2;
    static constexpr int BYTES = HELD * (16 + LOW + (BITS == 3));

    const Layout& w;
    const uint32_t ring;
    const int lane;
    uint32_t below;
    int next, begin, end;       // chunks: to be copied next, the first and the last copied
    int cursor, ready, waits;   // behind `begin`: the next to be used, those that are here; pieces waited for

    // Chunks `first` to `last` of the whole weight; arrays begin at multiples of 16 chunks and end there.
    __device__ __forceinline__ Feed(const Layout& layout, uint32_t at, int my_lane, int first, int last)
        : w(layout), ring(at), lane(my_lane), next(first & ~15), begin(next), end((last + 15) & ~15), cursor(first - next), ready(0), waits(0) {
        asm volatile("mov.u32 %0, %%lanemask_lt;" : "=r"(below));
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) copy();
    }

    static __device__ __forceinline__ void copy_16(uint32_t to, const void* from) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
    }

    __device__ __forceinline__ void copy() {
        const int slot = (next - begin) & (HELD - 1);
        if (next + lane < end) copy_16(ring + (slot + lane) * 16, w.values + next + lane);
        const int codes = lane & 15;
        if (lane < 16) {
            if (codes < PIECE * LOW / 16 && next + codes * (16 / LOW) < end)
                copy_16(ring + HELD * 16 + slot * LOW + codes * 16, w.low + static_cast<size_t>(next) * LOW + codes * 16);
        } else if (BITS == 3 && codes < PIECE / 16 && next + codes * 16 < end) {
            copy_16(ring + HELD * 18 + slot + codes * 16, w.high + next + codes * 16);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        next += PIECE;
    }

    // One chunk for every lane that wants one: where it is in the ring. The whole warp calls it.
    __device__ __forceinline__ int advance(bool active) {
        const uint32_t who = __ballot_sync(ALL, active);
        const int place = cursor + __popc(who & below);
        cursor += __popc(who);
        if (cursor > ready) {
            // The piece before the last one is used up by all lanes; its place is free.
            if (waits >= 2) copy();
            else if (waits == 1) asm volatile("cp.async.commit_group;" ::: "memory");
            ++waits;
            asm volatile("cp.async.wait_group %0;" ::"n"(PIECES - 1) : "memory");
            __syncwarp();
            ready += PIECE;
        }
        return place & (HELD - 1);
    }

    __device__ __forceinline__ uint4 values(int place) const { return read_four(ring + place * 16); }

    __device__ __forceinline__ uint32_t codes(int place) const {
        uint32_t low, high = 0;
        const uint32_t at = ring + HELD * 16 + place * LOW;
        if constexpr (BITS == 4) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(low) : "r"(at) : "memory");
        else asm volatile("{.reg .u16 h; ld.shared.u16 h, [%1]; cvt.u32.u16 %0, h;}" : "=r"(low) : "r"(at) : "memory");
        if constexpr (BITS == 3) asm volatile("{.reg .u16 h; ld.shared.u8 h, [%1]; cvt.u32.u16 %0, h;}" : "=r"(high) : "r"(ring + HELD * 18 + place) : "memory");
        return high << 16 | low;
    }
};

// at[i] = the column of value i of a chunk times 2^SHIFT; `from`: that of a gap of zero at its beginning.
template <int BITS, int SHIFT>
__device__ __forceinline__ void places(uint32_t (&at)[CHUNK], uint32_t codes, uint32_t from) {
    if constexpr (BITS == 2) {
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            const uint32_t field = codes & (3u << (2 * i));
            from += 2 * i < SHIFT ? field << (SHIFT - 2 * i) : field >> (2 * i - SHIFT);
            at[i] = from + (i << SHIFT);
        }
    } else {
        // Running sums of all gaps at once, in fields of twice a code's bits: eight codes and the 7 columns of the values
        // between them stay below 2^(2 · BITS).
        constexpr int WIDE = 2 * BITS;
        constexpr uint32_t EACH = 1u | 1u << WIDE | 1u << (2 * WIDE) | 1u << (3 * WIDE), FIELD = (1u << WIDE) - 1;
        constexpr uint32_t CODES = ((1u << BITS) - 1) * EACH;
        constexpr uint32_t EVEN = 0u | 2u << WIDE | 4u << (2 * WIDE) | 6u << (3 * WIDE);
        const uint32_t odd = codes >> BITS & CODES;
        const uint32_t sums = ((codes & CODES) + odd) * EACH + EVEN;
        const uint32_t first = sums - odd, second = sums + EACH;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int shift = k * WIDE - SHIFT;
            const uint32_t one = first & (FIELD << (k * WIDE)), two = second & (FIELD << (k * WIDE));
            at[2 * k] = from + (shift < 0 ? one << -shift : one >> shift);
            at[2 * k + 1] = from + (shift < 0 ? two << -shift : two >> shift);
        }
    }
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

// Launch so that, where the device can, loading begins before the kernel before has ended.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), int blocks, int warps, int shared, bool overlap, cudaStream_t stream, Arguments... arguments) {
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
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace
