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

constexpr int GROUP = 16;       // chunks that lie together in memory

struct Layout {
    const uint8_t* data;        // groups: 16 times eight values, bits 0-15 of 16 codes (0-31 of four-bit codes), bits 16-23 (of three-bit codes)
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

// Bytes of the parts of a group.
template <int BITS>
struct Parts {
    static constexpr unsigned VALUES = GROUP * 16, LOW = BITS == 4 ? 4 : 2, HIGH = BITS == 3, BYTES = VALUES + GROUP * (LOW + HIGH);
};

// A warp's chunks, in the order in which they are stored, on their way through a ring in shared memory. Copies are
// asynchronous, a piece at a time and up to PIECES pieces ahead: loads into registers would share a handful of scoreboards, and
// waiting for one would wait for many. On Hopper one lane starts them and a barrier counts their bytes; before Hopper every
// lane copies, and waits for all that is on its way.
template <int BITS, unsigned PIECES>
struct Feed {
    using P = Parts<BITS>;
    static constexpr unsigned PIECE = 64, HELD = PIECE * PIECES, PIECE_BYTES = PIECE / GROUP * P::BYTES;
    static constexpr unsigned BARRIERS = PIECES * PIECE_BYTES, BYTES = BARRIERS + 8 * PIECES;

    const uint8_t* data;
    const uint32_t ring;
    const int lane;
    int left;                       // bytes that are still to be copied
    unsigned cursor;                // place in the ring of the next chunk
    int used, here;                 // chunks used up of the oldest piece; chunks from the cursor on that have arrived
    unsigned filling, coming;       // place of the oldest piece, which is filled next; of the piece that is waited for next
    uint32_t phase;

    // Chunks `first` to `last` of the whole weight.
    __device__ __forceinline__ Feed(const Layout& w, uint32_t at, int my_lane, int first, int last)
        : data(w.data + static_cast<size_t>(first / GROUP) * P::BYTES), ring(at), lane(my_lane),
          left(first < last ? ((last + GROUP - 1) / GROUP - first / GROUP) * P::BYTES : 0), cursor(first % GROUP), used(first % GROUP),
          here(-(first % GROUP)), filling(0), coming(0), phase(0) {
#if __CUDA_ARCH__ >= 900
        if (lane == 0) {
            for (unsigned piece = 0; piece < PIECES; ++piece)
                asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(ring + BARRIERS + 8 * piece) : "memory");
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        __syncwarp();
#endif
        for (unsigned piece = 0; piece < PIECES; ++piece) fill();
    }

    __device__ __forceinline__ void fill() {
        const int bytes = min(left, static_cast<int>(PIECE_BYTES));
        const uint32_t to = ring + filling * PIECE_BYTES;
#if __CUDA_ARCH__ >= 900
        if (lane == 0 && bytes > 0)
            asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%3], %2;\n"
                         "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                         ::"r"(to), "l"(data), "r"(bytes), "r"(ring + BARRIERS + 8 * filling) : "memory");
#else
        for (int i = lane * 16; i < bytes; i += LANES * 16)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i), "l"(data + i) : "memory");
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
        data += PIECE_BYTES;
        left -= static_cast<int>(PIECE_BYTES);
        filling = filling + 1 == PIECES ? 0 : filling + 1;
    }

    __device__ __forceinline__ void wait() {
#if __CUDA_ARCH__ >= 900
        uint32_t arrived;
        do {
            asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                         : "=r"(arrived) : "r"(ring + BARRIERS + 8 * coming), "r"(phase) : "memory");
        } while (!arrived);
#else
        asm volatile("cp.async.wait_group %0;" ::"n"(0) : "memory");
        __syncwarp();
#endif
        coming = coming + 1 == PIECES ? 0 : coming + 1;
        phase ^= coming == 0;
        here += PIECE;
    }

    // The place of the next `chunks`, at most a piece, which are used before this is called again. The whole warp calls it.
    __device__ __forceinline__ unsigned advance(int chunks) {
        if (used >= static_cast<int>(PIECE)) {
            // All lanes are done with the oldest piece.
            __syncwarp();
            fill();
            used -= PIECE;
        }
        const unsigned from = cursor;
        cursor = from + chunks >= HELD ? from + chunks - HELD : from + chunks;
        used += chunks, here -= chunks;
        while (here < 0) wait();
        return from;
    }

    // The values and codes of the chunk so many places behind `from`.
    __device__ __forceinline__ uint4 read(unsigned from, unsigned behind, uint32_t& codes) const {
        const unsigned place = from + behind >= HELD ? from + behind - HELD : from + behind, within = place % GROUP;
        const uint32_t at = ring + place / GROUP * P::BYTES, low_at = at + P::VALUES + within * P::LOW;
        if constexpr (BITS == 4) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(codes) : "r"(low_at) : "memory");
        else asm volatile("{.reg .u16 h; ld.shared.u16 h, [%1]; cvt.u32.u16 %0, h;}" : "=r"(codes) : "r"(low_at) : "memory");
        if constexpr (BITS == 3) {
            uint32_t high;
            asm volatile("{.reg .u16 h; ld.shared.u8 h, [%1]; cvt.u32.u16 %0, h;}" : "=r"(high) : "r"(at + P::VALUES + GROUP * P::LOW + within) : "memory");
            codes |= high << 16;
        }
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at + within * 16) : "memory");
        return v;
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

}  // namespace
