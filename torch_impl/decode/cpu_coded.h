// y = x Wᵀ + b for a packed weight of codes and scales (torch_impl/packed.py: pack_codes). Part of cpu.cpp.
//
// The codes of a row, b bits each, become bytes in a small buffer; 8-bit codes are read where they are. For each bitmap word:
// expand the next codes to the columns whose bit is set and multiply them with that part of x. The sum of four words, 128
// columns, is multiplied by their scale. Paths: avx512bf16 (VPEXPANDB, codes as bfloat16, VDPBF16PS; cpu_coded_bf16.h), avx512
// (VPEXPANDB, float32 products), avx2 (a byte shuffle, float32 products), scalar.

constexpr int kAhead = 2048; // bytes of codes to prefetch ahead
constexpr int kBlock = 64;   // x is padded with zeros to whole blocks of columns; a vector load may read up to this many codes
constexpr uint64_t kBytes = 0x0101010101010101u;

struct CodedRow {
  const uint8_t* bitmap;
  int64_t words;
  const int8_t* codes; // at least 64 more may be read
  int bits;            // of a code before it became a byte
  const float* scales;
  const void* x;
  int64_t stride; // elements from one row of x to the next
};

// The codes of a row: `count` of b bits, from bit `start` of a stream of `bytes`.
struct Stream {
  const uint8_t* codes;
  int64_t bytes, start, count;
  int bits;
};

struct ScalarCodes {
  using Input = float;

  // The place of a column of x in the copy that `row` reads.
  static int64_t place(int64_t column) { return column; }

  static void convert(const Half* scales, int64_t count, float* to) {
    for (int64_t k = 0; k < count; k++) to[k] = static_cast<float>(load<Half>(scales + k));
  }

  template <int N>
  static void row(const CodedRow& in, float* y) {
    const int8_t* codes = in.codes;
    const float* x = static_cast<const float*>(in.x);
    float total[N] = {};
    for (int64_t first = 0; first < in.words; first += kWords) {
      float sum[N] = {};
      for (int64_t w = first; w < std::min(first + kWords, in.words); w++) {
        for (uint32_t mask = load<uint32_t>(in.bitmap + 4 * w); mask; mask &= mask - 1) {
          const float code = *codes++;
          const float* at = x + kColumns * w + __builtin_ctz(mask);
          for (int n = 0; n < N; n++) sum[n] += code * at[n * in.stride];
        }
      }
      for (int n = 0; n < N; n++) total[n] += in.scales[first / kWords] * sum[n];
    }
    std::copy(total, total + N, y);
  }

  static void widen(const Stream& in, int8_t* to) {
    for (int64_t k = 0; k < in.count; k++) {
      const int64_t bit = in.start + k * in.bits, byte = bit / 8;
      const uint32_t high = byte + 1 < in.bytes ? in.codes[byte + 1] : 0;
      const uint32_t code = (in.codes[byte] | high << 8) >> bit % 8 & ((1u << in.bits) - 1);
      const int sign = 1 << (in.bits - 1);
      to[k] = static_cast<int8_t>((static_cast<int>(code) ^ sign) - sign);
    }
  }
};

#if defined(__x86_64__)

// For every mask of 8 columns: the code of each column; 0xff where there is none.
struct SpreadBytes {
  alignas(8) uint8_t bytes[256][8];
  SpreadBytes() {
    for (int mask = 0; mask < 256; mask++) {
      for (int column = 0, next = 0; column < 8; column++) bytes[mask][column] = mask >> column & 1 ? next++ : 0xff;
    }
  }
};
const SpreadBytes spread_bytes;

struct Avx2Codes : ScalarCodes {
  AVX2 static void convert(const Half* scales, int64_t count, float* to) {
    for (int64_t k = 0; k < count; k++) to[k] = _cvtsh_ss(load<uint16_t>(scales + k));
  }

  // Eight codes at once: PDEP moves them to eight bytes.
  __attribute__((target("bmi2"))) static void widen(const Stream& in, int8_t* to) {
    const uint64_t mask = kBytes * ((1u << in.bits) - 1), sign = kBytes << (in.bits - 1);
    for (int64_t k = 0, start = in.start; k < in.count; k += 8, start += 8 * in.bits) {
      const int64_t at = start / 8;
      uint64_t fields = 0;
      if (at + 8 <= in.bytes) {
        fields = load<uint64_t>(in.codes + at);
      } else {
        std::memcpy(&fields, in.codes + at, in.bytes - at);
      }
      const uint64_t spread = _pdep_u64(fields >> start % 8, mask) ^ sign;
      // Subtract the sign from each byte; the highest bit, set meanwhile, keeps it from borrowing.
      const uint64_t codes = ((spread | kBytes << 7) - sign) ^ kBytes << 7;
      std::memcpy(to + k, &codes, 8);
    }
  }

  template <int N>
  AVX2 static void row(const CodedRow& in, float* y) {
    const int8_t* codes = in.codes;
    const float* x = static_cast<const float*>(in.x);
    __m256 total[N];
    for (auto& each : total) each = _mm256_setzero_ps();
    for (int64_t first = 0; first < in.words; first += kWords) {
      __m256 sum[N];
      for (auto& each : sum) each = _mm256_setzero_ps();
      const int64_t last = std::min(first + kWords, in.words);
      for (int64_t w = first; w < last; w++) {
        const uint32_t word = load<uint32_t>(in.bitmap + 4 * w);
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) {
          const uint32_t mask = word >> 8 * part & 0xff;
          const __m128i index = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(spread_bytes.bytes[mask]));
          const __m128i found = _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)), index);
          const __m256 weight = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(found));
          codes += __builtin_popcount(mask);
#pragma GCC unroll 8
          for (int n = 0; n < N; n++) {
            sum[n] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(x + n * in.stride + kColumns * w + 8 * part), sum[n]);
          }
        }
      }
      const __m256 scale = _mm256_set1_ps(in.scales[first / kWords]);
      for (int n = 0; n < N; n++) total[n] = _mm256_fmadd_ps(sum[n], scale, total[n]);
    }
    for (int n = 0; n < N; n++) {
      float parts[8];
      _mm256_storeu_ps(parts, total[n]);
      y[n] = ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
    }
  }
};

// Where 64 codes of b bits are in 8·b bytes: the bytes that hold eight codes, for each of them, and the place of each code there.
struct Fields {
  alignas(64) uint8_t bytes[9][64], places[9][64];
  Fields() {
    for (int bits = 0; bits < 9; bits++) {
      for (int k = 0; k < 64; k++) {
        bytes[bits][k] = k / 8 * bits + k % 8;
        places[bits][k] = k % 8 * bits;
      }
    }
  }
};
const Fields fields;

// 64 codes at once; with kSigned extended by their sign.
template <bool kSigned>
AVX512 void widen_512(const Stream& in, int8_t* to) {
  const __m512i bytes = _mm512_load_si512(fields.bytes[in.bits]);
  const __m512i places = _mm512_add_epi8(_mm512_load_si512(fields.places[in.bits]), _mm512_set1_epi8(in.start % 8));
  const __m512i mask = _mm512_set1_epi8((1 << in.bits) - 1), sign = _mm512_set1_epi8(1 << (in.bits - 1));
  const uint8_t* codes = in.codes + in.start / 8;
  int64_t left = in.bytes - in.start / 8;
  for (int64_t k = 0; k < in.count; k += 64, codes += 8 * in.bits, left -= 8 * in.bits) {
    _mm_prefetch(reinterpret_cast<const char*>(codes) + kAhead, _MM_HINT_T0);
    const __m512i loaded =
        left >= 64 ? _mm512_loadu_si512(codes) : _mm512_maskz_loadu_epi8((__mmask64{1} << left) - 1, codes);
    const __m512i eights = _mm512_permutexvar_epi8(bytes, loaded);
    __m512i found = _mm512_and_si512(_mm512_multishift_epi64_epi8(places, eights), mask);
    if (kSigned) found = _mm512_sub_epi8(_mm512_xor_si512(found, sign), sign);
    _mm512_storeu_si512(to + k, found);
  }
}

struct Avx512Codes : ScalarCodes {
  static void widen(const Stream& in, int8_t* to) { widen_512<true>(in, to); }

  AVX512 static void convert(const Half* scales, int64_t count, float* to) {
    for (int64_t k = 0; k < count; k += 16) {
      const __mmask16 some = count - k < 16 ? (1u << (count - k)) - 1 : 0xffff;
      _mm512_mask_storeu_ps(to + k, some, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, scales + k)));
    }
  }

  template <int N>
  AVX512 static inline void word(const CodedRow& in, int64_t w, const int8_t*& codes, __m512* sum, __m256i zeros) {
    const uint32_t mask = load<uint32_t>(in.bitmap + 4 * w);
    const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m256i found = _mm256_mask_expand_epi8(zeros, mask, loaded);
    codes += __builtin_popcount(mask);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(found)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(found, 1)));
    const float* x = static_cast<const float*>(in.x) + kColumns * w;
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      sum[n] = _mm512_fmadd_ps(low, _mm512_loadu_ps(x + n * in.stride), sum[n]);
      sum[n] = _mm512_fmadd_ps(high, _mm512_loadu_ps(x + n * in.stride + 16), sum[n]);
    }
  }

  template <int N>
  AVX512 static void row(const CodedRow& in, float* y) {
    const int8_t* codes = in.codes;
    const __m256i zeros = _mm512_castsi512_si256(hidden_zeros());
    __m512 total[N];
    for (auto& each : total) each = _mm512_setzero_ps();
    for (int64_t first = 0; first < in.words; first += kWords) {
      __m512 sum[N];
      for (auto& each : sum) each = _mm512_setzero_ps();
      _mm_prefetch(reinterpret_cast<const char*>(codes) + kAhead, _MM_HINT_T0);
      if (first + kWords <= in.words) {
#pragma GCC unroll 4
        for (int k = 0; k < kWords; k++) word<N>(in, first + k, codes, sum, zeros);
      } else {
        for (int64_t w = first; w < in.words; w++) word<N>(in, w, codes, sum, zeros);
      }
      const __m512 scale = _mm512_set1_ps(in.scales[first / kWords]);
      for (int n = 0; n < N; n++) total[n] = _mm512_fmadd_ps(sum[n], scale, total[n]);
    }
    for (int n = 0; n < N; n++) y[n] = _mm512_reduce_add_ps(total[n]);
  }
};

#endif

#include "cpu_coded_bf16.h"

using CodedFunction = void (*)(const CodedRow&, float*);

template <class Path>
CodedFunction coded_function(int64_t rows) {
  static constexpr CodedFunction functions[kRows] = {
      Path::template row<1>, Path::template row<2>, Path::template row<3>, Path::template row<4>,
      Path::template row<5>, Path::template row<6>, Path::template row<7>, Path::template row<8>};
  return functions[rows - 1];
}

// The packed weight of a call, checked.
struct Coded {
  const at::Tensor &bitmap, &codes, &scales, &offsets;
};

template <class Path, class T>
void coded_product(const at::Tensor& x, const Coded& weight, const T* bias, at::Tensor& y) {
  const int64_t columns = x.size(1), rows = weight.bitmap.size(0), width = weight.bitmap.size(1);
  const int64_t stride = (columns + kBlock - 1) / kBlock * kBlock, groups = weight.scales.size(1);
  const int64_t bytes = weight.codes.numel();
  const int bits = static_cast<int>(weight.codes.size(1));
  const auto* bitmap = static_cast<const uint8_t*>(weight.bitmap.const_data_ptr());
  const auto* codes = static_cast<const uint8_t*>(weight.codes.const_data_ptr());
  const auto* scales = static_cast<const Half*>(weight.scales.const_data_ptr());
  const auto* starts = static_cast<const int64_t*>(weight.offsets.const_data_ptr());
  const auto* from = static_cast<const T*>(x.const_data_ptr());
  auto* to = static_cast<T*>(y.mutable_data_ptr());
  follow_torch_threads();
  using Input = typename Path::Input;
  Aligned<Input> padded(std::min<int64_t>(x.size(0), kRows) * stride);
  for (int64_t first = 0; first < x.size(0); first += kRows) {
    const int64_t count = std::min<int64_t>(x.size(0) - first, kRows);
    for (int64_t n = 0; n < count; n++) {
      for (int64_t c = 0; c < columns; c++) {
        padded.data[n * stride + Path::place(c)] = static_cast<Input>(load<T>(from + (first + n) * columns + c));
      }
    }
    const CodedFunction function = coded_function<Path>(count);
    at::parallel_for(0, rows, std::max<int64_t>(1, 32768 / stride), [&](int64_t begin, int64_t end) {
      // A vector stores or loads up to 63 bytes more.
      Aligned<int8_t> buffer(stride + kBlock);
      std::vector<float> factors(groups);
      float sums[kRows];
      for (int64_t r = begin; r < end; r++) {
        const int64_t kept = starts[r + 1] - starts[r];
        const int8_t* row = buffer.data;
        if (bits < 8) {
          Path::widen({codes, bytes, starts[r] * bits, kept, bits}, buffer.data);
        } else if (bytes - starts[r + 1] < kBlock) {
          // Vector loads would read beyond the codes of the last rows.
          std::memcpy(buffer.data, codes + starts[r], kept);
        } else {
          row = reinterpret_cast<const int8_t*>(codes) + starts[r];
        }
        Path::convert(scales + r * groups, groups, factors.data());
        function({bitmap + r * width, width / 4, row, bits, factors.data(), padded.data, stride}, sums);
        for (int64_t n = 0; n < count; n++) {
          to[(first + n) * rows + r] = static_cast<T>(sums[n] + (bias ? static_cast<float>(load<T>(bias + r)) : 0.0f));
        }
      }
    });
  }
}

template <class T>
void dispatch_coded(const std::string& path, const at::Tensor& x, const Coded& weight,
                    const std::optional<at::Tensor>& bias, at::Tensor& y) {
  const T* b = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (path == "avx512bf16") {
      if (weight.codes.size(1) > CodeBytes::kNarrow) return coded_product<Avx512Bf16Codes<WideLookup>, T>(x, weight, b, y);
      return coded_product<Avx512Bf16Codes<NarrowLookup>, T>(x, weight, b, y);
    }
  }
  if (path == "avx512bf16" || path == "avx512") return coded_product<Avx512Codes, T>(x, weight, b, y);
  if (path == "avx2") return coded_product<Avx2Codes, T>(x, weight, b, y);
#endif
  return coded_product<ScalarCodes, T>(x, weight, b, y);
}

at::Tensor linear_coded(const at::Tensor& x, const at::Tensor& bitmap, const at::Tensor& codes, const at::Tensor& scales,
                        const at::Tensor& offsets, const std::optional<at::Tensor>& bias, const std::string& path) {
  check_codes(codes, scales, check_product(x, bitmap, offsets, bias, path), bitmap.size(0), x.size(1));
  at::Tensor y = at::empty({x.size(0), bitmap.size(0)}, x.options());
  const Coded weight{bitmap, codes, scales, offsets};
  switch (x.scalar_type()) {
    case at::kBFloat16: dispatch_coded<BFloat16>(path, x, weight, bias, y); break;
    case at::kHalf: dispatch_coded<Half>(path, x, weight, bias, y); break;
    case at::kFloat: dispatch_coded<float>(path, x, weight, bias, y); break;
    default: TORCH_CHECK_TYPE(false, "x has dtype ", x.scalar_type(), "; allowed: BFloat16, Half, Float");
  }
  return y;
}
