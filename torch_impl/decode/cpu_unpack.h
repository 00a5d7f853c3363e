// The dense weight of a packed one, for prompts: bitmap and values, or codes and scales (torch_impl/packed.py). Part of cpu.cpp.
//
// Paths: avx512 (VPEXPANDW, VPEXPANDD, VPEXPANDB: 32 columns at once) and scalar (a loop over set bits). Both write what
// packed.expand and packed.expand_coded return, bit for bit.

struct ScalarUnpack {
  using Codes = ScalarCodes;

  // Write one row of values, as their bits, to whole words of columns.
  template <class Bits>
  static void row(const uint8_t* bitmap, int64_t words, const Bits* values, Bits* to) {
    std::fill(to, to + words * kColumns, Bits(0));
    for (int64_t w = 0; w < words; w++) {
      for (uint32_t mask = load<uint32_t>(bitmap + 4 * w); mask; mask &= mask - 1) {
        to[kColumns * w + __builtin_ctz(mask)] = load<Bits>(values++);
      }
    }
  }

  template <class T>
  static void coded_row(const uint8_t* bitmap, int64_t words, const int8_t* codes, const float* scales, T* to) {
    std::fill(to, to + words * kColumns, T(0));
    for (int64_t w = 0; w < words; w++) {
      for (uint32_t mask = load<uint32_t>(bitmap + 4 * w); mask; mask &= mask - 1) {
        to[kColumns * w + __builtin_ctz(mask)] = static_cast<T>(scales[w / kWords] * *codes++);
      }
    }
  }
};

#if defined(__x86_64__)

struct Avx512Unpack {
  using Codes = Avx512Codes;

  template <class Bits>
  AVX512 static void row(const uint8_t* bitmap, int64_t words, const Bits* values, Bits* to) {
    const __m512i zeros = hidden_zeros();
    for (int64_t w = 0; w < words; w++, to += kColumns) {
      const uint32_t mask = load<uint32_t>(bitmap + 4 * w);
      if constexpr (sizeof(Bits) == 2) {
        _mm512_storeu_si512(to, _mm512_mask_expand_epi16(zeros, mask, _mm512_loadu_si512(values)));
      } else {
        const __mmask16 low = mask & 0xffff;
        const Bits* next = values + __builtin_popcount(low);
        _mm512_storeu_si512(to, _mm512_mask_expand_epi32(zeros, low, _mm512_loadu_si512(values)));
        _mm512_storeu_si512(to + 16, _mm512_mask_expand_epi32(zeros, mask >> 16, _mm512_loadu_si512(next)));
      }
      values += __builtin_popcount(mask);
    }
  }

  // Store 16 numbers, rounded to the nearest, ties to even. None is NaN.
  template <class T>
  AVX512 static inline void store(T* to, __m512 numbers) {
    if constexpr (std::is_same_v<T, float>) {
      _mm512_storeu_ps(to, numbers);
    } else if constexpr (std::is_same_v<T, Half>) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(numbers, _MM_FROUND_TO_NEAREST_INT));
    } else {
      const __m512i bits = _mm512_castps_si512(numbers);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
    }
  }

  template <class T>
  AVX512 static void coded_row(const uint8_t* bitmap, int64_t words, const int8_t* codes, const float* scales, T* to) {
    const __m256i zeros = _mm512_castsi512_si256(hidden_zeros());
    for (int64_t w = 0; w < words; w++, to += kColumns) {
      const uint32_t mask = load<uint32_t>(bitmap + 4 * w);
      const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
      const __m256i found = _mm256_mask_expand_epi8(zeros, mask, loaded);
      const __m512 scale = _mm512_set1_ps(scales[w / kWords]);
      const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(found)));
      const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(found, 1)));
      store(to, _mm512_mul_ps(low, scale));
      store(to + 16, _mm512_mul_ps(high, scale));
      codes += __builtin_popcount(mask);
    }
  }
};

struct Avx512Bf16Unpack : Avx512Unpack {
  using Avx512Unpack::coded_row;

  // One instruction rounds 32 numbers. It takes subnormal ones for zero, which no code times a float16 is.
  AVX512BF16 static void coded_row(const uint8_t* bitmap, int64_t words, const int8_t* codes, const float* scales,
                                   BFloat16* to) {
    const __m256i zeros = _mm512_castsi512_si256(hidden_zeros());
    for (int64_t w = 0; w < words; w++, to += kColumns) {
      const uint32_t mask = load<uint32_t>(bitmap + 4 * w);
      _mm_prefetch(reinterpret_cast<const char*>(codes) + kAhead, _MM_HINT_T0);
      const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
      const __m256i found = _mm256_mask_expand_epi8(zeros, mask, loaded);
      const __m512 scale = _mm512_set1_ps(scales[w / kWords]);
      const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(found)));
      const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(found, 1)));
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, scale), _mm512_mul_ps(low, scale));
      std::memcpy(to, &both, sizeof both);
      codes += __builtin_popcount(mask);
    }
  }
};

#endif

// Call write(row, to) for the rows of a packed weight from `first` on that `weight` has room for, in parallel. It writes whole
// words of columns; what is beyond the columns is dropped.
template <class T, class Write>
void unpack_rows(at::Tensor& weight, int64_t first, int64_t words, const Write& write) {
  const int64_t columns = weight.size(1), width = words * kColumns;
  auto* to = static_cast<T*>(weight.mutable_data_ptr());
  follow_torch_threads();
  at::parallel_for(0, weight.size(0), std::max<int64_t>(1, 32768 / width), [&](int64_t begin, int64_t end) {
    std::vector<T> whole(width == columns ? 0 : width);
    for (int64_t r = begin; r < end; r++) {
      if (width == columns) {
        write(first + r, to + r * columns);
      } else {
        write(first + r, whole.data());
        std::memcpy(to + r * columns, whole.data(), columns * sizeof(T));
      }
    }
  });
}

// A row of `kept` numbers at `from`, behind which `left` more are, or a copy behind which 64 may be read.
template <class T>
const T* readable(const T* from, int64_t kept, int64_t left, std::vector<T>& copy) {
  if (left >= kBlock) return from;
  copy.assign(kept + kBlock, T(0));
  std::memcpy(copy.data(), from, kept * sizeof(T));
  return copy.data();
}

template <class Path, class Bits>
void unpack_values(const at::Tensor& bitmap, const at::Tensor& values, const int64_t* starts, int64_t first,
                   at::Tensor& weight) {
  const int64_t rows = bitmap.size(0), words = bitmap.size(1) / 4;
  const auto* bits = static_cast<const uint8_t*>(bitmap.const_data_ptr());
  const auto* kept = static_cast<const Bits*>(values.const_data_ptr());
  unpack_rows<Bits>(weight, first, words, [&](int64_t r, Bits* to) {
    std::vector<Bits> copy;
    const Bits* row = readable(kept + starts[r], starts[r + 1] - starts[r], starts[rows] - starts[r + 1], copy);
    Path::template row<Bits>(bits + 4 * words * r, words, row, to);
  });
}

template <class Path, class T>
void unpack_codes(const Coded& packed, int64_t first, at::Tensor& weight) {
  const int64_t words = packed.bitmap.size(1) / 4, groups = packed.scales.size(1), bytes = packed.codes.numel();
  const int bits = static_cast<int>(packed.codes.size(1));
  const auto* bitmap = static_cast<const uint8_t*>(packed.bitmap.const_data_ptr());
  const auto* codes = static_cast<const uint8_t*>(packed.codes.const_data_ptr());
  const auto* scales = static_cast<const Half*>(packed.scales.const_data_ptr());
  const auto* starts = static_cast<const int64_t*>(packed.offsets.const_data_ptr());
  unpack_rows<T>(weight, first, words, [&](int64_t r, T* to) {
    const int64_t kept = starts[r + 1] - starts[r];
    std::vector<int8_t> wide;
    const auto* row = reinterpret_cast<const int8_t*>(codes + starts[r]);
    if (bits < 8 || starts[r + 1] + kBlock > bytes) {
      // A vector stores or loads up to 63 bytes more.
      wide.resize(kept + 2 * kBlock);
      Path::Codes::widen({codes, bytes, starts[r] * bits, kept, bits}, wide.data());
      row = wide.data();
    }
    std::vector<float> factors(groups);
    Path::Codes::convert(scales + r * groups, groups, factors.data());
    Path::coded_row(bitmap + 4 * words * r, words, row, factors.data(), to);
  });
}

// Call work(path) with the path that a name stands for.
template <class Work>
void with_unpack_path(const std::string& path, const Work& work) {
#if defined(__x86_64__)
  if (path == "avx512bf16") return work(Avx512Bf16Unpack());
  if (path == "avx512") return work(Avx512Unpack());
#endif
  work(ScalarUnpack());
}

// Check the place for some rows.
void check_place(const at::Tensor& weight, const at::Tensor& bitmap, int64_t first) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.is_contiguous() && weight.is_cpu() && first >= 0 &&
                        first + weight.size(0) <= bitmap.size(0),
                    "weight has shape ", weight.sizes(), " from row ", first, " on; allowed: some of ", bitmap.size(0),
                    " rows, contiguous, on the CPU");
}

void unpack_(at::Tensor weight, const at::Tensor& bitmap, const at::Tensor& values, const at::Tensor& offsets,
             int64_t first, const std::string& path) {
  check_place(weight, bitmap, first);
  const int64_t last = check_positions(bitmap, offsets, weight.size(1), path);
  TORCH_CHECK_VALUE(values.numel() == last && values.is_contiguous() && values.is_cpu(), "values has ", values.numel(),
                    " entries; allowed: ", last, ", contiguous, on the CPU");
  const auto size = values.element_size();
  TORCH_CHECK_TYPE(weight.scalar_type() == values.scalar_type() && (size == 2 || size == 4), "values has dtype ",
                   values.scalar_type(), ", weight ", weight.scalar_type(), "; allowed: BFloat16, Half, Float, the same");
  const auto* starts = static_cast<const int64_t*>(offsets.const_data_ptr());
  with_unpack_path(path, [&](auto way) {
    if (size == 2) return unpack_values<decltype(way), uint16_t>(bitmap, values, starts, first, weight);
    unpack_values<decltype(way), uint32_t>(bitmap, values, starts, first, weight);
  });
}

void unpack_coded_(at::Tensor weight, const at::Tensor& bitmap, const at::Tensor& codes, const at::Tensor& scales,
                   const at::Tensor& offsets, int64_t first, const std::string& path) {
  check_place(weight, bitmap, first);
  check_codes(codes, scales, check_positions(bitmap, offsets, weight.size(1), path), bitmap.size(0), weight.size(1));
  const Coded packed{bitmap, codes, scales, offsets};
  with_unpack_path(path, [&](auto way) {
    switch (weight.scalar_type()) {
      case at::kBFloat16: return unpack_codes<decltype(way), BFloat16>(packed, first, weight);
      case at::kHalf: return unpack_codes<decltype(way), Half>(packed, first, weight);
      case at::kFloat: return unpack_codes<decltype(way), float>(packed, first, weight);
      default: TORCH_CHECK_TYPE(false, "weight has dtype ", weight.scalar_type(), "; allowed: BFloat16, Half, Float");
    }
  });
}
