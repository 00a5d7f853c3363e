// A GPU in C++ on one thread, enough of it to run the kernels of torch_impl/decode: kernels.py puts this file before their sources.
//
// Emulated: every lane of a block, each with its own stack; warps in random order, lanes from a random one on, up to what they wait for
// (a barrier of the warp or block, a shuffle, a copy); shared memory, filled with random numbers, with its bounds and alignment; copies
// that arrive in random order at random moments, and the barriers that count their bytes; the fragments of mma.sync.m16n8k16; memory
// pages that may not be accessed. A deadlock, a lane that leaves its warp, or a wrong access ends the launch with an error that says why.
//
// Not emulated: time; several blocks at once and the overlap of kernels; the order in which other lanes see writes to memory between two
// barriers, beyond the random order of lanes (a shuffle acts as a barrier of the warp); bounds of shared memory where a kernel accesses it
// by a pointer; alignment of global memory, unless the CPU objects; how a tensor core rounds its sums (here: once, to float32); registers,
// and whether nvcc compiles the source.

#pragma once

#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __restrict__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (emulated::Index{emulated::now->number})

using std::max;
using std::min;

constexpr uint32_t MOST_SHARED = 227 * 1024;   // bytes of a block of an H100
inline unsigned char memory[MOST_SHARED] __attribute__((aligned(128)));

struct alignas(16) uint4 { uint32_t x, y, z, w; }; struct alignas(8) uint2 { uint32_t x, y; };
struct dim3 { int x; explicit dim3(int x = 1) : x(x) {} };

// Numbers of 16 bits.
struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };
inline uint32_t __float_as_uint(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }
inline float __uint_as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
inline float __bfloat162float(__nv_bfloat16 a) { return __uint_as_float(uint32_t{a.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16(float f) {
    const uint32_t bits = __float_as_uint(f);
    return {static_cast<uint16_t>(std::isnan(f) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half a) {
    const int exponent = a.bits >> 10 & 31, fraction = a.bits & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY) : std::ldexp(exponent ? 1024.f + fraction : fraction, std::max(exponent, 1) - 25);
    return a.bits >> 15 ? -size : size;
}
inline __half __float2half(float f) {
    const uint32_t sign = __float_as_uint(f) >> 31 << 15;
    const float size = std::fabs(f);
    if (!(size < 65520)) return {static_cast<uint16_t>(sign | (std::isnan(f) ? 0x7fff : 0x7c00))};
    const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
    // The leading bit of a normal number, 1024, adds one to its exponent.
    return {static_cast<uint16_t>(sign | (static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent))) + ((exponent + 14) << 10)))};
}
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

namespace emulated {

struct Index { unsigned x; };
inline std::mt19937 random;
inline std::string failure;   // of the last launch

// What counts the bytes of copies: `arrivals` and `bytes` are those that the present phase waits for.
struct Barrier { int arrivals, bytes; unsigned phase; };
inline std::map<uint32_t, Barrier> barriers;
struct Copy { uint32_t to; std::vector<unsigned char> content; Barrier* barrier; };
inline std::vector<Copy> copies;

enum State { READY, WARP, BLOCK, COPIES, DONE };   // DONE: left the kernel; otherwise what it waits for
struct Lane {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 * 1024);
    unsigned number;
    State state;
    void (*collective)(Lane* warp);   // what the lanes of a warp do together when all have come
    uint32_t in[10], out[4];          // of the collective
    const Barrier* barrier;
    unsigned parity;
    std::vector<Copy> copies;         // the lane's own
};
inline std::vector<Lane> lanes;
inline Lane* now;
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline size_t shared;   // bytes of the block

inline void wait_for(State state) {
    now->state = state;
    swapcontext(&now->context, &scheduler);
}
inline void fail(const char* why) {
    if (failure.empty()) failure = std::string(why) + (now ? ", thread " + std::to_string(now->number) : "");
    if (now) setcontext(&scheduler);
}

// Shared memory.
inline void check(uint32_t at, uint32_t bytes, uint32_t unit) {
    if (at % unit || at + static_cast<size_t>(bytes) > shared) fail("shared memory: out of bounds or not aligned");
}
// A barrier's bytes are the hardware's until the kernel ends: it may write to them when those who waited have gone on. Reading them is
// harmless: some lanes read beyond their panel and use nothing of it.
inline void check_store(uint32_t at, uint32_t bytes) {
    check(at, bytes, bytes);
    const auto next = barriers.lower_bound(at < 8 ? 0 : at - 7);
    if (next != barriers.end() && next->first < at + bytes) fail("shared memory: a barrier is there");
}
template <class T> T load(uint32_t at) { check(at, sizeof(T), sizeof(T)); T value; memcpy(&value, memory + at, sizeof(T)); return value; }
template <class T> void store(uint32_t at, T value) { check_store(at, sizeof(T)); memcpy(memory + at, &value, sizeof(T)); }
inline void load_four(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t at) {
    const uint4 all = load<uint4>(at);
    a = all.x, b = all.y, c = all.z, d = all.w;
}

// Global memory, by an instruction.
template <class T> T read(const uint8_t* from) {
    if (reinterpret_cast<uintptr_t>(from) % sizeof(T)) fail("global memory: not aligned");
    return *reinterpret_cast<const T*>(from);
}

// Copies. Global memory is read at once, by the lane; only the writing comes later.
inline Copy copy_of(uint32_t to, const uint8_t* from, uint32_t bytes, Barrier* barrier) {
    check(to, bytes, 16);
    if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16 || !bytes) fail("copy: not aligned or empty");
    return {to, {from, from + bytes}, barrier};
}
inline void write(const Copy& copy) { memcpy(memory + copy.to, copy.content.data(), copy.content.size()); }
inline Barrier& barrier_at(uint32_t at) {
    if (!barriers.count(at)) fail("no barrier there");
    return barriers[at];
}
inline void settle(Barrier& barrier) {
    if (!barrier.arrivals && !barrier.bytes) barrier.phase++, barrier.arrivals = 1;
}
inline void init_barrier(uint32_t at) { check(at, 8, 8); barriers[at] = {1, 0, 0}; }
inline void expect(uint32_t at, uint32_t bytes) {
    Barrier& barrier = barrier_at(at);
    if (barrier.arrivals-- == 0) fail("barrier: more arrivals than it counts");
    barrier.bytes += bytes;
    settle(barrier);
}
inline void copy_bulk(uint32_t to, const uint8_t* from, uint32_t bytes, uint32_t barrier) { copies.push_back(copy_of(to, from, bytes, &barrier_at(barrier))); }
inline void wait_parity(uint32_t at, unsigned parity) { now->barrier = &barrier_at(at), now->parity = parity, wait_for(COPIES); }
inline bool deliver() {   // one copy of any
    if (copies.empty()) return false;
    std::swap(copies[random() % copies.size()], copies.back());
    const Copy copy = copies.back();
    copies.pop_back();
    write(copy);
    copy.barrier->bytes -= copy.content.size();
    settle(*copy.barrier);
    return true;
}
inline void copy_async(uint32_t to, const void* from) { now->copies.push_back(copy_of(to, static_cast<const uint8_t*>(from), 16, nullptr)); }
inline void copy_word(uint32_t to, const void* from) {
    check(to, 4, 4);
    if (reinterpret_cast<uintptr_t>(from) % 4) fail("copy: not aligned");
    const auto* bytes = static_cast<const unsigned char*>(from);
    now->copies.push_back({to, {bytes, bytes + 4}, nullptr});
}
inline void finish_copies() {
    for (const Copy& copy : now->copies) write(copy);
    now->copies.clear();
}

// What the lanes of a warp do together.
inline void together(void (*collective)(Lane* warp)) { now->collective = collective, wait_for(WARP); }
inline void meet(Lane*) {}
inline void choose_any(Lane* warp) {
    const unsigned chosen = random() % 32;
    for (unsigned i = 0; i < 32; ++i) warp[i].out[0] = i == chosen;
}
inline void find_any(Lane* warp) {
    uint32_t any = 0;
    for (Lane* lane = warp; lane < warp + 32; ++lane) any |= lane->in[0];
    for (Lane* lane = warp; lane < warp + 32; ++lane) lane->out[0] = any;
}
inline void shuffle(Lane* warp) {
    for (Lane* lane = warp; lane < warp + 32; ++lane) lane->out[0] = warp[lane->in[1] % 32].in[0];
}
inline float widen_bits(uint32_t bits, __half) { return __half2float({static_cast<uint16_t>(bits)}); }
inline float widen_bits(uint32_t bits, __nv_bfloat16) { return __bfloat162float({static_cast<uint16_t>(bits)}); }
// The fragments of mma.sync.m16n8k16 (PTX ISA, "Matrix Fragments"): registers 0-3 of A, 4-5 of B, 6-9 of the sums.
template <class T> void multiply_fragments(Lane* warp) {
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < 8; ++i) {
            // Register i / 2 has rows of the lower half if odd, and columns of the right half if it is one of the last two.
            const int along = l % 4 * 2 + i % 2, right = i / 4 * 8, lower = i / 2 % 2 * 8;
            a[l / 4 + lower][along + right] = widen_bits(warp[l].in[i / 2] >> i % 2 * 16, T{});
            if (i < 4) b[along + lower][l / 4] = widen_bits(warp[l].in[4 + i / 2] >> i % 2 * 16, T{});
        }
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < 4; ++i) {
            double sum = __uint_as_float(warp[l].in[6 + i]);
            for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[l / 4 + i / 2 * 8][k]) * b[k][l % 4 * 2 + i % 2];
            warp[l].out[i] = __float_as_uint(static_cast<float>(sum));
        }
}
template <class T>
void mma(float& s0, float& s1, float& s2, float& s3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t x0, uint32_t x1) {
    const uint32_t in[10] = {a0, a1, a2, a3, x0, x1, __float_as_uint(s0), __float_as_uint(s1), __float_as_uint(s2), __float_as_uint(s3)};
    memcpy(now->in, in, sizeof(in));
    together(multiply_fragments<T>);
    float* sums[4] = {&s0, &s1, &s2, &s3};
    for (int i = 0; i < 4; ++i) *sums[i] = __uint_as_float(now->out[i]);
}
inline uint32_t elect() { together(choose_any); return now->out[0]; }

// Other instructions.
inline uint32_t lane_number() { return now->number % 32; }
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t which) {
    const uint64_t both = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        uint32_t byte = both >> (which >> 4 * i & 7) * 8 & 255;
        // The upper bit of a nibble: the byte's sign in all its bits.
        if (which >> 4 * i & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}
inline uint32_t dot_two(uint32_t a, uint32_t b, uint32_t c) { return c + (a & 0xffff) * (b & 255) + (a >> 16) * (b >> 8 & 255); }
inline uint32_t fma_two(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result = 0;
    for (int i = 0; i < 32; i += 16) {
        const auto number = [i](uint32_t pair) { return widen_bits(pair >> i, __nv_bfloat16{}); };
        result |= uint32_t{__float2bfloat16(std::fma(number(a), number(b), number(c))).bits} << i;
    }
    return result;
}

// Scheduling.
inline void enter() {
    kernel();
    finish_copies();
    wait_for(DONE);
}
inline bool passed(const Lane& lane) { return lane.state == COPIES && lane.barrier->phase % 2 != lane.parity; }
// Run the lanes of a warp until each waits; return whether any could move.
inline bool run_warp(Lane* warp) {
    bool moved = false;
    const unsigned first = random() % 32;
    for (unsigned i = 0; i < 32 && failure.empty(); ++i) {
        Lane& lane = warp[(first + i) % 32];
        if (lane.state != READY && !passed(lane)) continue;
        lane.state = READY;
        now = &lane;
        swapcontext(&scheduler, &lane.context);
        now = nullptr;
        moved = true;
    }
    if (!std::all_of(warp, warp + 32, [](const Lane& lane) { return lane.state == WARP; })) return moved;
    if (std::any_of(warp, warp + 32, [=](const Lane& lane) { return lane.collective != warp->collective; })) fail("a warp at different instructions");
    warp->collective(warp);
    for (Lane* lane = warp; lane < warp + 32; ++lane) lane->state = READY;
    return true;
}
inline void run_block(unsigned threads) {
    barriers.clear(), copies.clear();
    for (size_t i = 0; i + 4 <= shared; i += 4) { const uint32_t any = random(); memcpy(memory + i, &any, 4); }
    if (lanes.size() < threads) lanes.resize(threads);
    for (unsigned i = 0; i < threads; ++i) {
        Lane& lane = lanes[i];
        lane.number = i, lane.state = READY, lane.copies.clear();
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack.data(), lane.context.uc_stack.ss_size = lane.stack.size();
        makecontext(&lane.context, enter, 0);
    }
    std::vector<unsigned> order(threads / 32);
    for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
    const auto all = [=](State state) { return std::all_of(lanes.begin(), lanes.begin() + threads, [=](const Lane& lane) { return lane.state == state; }); };
    while (failure.empty() && !all(DONE)) {
        bool moved = false;
        std::shuffle(order.begin(), order.end(), random);
        for (unsigned warp : order) {
            moved |= run_warp(&lanes[warp * 32]);
            if (random() % 3 == 0) moved |= deliver();
        }
        if (all(BLOCK)) {
            for (unsigned i = 0; i < threads; ++i) lanes[i].state = READY;
            moved = true;
        }
        if (!moved && !deliver()) fail("deadlock");
    }
    if (!copies.empty()) fail("the block ended before its copies");
}
inline void refuse(int) { fail("memory that does not belong to a tensor, or not aligned"); }

}  // namespace emulated

inline emulated::Index blockIdx, blockDim;

namespace emulated {

struct Shape { int blocks, threads, shared; void* stream; };
template <class... Parameters, class... Arguments>
int launch(void (*function)(Parameters...), Shape shape, Arguments... arguments) {
    failure.clear(), random.seed(1);
    if (shape.threads > 1024 || shape.shared > static_cast<int>(MOST_SHARED)) fail("too many threads or too much shared memory");
    struct sigaction ours {}, before;
    ours.sa_handler = refuse;
    sigaction(SIGSEGV, &ours, &before);
    shared = shape.shared, blockDim.x = shape.threads;
    kernel = [=] { function(static_cast<Parameters>(arguments)...); };
    for (blockIdx.x = 0; blockIdx.x < static_cast<unsigned>(shape.blocks) && failure.empty(); ++blockIdx.x) run_block(shape.threads);
    sigaction(SIGSEGV, &before, nullptr);
    return !failure.empty();
}

}  // namespace emulated

extern "C" const char* emulated_failure() { return emulated::failure.c_str(); }

// CUDA's own functions, as far as the kernels call them.
using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0, cudaFuncAttributeMaxDynamicSharedMemorySize = 0, cudaLaunchAttributeProgrammaticStreamSerialization = 0;
struct cudaLaunchAttribute { int id; struct { int programmaticStreamSerializationAllowed; } val; };
struct cudaLaunchConfig_t { dim3 gridDim, blockDim; size_t dynamicSmemBytes; cudaStream_t stream; cudaLaunchAttribute* attrs; int numAttrs; };
template <class Kernel> int cudaFuncSetAttribute(Kernel, int, int) { return cudaSuccess; }
inline int cudaGetLastError() { return !emulated::failure.empty(); }
template <class... Parameters, class... Arguments>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*function)(Parameters...), Arguments... arguments) {
    return emulated::launch(function, {c->gridDim.x, c->blockDim.x, static_cast<int>(c->dynamicSmemBytes), c->stream}, arguments...);
}
inline void __syncwarp() { emulated::together(emulated::meet); }
inline void __syncthreads() { emulated::wait_for(emulated::BLOCK); }
template <class V> V __shfl_sync(unsigned, V value, int source) {
    static_assert(sizeof(V) == 4);
    emulated::now->in[0] = static_cast<uint32_t>(value), emulated::now->in[1] = source;
    emulated::together(emulated::shuffle);
    return static_cast<V>(emulated::now->out[0]);
}
inline bool __any_sync(unsigned, bool value) {
    emulated::now->in[0] = value;
    emulated::together(emulated::find_any);
    return emulated::now->out[0];
}
inline size_t __cvta_generic_to_shared(const void* at) { return static_cast<const unsigned char*>(at) - memory; }
inline float rsqrtf(float f) { return 1 / std::sqrt(f); }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t c) { return emulated::dot_two(a >> 16 & 255 | a >> 24 << 16, b >> 16, emulated::dot_two(a & 255 | (a >> 8 & 255) << 16, b, c)); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t by) { return (uint64_t{high} << 32 | low) >> by % 32; }
inline uint32_t __funnelshift_rc(uint32_t low, uint32_t high, uint32_t by) { return (uint64_t{high} << 32 | low) >> std::min(by, 32u); }
