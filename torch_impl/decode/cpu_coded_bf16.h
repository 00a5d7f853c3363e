// Rows of codes times bfloat16 with VDPBF16PS. Part of cpu_coded.h.
//
// 64 columns at a time: VPEXPANDB puts the next codes at the columns whose bit is set, two look-ups turn each code into the
// low and the high byte of the bfloat16 that equals it, and interleaving the bytes of each 16 columns gives the numbers of
// columns 0 to 7 and of columns 8 to 15. So x is stored in that order: of 64 columns first the four lower eights.

#if defined(__x86_64__)

// The bytes of the bfloat16 of each code: of codes of up to kNarrow bits by their bits, of wider codes by their size.
struct CodeBytes {
  static constexpr int kNarrow = 6;
  alignas(64) uint8_t low[kNarrow + 1][64], high[kNarrow + 1][64];
  alignas(64) uint8_t low_of_size[128], high_of_size[128];

  CodeBytes() {
    for (int bits = 0; bits <= kNarrow; bits++) {
      for (int field = 0; field < 64; field++) {
        const int sign = 1 << bits >> 1;
        fill((field ^ sign) - sign, low[bits] + field, high[bits] + field);
      }
    }
    for (int size = 0; size < 128; size++) fill(size, low_of_size + size, high_of_size + size);
  }

  static void fill(int code, uint8_t* low, uint8_t* high) {
    const uint16_t bits = BFloat16(static_cast<float>(code)).x;
    *low = bits & 0xff;
    *high = bits >> 8;
  }
};
const CodeBytes code_bytes;

// Both bytes of 64 numbers, apart.
struct Halves {
  __m512i low, high;
};

struct NarrowLookup {
  __m512i low, high;

  AVX512 explicit NarrowLookup(int bits)
      : low(_mm512_load_si512(code_bytes.low[bits])), high(_mm512_load_si512(code_bytes.high[bits])) {}

  AVX512 inline Halves operator()(__m512i codes) const {
    return {_mm512_permutexvar_epi8(codes, low), _mm512_permutexvar_epi8(codes, high)};
  }
};

struct WideLookup {
  __m512i low[2], high[2], sign;

  AVX512 explicit WideLookup(int) : sign(_mm512_set1_epi8(-128)) {
    for (int k = 0; k < 2; k++) {
      low[k] = _mm512_load_si512(code_bytes.low_of_size + 64 * k);
      high[k] = _mm512_load_si512(code_bytes.high_of_size + 64 * k);
    }
  }

  AVX512 inline Halves operator()(__m512i codes) const {
    const __m512i size = _mm512_abs_epi8(codes);
    const __m512i top = _mm512_permutex2var_epi8(high[0], size, high[1]);
    constexpr int kFirstOrBoth = 0xf8; // top | (codes & sign)
    return {_mm512_permutex2var_epi8(low[0], size, low[1]), _mm512_ternarylogic_epi64(top, codes, sign, kFirstOrBoth)};
  }
};

template <class Lookup>
struct Avx512Bf16Codes {
  using Input = BFloat16;
  static constexpr bool kSigned = std::is_same_v<Lookup, WideLookup>;

  static int64_t place(int64_t column) {
    return (column & ~63) | (column & 8) << 2 | (column & 48) >> 1 | (column & 7);
  }

  static void widen(const Stream& in, int8_t* to) { widen_512<kSigned>(in, to); }

  static void convert(const Half* scales, int64_t count, float* to) { Avx512Codes::convert(scales, count, to); }

  template <int N>
  AVX512BF16 static inline void block(uint64_t mask, const Lookup& lookup, const int8_t*& codes, const BFloat16* x,
                                      int64_t stride, __m512i zeros, __m512* sum) {
    const Halves found = lookup(_mm512_mask_expand_epi8(zeros, mask, _mm512_loadu_si512(codes)));
    _mm_prefetch(reinterpret_cast<const char*>(codes) + kAhead, _MM_HINT_T0);
    codes += __builtin_popcountll(mask);
    const auto lower = (__m512bh)_mm512_unpacklo_epi8(found.low, found.high);
    const auto upper = (__m512bh)_mm512_unpackhi_epi8(found.low, found.high);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      const BFloat16* at = x + n * stride;
      sum[n] = _mm512_dpbf16_ps(sum[n], lower, (__m512bh)_mm512_load_si512(at));
      sum[n] = _mm512_dpbf16_ps(sum[n], upper, (__m512bh)_mm512_load_si512(at + kColumns));
    }
  }

  template <int N>
  AVX512BF16 static void row(const CodedRow& in, float* y) {
    const int8_t* codes = in.codes;
    const auto* x = static_cast<const BFloat16*>(in.x);
    const __m512i zeros = hidden_zeros();
    const Lookup lookup(in.bits);
    __m512 total[N];
    std::fill(total, total + N, _mm512_setzero_ps());
    for (int64_t first = 0; first < in.words; first += kWords) {
      __m512 sum[N];
      std::fill(sum, sum + N, _mm512_setzero_ps());
      const uint8_t* masks = in.bitmap + 4 * first;
      if (first + kWords <= in.words) {
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
          const BFloat16* at = x + kColumns * first + kBlock * k;
          block<N>(load<uint64_t>(masks + 8 * k), lookup, codes, at, in.stride, zeros, sum);
        }
      } else {
        for (int64_t w = first; w < in.words; w += 2, masks += 8) {
          const uint64_t mask = w + 1 < in.words ? load<uint64_t>(masks) : load<uint32_t>(masks);
          block<N>(mask, lookup, codes, x + kColumns * w, in.stride, zeros, sum);
        }
      }
      const __m512 scale = _mm512_set1_ps(in.scales[first / kWords]);
      for (int n = 0; n < N; n++) total[n] = _mm512_fmadd_ps(sum[n], scale, total[n]);
    }
    for (int n = 0; n < N; n++) y[n] = _mm512_reduce_add_ps(total[n]);
  }
};

#endif
