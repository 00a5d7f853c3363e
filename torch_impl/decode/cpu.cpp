// y = x Wᵀ + b for a packed weight W (torch_impl/packed.py) and a few rows of x, without unpacking W in memory.
//
// For each row of W and each bitmap word (32 columns): load the next values, expand them to the columns whose bit is set,
// and multiply them with that part of x. The number of set bits gives the start of the next values. Sums are float32.
// Paths, fastest first: avx512bf16 (VPEXPANDW, VDPBF16PS), avx512 (VPEXPANDW, FMA), avx2 (a shuffle from a table of all
// 256 masks), scalar (a loop over set bits).

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using c10::BFloat16;
using c10::Half;

constexpr int kRows = 8;     // rows of x per pass over W
constexpr int kLine = 64;    // bytes of a cache line
constexpr int kColumns = 32; // columns per bitmap word; a vector load may read up to this many values too many
constexpr int kWords = 4;    // bitmap words per scale of codes

// Addresses may be unaligned.
template <class T>
inline T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

// One row of W: its words, its values (at least 32 more may be read), x padded with zeros to whole words.
struct Row {
  const uint8_t* bitmap;
  int64_t words;
  const void* values;
  const void* x;
  int64_t stride; // elements from one row of x to the next
};

// Zeros to be filled, from the start of a cache line on: aligned vectors do not cross two lines.
template <class T>
struct Aligned {
  std::vector<T> memory;
  T* data;

  explicit Aligned(int64_t size) : memory(size + kLine / sizeof(T)) {
    const auto past = reinterpret_cast<uintptr_t>(memory.data()) % kLine;
    data = memory.data() + (past ? kLine - past : 0) / sizeof(T);
  }
};

struct Scalar {
  template <class T>
  using Input = float;

  template <class T, int N>
  static void row(const Row& in, float* y) {
    const T* values = static_cast<const T*>(in.values);
    const float* x = static_cast<const float*>(in.x);
    float sum[N] = {};
    for (int64_t w = 0; w < in.words; w++) {
      for (uint32_t mask = load<uint32_t>(in.bitmap + 4 * w); mask; mask &= mask - 1) {
        const float value = static_cast<float>(load<T>(values++));
        const float* at = x + kColumns * w + __builtin_ctz(mask);
        for (int n = 0; n < N; n++) sum[n] += value * at[n * in.stride];
      }
    }
    std::copy(sum, sum + N, y);
  }
};

#if defined(__x86_64__)

#define AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt")))
#define AVX512BF16 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512bf16,avx2,fma,f16c,popcnt")))

// For every mask of 8 columns: the value of each column; 0xff where there is none (a byte shuffle makes that 0).
struct Spread {
  alignas(16) uint8_t halves[256][16]; // 2-byte values
  alignas(32) int32_t lanes[256][8];   // 4-byte values; negative where none
  Spread() {
    for (int mask = 0; mask < 256; mask++) {
      for (int column = 0, next = 0; column < 8; column++) {
        const bool kept = mask >> column & 1;
        halves[mask][2 * column] = kept ? 2 * next : 0xff;
        halves[mask][2 * column + 1] = kept ? 2 * next + 1 : 0xff;
        lanes[mask][column] = kept ? next : -1;
        next += kept;
      }
    }
  }
};
const Spread spread;

struct Avx2 {
  template <class T>
  using Input = float;

  // Expand the next values to the 8 columns of `mask`, as float32.
  template <class T>
  AVX2 static inline __m256 take(uint32_t mask, const T* values) {
    if constexpr (std::is_same_v<T, float>) {
      const __m256i index = _mm256_load_si256(reinterpret_cast<const __m256i*>(spread.lanes[mask]));
      const __m256 found = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), index);
      return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(index, 31)), found);
    } else {
      const __m128i index = _mm_load_si128(reinterpret_cast<const __m128i*>(spread.halves[mask]));
      const __m128i found = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)), index);
      if constexpr (std::is_same_v<T, Half>) {
        return _mm256_cvtph_ps(found);
      } else {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(found), 16));
      }
    }
  }

  template <class T, int N>
  AVX2 static void row(const Row& in, float* y) {
    const T* values = static_cast<const T*>(in.values);
    const float* x = static_cast<const float*>(in.x);
    constexpr int kSums = N == 1 ? 4 : 1; // independent sums hide the latency of one
    __m256 sum[N * kSums];
    for (auto& each : sum) each = _mm256_setzero_ps();
    for (int64_t w = 0; w < in.words; w++) {
      const uint32_t word = load<uint32_t>(in.bitmap + 4 * w);
#pragma GCC unroll 4
      for (int part = 0; part < 4; part++) {
        const uint32_t mask = word >> 8 * part & 0xff;
        const __m256 weight = take<T>(mask, values);
        values += __builtin_popcount(mask);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
          __m256& to = sum[n * kSums + part % kSums];
          to = _mm256_fmadd_ps(weight, _mm256_loadu_ps(x + n * in.stride + kColumns * w + 8 * part), to);
        }
      }
    }
    for (int n = 0; n < N; n++) {
      __m256 all = sum[n * kSums];
      for (int k = 1; k < kSums; k++) all = _mm256_add_ps(all, sum[n * kSums + k]);
      float parts[8];
      _mm256_storeu_ps(parts, all);
      y[n] = ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
    }
  }
};

// Zeros that the compiler cannot recognise as zeros, so that it uses the merging form of VPEXPAND. On Zen 4 the merging
// form and the code after it take 1.0 ns per word, the zeroing form 1.8 ns.
AVX512 inline __m512i hidden_zeros() {
  __m512i zeros = _mm512_setzero_si512();
  __asm__("" : "+v"(zeros));
  return zeros;
}

struct Avx512 {
  template <class T>
  using Input = float;

  // Expand the next values to the 16 columns of `mask`, as float32.
  template <class T>
  AVX512 static inline __m512 take(uint32_t mask, const T* values, __m512i zeros) {
    const auto bits = static_cast<__mmask16>(mask);
    if constexpr (std::is_same_v<T, float>) {
      return _mm512_mask_expand_ps(_mm512_castsi512_ps(zeros), bits, _mm512_loadu_ps(values));
    } else {
      const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
      const __m256i found = _mm256_mask_expand_epi16(_mm512_castsi512_si256(zeros), bits, loaded);
      if constexpr (std::is_same_v<T, Half>) {
        return _mm512_cvtph_ps(found);
      } else {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(found), 16));
      }
    }
  }

  template <class T, int N>
  AVX512 static void row(const Row& in, float* y) {
    const T* values = static_cast<const T*>(in.values);
    const float* x = static_cast<const float*>(in.x);
    constexpr int kSums = N <= 2 ? 2 : 1;
    __m512 sum[N * kSums];
    for (auto& each : sum) each = _mm512_setzero_ps();
    const __m512i zeros = hidden_zeros();
    for (int64_t w = 0; w < in.words; w++) {
      const uint32_t word = load<uint32_t>(in.bitmap + 4 * w);
#pragma GCC unroll 2
      for (int part = 0; part < 2; part++) {
        const uint32_t mask = word >> 16 * part & 0xffff;
        const __m512 weight = take<T>(mask, values, zeros);
        values += __builtin_popcount(mask);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
          __m512& to = sum[n * kSums + part % kSums];
          to = _mm512_fmadd_ps(weight, _mm512_loadu_ps(x + n * in.stride + kColumns * w + 16 * part), to);
        }
      }
    }
    for (int n = 0; n < N; n++) {
      __m512 all = sum[n * kSums];
      if (kSums == 2) all = _mm512_add_ps(all, sum[n * kSums + 1]);
      y[n] = _mm512_reduce_add_ps(all);
    }
  }
};

struct Avx512Bf16 {
  template <class T>
  using Input = BFloat16;

  template <int N>
  AVX512BF16 static inline void word(const Row& in, int64_t w, const BFloat16*& values, __m512* sum, __m512i zeros) {
    const uint32_t mask = load<uint32_t>(in.bitmap + 4 * w);
    const __m512i weight = _mm512_mask_expand_epi16(zeros, mask, _mm512_loadu_si512(values));
    values += __builtin_popcount(mask);
    const BFloat16* x = static_cast<const BFloat16*>(in.x) + kColumns * w;
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      sum[n] = _mm512_dpbf16_ps(sum[n], (__m512bh)weight, (__m512bh)_mm512_loadu_si512(x + n * in.stride));
    }
  }

  template <class T, int N>
  AVX512BF16 static void row(const Row& in, float* y) {
    const BFloat16* values = static_cast<const BFloat16*>(in.values);
    constexpr int kSums = N == 1 ? 4 : N <= 4 ? 2 : 1;
    __m512 sum[kSums][N];
    for (auto& each : sum) std::fill(each, each + N, _mm512_setzero_ps());
    const __m512i zeros = hidden_zeros();
    int64_t w = 0;
    for (; w + kSums <= in.words; w += kSums) {
      // Prefetch far enough ahead to reach the next rows; a prefetch beyond the end is ignored.
      _mm_prefetch(reinterpret_cast<const char*>(values) + 2048, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(values) + 2112, _MM_HINT_T0);
#pragma GCC unroll 4
      for (int k = 0; k < kSums; k++) word<N>(in, w + k, values, sum[k], zeros);
    }
    for (; w < in.words; w++) word<N>(in, w, values, sum[0], zeros);
    for (int n = 0; n < N; n++) {
      for (int k = 1; k < kSums; k++) sum[0][n] = _mm512_add_ps(sum[0][n], sum[k][n]);
      y[n] = _mm512_reduce_add_ps(sum[0][n]);
    }
  }
};

#endif

// This library has its own OpenMP runtime: use as many threads as torch.
void follow_torch_threads() {
#ifdef _OPENMP
  omp_set_num_threads(at::get_num_threads());
#endif
}

// The number of parts that run in parallel.
int64_t threads() {
  follow_torch_threads();
  std::atomic<int64_t> parts{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { parts++; });
  return parts;
}

using RowFunction = void (*)(const Row&, float*);

template <class Path, class T>
RowFunction row_function(int64_t rows) {
  static constexpr RowFunction functions[kRows] = {
      Path::template row<T, 1>, Path::template row<T, 2>, Path::template row<T, 3>, Path::template row<T, 4>,
      Path::template row<T, 5>, Path::template row<T, 6>, Path::template row<T, 7>, Path::template row<T, 8>};
  return functions[rows - 1];
}

template <class Path, class T>
void product(const at::Tensor& x, const at::Tensor& bitmap, const at::Tensor& values, const at::Tensor& offsets,
             const T* bias, at::Tensor& y) {
  using Input = typename Path::template Input<T>;
  const int64_t columns = x.size(1), rows = bitmap.size(0), words = bitmap.size(1) / 4, stride = words * kColumns;
  const auto* bits = static_cast<const uint8_t*>(bitmap.const_data_ptr());
  const auto* kept = static_cast<const T*>(values.const_data_ptr());
  const auto* starts = static_cast<const int64_t*>(offsets.const_data_ptr());
  const auto* from = static_cast<const T*>(x.const_data_ptr());
  auto* to = static_cast<T*>(y.mutable_data_ptr());
  follow_torch_threads();
  Aligned<Input> padded(std::min<int64_t>(x.size(0), kRows) * stride);
  for (int64_t first = 0; first < x.size(0); first += kRows) {
    const int64_t count = std::min<int64_t>(x.size(0) - first, kRows);
    for (int64_t n = 0; n < count; n++) {
      for (int64_t c = 0; c < columns; c++) {
        padded.data[n * stride + c] = static_cast<Input>(load<T>(from + (first + n) * columns + c));
      }
    }
    const RowFunction function = row_function<Path, T>(count);
    // Waking a thread pays off from about 30,000 positions on.
    at::parallel_for(0, rows, std::max<int64_t>(1, 32768 / stride), [&](int64_t begin, int64_t end) {
      std::vector<T> copy;
      float sums[kRows];
      for (int64_t r = begin; r < end; r++) {
        const T* row = kept + starts[r];
        // Vector loads would read beyond the values of the last rows, so copy those rows with padding.
        if (starts[rows] - starts[r + 1] < kColumns) {
          copy.assign(starts[r + 1] - starts[r] + kColumns, T(0));
          std::memcpy(copy.data(), row, (starts[r + 1] - starts[r]) * sizeof(T));
          row = copy.data();
        }
        function({bits + r * bitmap.size(1), words, row, padded.data, stride}, sums);
        for (int64_t n = 0; n < count; n++) {
          to[(first + n) * rows + r] = static_cast<T>(sums[n] + (bias ? static_cast<float>(load<T>(bias + r)) : 0.0f));
        }
      }
    });
  }
}

std::vector<std::string> paths() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vbmi2");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found.emplace_back("avx512bf16");
  if (avx512) found.emplace_back("avx512");
  if (avx2) found.emplace_back("avx2");
#endif
  found.emplace_back("scalar");
  return found;
}

template <class T>
void dispatch(const std::string& path, const at::Tensor& x, const at::Tensor& bitmap, const at::Tensor& values,
              const at::Tensor& offsets, const std::optional<at::Tensor>& bias, at::Tensor& y) {
  const T* b = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (path == "avx512bf16") return product<Avx512Bf16, T>(x, bitmap, values, offsets, b, y);
  }
  if (path == "avx512bf16" || path == "avx512") return product<Avx512, T>(x, bitmap, values, offsets, b, y);
  if (path == "avx2") return product<Avx2, T>(x, bitmap, values, offsets, b, y);
#endif
  return product<Scalar, T>(x, bitmap, values, offsets, b, y);
}

// Check what all packed weights have; return the number of kept values.
int64_t check_positions(const at::Tensor& bitmap, const at::Tensor& offsets, int64_t columns, const std::string& path) {
  const auto known = paths();
  TORCH_CHECK_VALUE(std::find(known.begin(), known.end(), path) != known.end(), "path is ", path, "; allowed: ", known);
  TORCH_CHECK_VALUE(bitmap.dim() == 2 && bitmap.size(1) == (columns + 31) / 32 * 4, "bitmap has shape ", bitmap.sizes(),
                    ", which does not match ", columns, " columns");
  TORCH_CHECK_TYPE(bitmap.scalar_type() == at::kByte && offsets.scalar_type() == at::kLong, "bitmap has dtype ",
                   bitmap.scalar_type(), ", offsets ", offsets.scalar_type(), "; allowed: Byte and Long");
  for (const auto& each : {bitmap, offsets}) {
    TORCH_CHECK_VALUE(each.is_contiguous() && each.is_cpu(), "an argument is not contiguous or not on the CPU");
  }
  const int64_t rows = bitmap.size(0);
  TORCH_CHECK_VALUE(offsets.numel() == rows + 1, "offsets has ", offsets.numel(), " entries; allowed: ", rows + 1);
  return static_cast<const int64_t*>(offsets.const_data_ptr())[rows];
}

// Check codes and scales; kept: the number of codes.
void check_codes(const at::Tensor& codes, const at::Tensor& scales, int64_t kept, int64_t rows, int64_t columns) {
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kByte && scales.scalar_type() == at::kHalf, "codes has dtype ",
                   codes.scalar_type(), ", scales ", scales.scalar_type(), "; allowed: Byte and Half");
  const int64_t groups = (columns + kWords * kColumns - 1) / (kWords * kColumns);
  TORCH_CHECK_VALUE(scales.dim() == 2 && scales.size(0) == rows && scales.size(1) == groups, "scales has shape ",
                    scales.sizes(), "; allowed: ", rows, ", ", groups);
  for (const auto& each : {codes, scales}) {
    TORCH_CHECK_VALUE(each.is_contiguous() && each.is_cpu(), "an argument is not contiguous or not on the CPU");
  }
  TORCH_CHECK_VALUE(codes.dim() == 2 && codes.size(0) == (kept + 7) / 8 && codes.size(1) >= 2 && codes.size(1) <= 8,
                    "codes has shape ", codes.sizes(), "; allowed: ", (kept + 7) / 8, ", 2 to 8");
}

// Check what all products have; return the number of kept values.
int64_t check_product(const at::Tensor& x, const at::Tensor& bitmap, const at::Tensor& offsets,
                      const std::optional<at::Tensor>& bias, const std::string& path) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.is_contiguous() && x.is_cpu(), "x has shape ", x.sizes(),
                    "; allowed: (rows, in), contiguous, on the CPU");
  const int64_t kept = check_positions(bitmap, offsets, x.size(1), path), rows = bitmap.size(0);
  TORCH_CHECK_TYPE(!bias || bias->scalar_type() == x.scalar_type(), "x has dtype ", x.scalar_type(),
                   "; allowed: the dtype of bias");
  TORCH_CHECK_VALUE(!bias || (bias->numel() == rows && bias->is_contiguous()), "bias has ", bias->sizes(),
                    " entries; allowed: ", rows);
  return kept;
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& bitmap, const at::Tensor& values, const at::Tensor& offsets,
                  const std::optional<at::Tensor>& bias, const std::string& path) {
  const int64_t last = check_product(x, bitmap, offsets, bias, path);
  TORCH_CHECK_TYPE(x.scalar_type() == values.scalar_type(), "x has dtype ", x.scalar_type(),
                   "; allowed: the dtype of values and bias, ", values.scalar_type());
  TORCH_CHECK_VALUE(values.is_contiguous() && values.is_cpu(), "an argument is not contiguous or not on the CPU");
  TORCH_CHECK_VALUE(last == values.numel(), "values has ", values.numel(), " entries; allowed: ", last);
  at::Tensor y = at::empty({x.size(0), bitmap.size(0)}, x.options());
  switch (x.scalar_type()) {
    case at::kBFloat16: dispatch<BFloat16>(path, x, bitmap, values, offsets, bias, y); break;
    case at::kHalf: dispatch<Half>(path, x, bitmap, values, offsets, bias, y); break;
    case at::kFloat: dispatch<float>(path, x, bitmap, values, offsets, bias, y); break;
    default: TORCH_CHECK_TYPE(false, "x has dtype ", x.scalar_type(), "; allowed: BFloat16, Half, Float");
  }
  return y;
}

#include "cpu_coded.h"
#include "cpu_unpack.h"

// A product for x (..., in): in Python two views take as long as the product of a small weight.
template <auto product>
struct AnyShape;
template <class... Arguments, at::Tensor (*product)(const at::Tensor&, Arguments...)>
struct AnyShape<product> {
  static at::Tensor call(const at::Tensor& x, Arguments... arguments) {
    if (x.dim() == 2 && x.is_contiguous()) return product(x, arguments...);
    TORCH_CHECK_VALUE(x.dim() > 0, "x has no dimension; allowed: (..., in)");
    const at::Tensor y = product(x.reshape({-1, x.size(-1)}).contiguous(), arguments...);
    at::DimVector sizes(x.sizes());
    sizes.back() = y.size(1);
    return y.view(sizes);
  }
};

}  // namespace

TORCH_LIBRARY(losa_cpu_decode, library) {
  library.def("paths() -> str[]", &paths);
  library.def("threads() -> int", &threads);
  library.def("linear(Tensor x, Tensor bitmap, Tensor values, Tensor offsets, Tensor? bias, str path) -> Tensor",
              &AnyShape<&linear>::call);
  library.def("linear_coded(Tensor x, Tensor bitmap, Tensor codes, Tensor scales, Tensor offsets, Tensor? bias, str path) "
              "-> Tensor",
              &AnyShape<&linear_coded>::call);
  library.def("unpack_(Tensor(a!) weight, Tensor bitmap, Tensor values, Tensor offsets, int first, str path) -> ()", &unpack_);
  library.def("unpack_coded_(Tensor(a!) weight, Tensor bitmap, Tensor codes, Tensor scales, Tensor offsets, int first, "
              "str path) -> ()",
              &unpack_coded_);
}
