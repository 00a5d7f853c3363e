// y = x Wᵀ with a dense bf16 W: a loop as optimised as decode/cpu.cpp, for comparison.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#if defined(__x86_64__)
#include <immintrin.h>

namespace {

#define AVX512BF16 __attribute__((target("avx512f,avx512bw,avx512bf16")))

template <int N>
AVX512BF16 void row(const uint16_t* weight, const uint16_t* x, int64_t columns, float* y) {
  constexpr int kSums = N == 1 ? 4 : N <= 4 ? 2 : 1;
  __m512 sum[kSums][N];
  for (auto& each : sum) std::fill(each, each + N, _mm512_setzero_ps());
  int64_t c = 0;
  for (; c + 32 * kSums <= columns; c += 32 * kSums) {
#pragma GCC unroll 4
    for (int k = 0; k < kSums; k++) {
      const auto w = (__m512bh)_mm512_loadu_si512(weight + c + 32 * k);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) {
        sum[k][n] = _mm512_dpbf16_ps(sum[k][n], w, (__m512bh)_mm512_loadu_si512(x + n * columns + c + 32 * k));
      }
    }
  }
  for (; c < columns; c += 32) {
    for (int n = 0; n < N; n++) {
      sum[0][n] = _mm512_dpbf16_ps(sum[0][n], (__m512bh)_mm512_loadu_si512(weight + c),
                                   (__m512bh)_mm512_loadu_si512(x + n * columns + c));
    }
  }
  for (int n = 0; n < N; n++) {
    for (int k = 1; k < kSums; k++) sum[0][n] = _mm512_add_ps(sum[0][n], sum[k][n]);
    y[n] = _mm512_reduce_add_ps(sum[0][n]);
  }
}

using RowFunction = void (*)(const uint16_t*, const uint16_t*, int64_t, float*);
constexpr RowFunction kFunctions[8] = {row<1>, row<2>, row<3>, row<4>, row<5>, row<6>, row<7>, row<8>};

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight) {
  const int64_t count = x.size(0), columns = x.size(1), rows = weight.size(0);
  TORCH_CHECK_VALUE(1 <= count && count <= 8 && columns % 32 == 0 && weight.size(1) == columns && x.is_contiguous() &&
                        weight.is_contiguous() && x.scalar_type() == at::kBFloat16,
                    "x has shape ", x.sizes(), "; allowed: 1 to 8 bf16 rows of a multiple of 32 columns");
  at::Tensor y = at::empty({count, rows}, x.options());
  const auto* from = static_cast<const uint16_t*>(x.const_data_ptr());
  const auto* kept = static_cast<const uint16_t*>(weight.const_data_ptr());
  auto* to = static_cast<c10::BFloat16*>(y.mutable_data_ptr());
#ifdef _OPENMP
  omp_set_num_threads(at::get_num_threads());
#endif
  at::parallel_for(0, rows, std::max<int64_t>(1, 32768 / columns), [&](int64_t begin, int64_t end) {
    float sums[8];
    for (int64_t r = begin; r < end; r++) {
      kFunctions[count - 1](kept + r * columns, from, columns, sums);
      for (int64_t n = 0; n < count; n++) to[n * rows + r] = c10::BFloat16(sums[n]);
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY(losa_dense_loop, library) { library.def("linear(Tensor x, Tensor weight) -> Tensor", &linear); }
#endif
