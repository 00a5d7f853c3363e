// y = W x for a sparse W of codes and scales in panels of 16 x 256 (the layout of cuda_coded.py) and one to eight rows of x, on the
// tensor cores.
//
// Each lane holds the 8 x 16 numbers of a panel that it multiplies: 32 quads of a row, a bit for each number, and the codes of its
// kept ones as a stream of bits. Word k of all lanes' streams lie side by side, so a lane always reads its own bank. Four bits of the
// bitmap choose an entry of a table: the permutation that puts the next codes of the stream at their places, with zeros between
// them, and how many bits they have. A code is a sign and a size, so as the low byte of a 16-bit number, with the sign at the top, it
// is a subnormal number, exactly: no conversion. The scale of a row's 128 columns multiplies their float32 sums.

#include "cuda_decode.h"

namespace {

constexpr int COLUMNS = 256;                // of a panel
constexpr int MAP = ROWS * COLUMNS / 8;     // bytes of a panel's bitmap
constexpr int SCALES = 4 * ROWS;            // bytes of its scales, fp16
constexpr int WORDS = MAP + SCALES;         // where its words of codes begin
constexpr int TABLE = 64;                   // bytes of the table

// The tables' entries are computed: for each of four numbers, the byte of its code or of a zero, in 4 bits each; above them, the bits
// of the codes. The bytes 0-3 and 4-7 are the two numbers that `permute` takes.
template <int BITS>
__device__ __forceinline__ uint32_t entry(uint32_t nibble) {
    constexpr uint32_t PLACES = BITS == 8 ? 0x3210 : 0x5140, ZERO = BITS == 8 ? 4 : 2;
    uint32_t which = 0, count = 0;
    for (int i = 0; i < 4; ++i) {
        const bool kept = nibble >> i & 1;
        which |= (kept ? PLACES >> 4 * count & 15 : ZERO) << 4 * i;
        count += kept;
    }
    return which | count * BITS << 16;
}

// a + the upper half of b.
__device__ __forceinline__ uint32_t add_upper(uint32_t a, uint32_t b) {
    uint32_t result;
    asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(b), "r"(0x0100), "r"(a));
    return result;
}

// The codes of four numbers, a byte each, from the next 32 bits of the stream. Codes of 4 bits go to the upper half of the byte.
template <int BITS>
__device__ __forceinline__ uint32_t place(uint32_t next, uint32_t chosen) {
    if constexpr (BITS == 8) return permute(next, 0, chosen);
    return permute(next << 4 & 0xf0f0, next & 0xf0f0, chosen);
}

// Two codes as 16-bit numbers: sign and size of each.
template <bool UPPER>
__device__ __forceinline__ uint32_t pair(uint32_t codes) {
    return permute(codes, 0, UPPER ? 0xb3a2 : 0x9180) & 0x807f807f;
}

// A panel in shared memory as a lane reads it.
template <int BITS>
struct Reader {
    uint32_t table, words;
    uint32_t bit;           // of the stream
    uint32_t even, odd;     // nibbles of the bitmap as places in the table

    __device__ __forceinline__ Reader(uint32_t panel, uint32_t table, int lane) : table(table), words(panel + WORDS + 4 * lane), bit(0) {}

    // Take a word of the bitmap: eight quads.
    __device__ __forceinline__ void take(uint32_t word) {
        even = word << 2 & 0x3c3c3c3c;
        odd = word >> 2 & 0x3c3c3c3c;
    }

    // Read the quads 2 i and 2 i + 1 of the word: the codes of four numbers each.
    __device__ __forceinline__ void read(int i, uint32_t& upper, uint32_t& lower) {
        const uint32_t one = load(__dp4a(even, 1u << 8 * i, table)), two = load(__dp4a(odd, 1u << 8 * i, table));
        const uint32_t from = (bit & ~31u) * 4 + words, used = add_upper(0, one);
        const uint32_t first = load(from), second = load(from + 128);
        const uint32_t now = __funnelshift_r(first, second, bit);
        upper = place<BITS>(now, one);
        if constexpr (BITS == 8) lower = place<BITS>(__funnelshift_rc(now, __funnelshift_r(second, load(from + 256), bit), used), two);
        else lower = place<BITS>(now >> used, two);
        bit = add_upper(bit + used, two);
    }
};

// bf16: x is multiplied by 2^64, because its product with a subnormal number may be too small for float32.
template <typename T>
__device__ __forceinline__ uint32_t enlarge(uint32_t x) {
    constexpr uint32_t LARGE = 0x5f805f80, ZERO = 0x80008000;   // 2^64 and -0, twice
    if constexpr (std::is_same_v<T, __nv_bfloat16>) asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(x) : "r"(LARGE), "r"(ZERO));
    return x;
}

// What makes of a sum of subnormal numbers times x a sum of integers times x.
template <typename T, int BITS>
constexpr float UNIT = (std::is_same_v<T, __nv_bfloat16> ? 0x1p69f : 0x1p24f) / (BITS == 8 ? 1 : 16);

// Panels of codes, as `decode` multiplies with them.
template <int BITS>
struct Codes {
    static constexpr int HEAD = TABLE;
    uint32_t table;

    __device__ __forceinline__ Codes(uint32_t table, int) : table(table) {
        if (threadIdx.x < TABLE / 4) store(table + 4 * threadIdx.x, entry<BITS>(threadIdx.x));
        __syncthreads();
    }

    // Add the products of a warp's panels with x. first: number of the first panel in its strip.
    template <typename T>
    __device__ __forceinline__ void multiply(float (&sums)[4], Feed<>& feed, const Layout& w, const T* x, int first, int count, int batch, uint32_t,
                                             int lane) const {
        const T* numbers = x + static_cast<size_t>(lane / 4) * w.columns + first * COLUMNS + lane % 4 * 8;
        const bool whole = w.columns % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
        int left = w.columns - first * COLUMNS;   // numbers of x to the end of the row
        uint32_t used = lane < 4 * batch;
        asm volatile("" : "+r"(used));

        for (int panel = 0; panel < count; ++panel) {
            uint4 now[2][4] = {};
            // Lanes beyond the batch keep zeros.
            if (used) {
                if (whole && left >= COLUMNS) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) now[i / 4][i % 4] = *reinterpret_cast<const uint4*>(numbers + i * 32);
                } else {
#pragma unroll
                    for (int i = 0; i < 8; ++i) now[i / 4][i % 4] = read_end(numbers + i * 32, left - lane % 4 * 8 - i * 32);
                }
            }
            numbers += COLUMNS;
            left -= COLUMNS;
            feed.wait();
            Reader<BITS> reader(feed.at, table, lane);
            const uint4 bits = load_four(feed.at + 16 * lane);
            const uint32_t map[4] = {bits.x, bits.y, bits.z, bits.w};
            const uint32_t scales[2] = {load(feed.at + MAP + lane / 4 * 4), load(feed.at + MAP + SCALES / 2 + lane / 4 * 4)};   // of a row's two groups
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float part[4] = {};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (i % 2 == 0) reader.take(map[2 * half + i / 2]);
                    const uint32_t numbers[4] = {enlarge<T>(now[half][i].x), enlarge<T>(now[half][i].y), enlarge<T>(now[half][i].z), enlarge<T>(now[half][i].w)};
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        uint32_t upper, lower;
                        reader.read(i % 2 * 2 + h, upper, lower);
                        const uint32_t a[4] = {pair<false>(upper), pair<false>(lower), pair<true>(upper), pair<true>(lower)};
                        ::multiply<T>(part, a, numbers[2 * h], numbers[2 * h + 1]);
                    }
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const __half scale = __ushort_as_half(static_cast<unsigned short>(scales[i / 2] >> 16 * half));
                    sums[i] = fmaf(__half2float(scale) * UNIT<T, BITS>, part[i], sums[i]);
                }
            }
            __syncwarp();
            feed.turn(lane);
        }
    }
};

// Two numbers: the codes i and i + 1 of a quad times the row's scale, rounded once.
template <typename T, int BITS>
__device__ __forceinline__ uint32_t widen_pair(uint32_t codes, int i, float scale) {
    T both[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const uint32_t code = codes >> (i + j) * 8 & 255;
        narrow((code & 128 ? -scale : scale) * static_cast<float>((code & 127) >> (8 - BITS)), both[j]);
    }
    uint32_t pair;
    memcpy(&pair, both, 4);
    return pair;
}

// Write the dense weight (rows, columns), `share` panels per warp.
template <typename T, int BITS>
__global__ void expand(Layout w, T* dense, int share_of_warp) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int first = (blockIdx.x * (blockDim.x / LANES) + warp) * share_of_warp, count = min(share_of_warp, strips(w) * w.panels - first);
    const uint32_t table = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
    if (threadIdx.x < TABLE / 4) store(table + 4 * threadIdx.x, entry<BITS>(threadIdx.x));
    __syncthreads();
    if (count <= 0) return;
    // SCRATCH: a lane reads up to three words beyond its panel.
    const uint32_t mine = table + TABLE + warp * (SLOTS * w.slot + BARRIERS + SCRATCH);
    Feed<> feed(w, mine, mine + SLOTS * w.slot, lane, first, count);
    for (int panel = first; panel < first + count; ++panel) {
        feed.wait();
        Reader<BITS> reader(feed.at, table, lane);
        const uint4 bits = load_four(feed.at + 16 * lane);
        const uint32_t map[4] = {bits.x, bits.y, bits.z, bits.w};
        const uint32_t scales[2] = {load(feed.at + MAP + lane / 4 * 4), load(feed.at + MAP + SCALES / 2 + lane / 4 * 4)};   // as in `decode`
        const int row = panel / w.panels * ROWS + lane / 4, column = panel % w.panels * COLUMNS + lane % 4 * 8;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (i % 2 == 0) reader.take(map[i / 2]);
            uint32_t eights[2][4];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                uint32_t quads[2];
                reader.read(i % 2 * 2 + h, quads[0], quads[1]);
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const float scale = __half2float(__ushort_as_half(static_cast<unsigned short>(scales[j] >> i / 4 * 16)));
                    eights[j][2 * h] = widen_pair<T, BITS>(quads[j], 0, scale);
                    eights[j][2 * h + 1] = widen_pair<T, BITS>(quads[j], 2, scale);
                }
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) write_eight(w, reinterpret_cast<uint16_t*>(dense), row + 8 * j, column + i * 32, eights[j]);
        }
        __syncwarp();
        feed.turn(lane);
    }
}

template <typename T, int BITS>
int expand_to(const Layout& w, void* dense, cudaStream_t stream) {
    constexpr int WARPS = 4, SHARE = 2;
    const int blocks = (strips(w) * w.panels + WARPS * SHARE - 1) / (WARPS * SHARE);
    return launch_blocks(expand<T, BITS>, w, blocks, WARPS, TABLE + WARPS * (SLOTS * w.slot + BARRIERS + SCRATCH), false, stream,
                         static_cast<T*>(dense), SHARE);
}

}  // namespace

// As losa_matvec and losa_expand of cuda.cu. bits: of a code in the layout, 8 or 4.
extern "C" int losa_matvec_coded(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns,
                                 int panels, int slot, int half, int bits, int batch, int share, int groups, int overlap, void* stream) {
    const Layout w{static_cast<const uint8_t*>(data), static_cast<const int*>(starts), rows, columns, panels, slot};
    const auto call = half ? (bits == 8 ? launch<__half, Codes<8>, PLAIN> : launch<__half, Codes<4>, PLAIN>)
                           : (bits == 8 ? launch<__nv_bfloat16, Codes<8>, PLAIN> : launch<__nv_bfloat16, Codes<4>, PLAIN>);
    return call(w, x, bias, y, batch, share, groups, overlap, {}, static_cast<cudaStream_t>(stream));
}

// As losa_ending of cuda.cu.
extern "C" int losa_ending_coded(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns, int panels,
                                 int slot, int bits, int batch, int share, int overlap, int ending, void* squares, int parts, float eps, void* total,
                                 const void* gain, void* stream) {
    const Layout w{static_cast<const uint8_t*>(data), static_cast<const int*>(starts), rows, columns, panels, slot};
    const Around around{static_cast<float*>(squares), parts, eps, static_cast<uint16_t*>(total), static_cast<const uint16_t*>(gain), 0, overlap == 2};
    const auto call = bits == 8 ? launch_ending<Codes<8>> : launch_ending<Codes<4>>;
    return call(ending, w, x, bias, y, batch, share, overlap, around, static_cast<cudaStream_t>(stream));
}

extern "C" int losa_expand_coded(const void* data, const void* starts, void* dense, int rows, int columns, int panels, int slot,
                                        int half, int bits, void* stream) {
    const Layout w{static_cast<const uint8_t*>(data), static_cast<const int*>(starts), rows, columns, panels, slot};
    const auto call = half ? (bits == 8 ? expand_to<__half, 8> : expand_to<__half, 4>)
                           : (bits == 8 ? expand_to<__nv_bfloat16, 8> : expand_to<__nv_bfloat16, 4>);
    return call(w, dense, static_cast<cudaStream_t>(stream));
}
