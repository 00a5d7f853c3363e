// The kernels of cuda.cu as operators of torch: each checks its arguments, allocates the result and launches on the current
// stream. In Python the same steps take ten times as long, more than most kernels.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

// In cuda.cu. All return a cudaError_t.
extern "C" int losa_matvec(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns,
                           int panels, int slot, int half, int batch, int share, int groups, int overlap, void* stream);
extern "C" int losa_ending(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns, int panels,
                           int slot, int batch, int share, int overlap, int ending, void* squares, int parts, float eps, void* total,
                           const void* gain, void* stream);
extern "C" int losa_expand(const void* data, const void* starts, void* dense, int rows, int columns, int panels, int slot, void* stream);
// In cuda_rows.cu.
extern "C" int losa_matvec_rows(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns,
                                int panels, int slot, int half, int batch, int strips, int share, int groups, int overlap, void* stream);
// In cuda_coded.cu.
extern "C" int losa_matvec_coded(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns,
                                 int panels, int slot, int half, int bits, int batch, int share, int groups, int overlap, void* stream);
extern "C" int losa_ending_coded(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns, int panels,
                                 int slot, int bits, int batch, int share, int overlap, int ending, void* squares, int parts, float eps, void* total,
                                 const void* gain, void* stream);
extern "C" int losa_expand_coded(const void* data, const void* starts, void* dense, int rows, int columns, int panels, int slot, int half,
                                 int bits, void* stream);

// In cuda_gaps.cu.
extern "C" int losa_matvec_gaps(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns,
                                int panels, int slot, int half, int batch, int groups, int overlap, void* stream);
extern "C" int losa_ending_gaps(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns, int panels,
                                int slot, int batch, int overlap, int ending, void* squares, int parts, float eps, void* total, const void* gain,
                                void* stream);
extern "C" int losa_expand_gaps(const void* data, const void* starts, void* dense, int rows, int columns, int panels, int slot, int width,
                                void* stream);
// In cuda_coded_gaps.cu.
extern "C" int losa_matvec_coded_gaps(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns,
                                      int panels, int slot, int half, int bits, int batch, int groups, int overlap, void* stream);
extern "C" int losa_ending_coded_gaps(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns,
                                      int panels, int slot, int bits, int batch, int overlap, int ending, void* squares, int parts, float eps,
                                      void* total, const void* gain, void* stream);
extern "C" int losa_expand_coded_gaps(const void* data, const void* starts, void* dense, int rows, int columns, int panels, int slot, int half,
                                      int bits, int width, void* stream);

namespace {

constexpr int64_t BATCH = 8;   // rows of x per launch, unless the plan says more
constexpr int WIDTH = 1024;    // columns that a block unpacks of a weight with gaps

// The numbers of `Layout.plan` in cuda.py. share: panels per warp, or 0 if a block's panels do not fit in shared memory. most:
// rows of x up to which a kernel is used; more unpack the weight. bits: of a code, or 0 if the weight holds values. at_once: rows of x
// per launch; above BATCH by the kernel of cuda_rows.cu with strips, part and groups. together: strips per block for up to BATCH rows.
// alone: panels per warp of a block with one strip, for other endings than `linear`'s. gated: the same of a gated product, or 0.
// gaps: the weight holds values and gaps; a warp has one panel; at_once is at most BATCH; alone and gated are 1, or 0 if that is impossible.
struct Plan {
  int rows, columns, panels, slot, half, share, overlap, most, bits, at_once, strips, part, groups, together, alone, gated, gaps;

  explicit Plan(at::IntArrayRef n) {
    TORCH_CHECK_VALUE(n.size() == 17, "plan has ", n.size(), " numbers; allowed: 17");
    const auto at = [&](size_t i) { return static_cast<int>(n[i]); };
    rows = at(0), columns = at(1), panels = at(2), slot = at(3), half = at(4), share = at(5), overlap = at(6), most = at(7), bits = at(8);
    at_once = at(9), strips = at(10), part = at(11), groups = at(12), together = at(13), alone = at(14), gated = at(15);
    gaps = at(16);
  }

  at::ScalarType dtype() const { return half ? at::kHalf : at::kBFloat16; }
};

void check_launch(int error, const char* name) { TORCH_CHECK(error == 0, name, " failed with CUDA error ", error); }

void* current_stream(const at::Tensor& data) { return c10::cuda::getCurrentCUDAStream(data.get_device()).stream(); }

// The dense weight (rows, columns).
at::Tensor expand(const at::Tensor& data, const at::Tensor& starts, at::IntArrayRef numbers) {
  const Plan plan(numbers);
  const c10::cuda::CUDAGuard guard(data.device());
  at::Tensor dense = at::empty({plan.rows, plan.columns}, data.options().dtype(plan.dtype()));
  const void *panels = data.const_data_ptr(), *first = starts.const_data_ptr();
  void *to = dense.mutable_data_ptr(), *stream = current_stream(data);
  check_launch(plan.gaps && plan.bits ? losa_expand_coded_gaps(panels, first, to, plan.rows, plan.columns, plan.panels, plan.slot, plan.half, plan.bits,
                                                               WIDTH, stream)
               : plan.gaps ? losa_expand_gaps(panels, first, to, plan.rows, plan.columns, plan.panels, plan.slot, WIDTH, stream)
               : plan.bits ? losa_expand_coded(panels, first, to, plan.rows, plan.columns, plan.panels, plan.slot, plan.half, plan.bits, stream)
                           : losa_expand(panels, first, to, plan.rows, plan.columns, plan.panels, plan.slot, stream),
               "losa_expand");
  return dense;
}

// Rows of x per launch. Of panels, more than BATCH are read as vectors of 16 bytes.
int64_t rows_per_launch(const Plan& p, const void* x) {
  if (p.gaps) return p.at_once;
  const bool vectors = p.columns % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  return p.strips && vectors ? std::max<int64_t>(BATCH, p.at_once) : BATCH;
}

// y = x W^T (+ bias) for the rows of x of one launch.
void multiply(const Plan& p, const at::Tensor& data, const at::Tensor& starts, const void* x, const void* bias, void* y, int batch) {
  const void *panels = data.const_data_ptr(), *first = starts.const_data_ptr();
  void* stream = current_stream(data);
  check_launch(p.gaps && p.bits ? losa_matvec_coded_gaps(panels, first, x, bias, y, p.rows, p.columns, p.panels, p.slot, p.half, p.bits, batch,
                                                         p.together, p.overlap, stream)
               : p.gaps ? losa_matvec_gaps(panels, first, x, bias, y, p.rows, p.columns, p.panels, p.slot, p.half, batch, p.together, p.overlap, stream)
               : p.bits ? losa_matvec_coded(panels, first, x, bias, y, p.rows, p.columns, p.panels, p.slot, p.half, p.bits, batch, p.share,
                                            p.together, p.overlap, stream)
               : batch > BATCH ? losa_matvec_rows(panels, first, x, bias, y, p.rows, p.columns, p.panels, p.slot, p.half, batch, p.strips, p.part,
                                                  p.groups, p.overlap, stream)
                      : losa_matvec(panels, first, x, bias, y, p.rows, p.columns, p.panels, p.slot, p.half, batch, p.share, p.together,
                                    p.overlap, stream),
               "losa_matvec");
}

void check_operands(const Plan& plan, const at::Tensor& x, const at::Tensor& data, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == plan.columns, "x has shape ", x.sizes(), "; allowed: [..., ", plan.columns, "]");
  TORCH_CHECK_TYPE(x.scalar_type() == plan.dtype(), "x has dtype ", x.scalar_type(), "; allowed: ", plan.dtype(), ", the weight's");
  TORCH_CHECK_VALUE(x.device() == data.device(), "x is on ", x.device(), "; allowed: ", data.device(), ", the weight's");
  TORCH_CHECK_VALUE(!bias || (bias->scalar_type() == plan.dtype() && bias->numel() == plan.rows && bias->is_contiguous() &&
                              bias->device() == data.device()),
                    "bias does not match the weight; allowed: ", plan.rows, " entries of its dtype on its device");
}

// y (..., rows) = x (..., columns) W^T (+ bias).
at::Tensor linear(const at::Tensor& x, const at::Tensor& data, const at::Tensor& starts, at::IntArrayRef numbers,
                  const std::optional<at::Tensor>& bias) {
  const Plan plan(numbers);
  const at::AutoDispatchBelowADInplaceOrView no_gradient;
  check_operands(plan, x, data, bias);
  const int64_t count = x.numel() / plan.columns;
  if (count > plan.most || plan.share == 0) return at::linear(x, expand(data, starts, numbers), bias);
  const c10::cuda::CUDAGuard guard(data.device());
  at::DimVector sizes(x.sizes());
  sizes.back() = plan.rows;
  at::Tensor y = at::empty(sizes, x.options());
  const auto rows = x.expect_contiguous();
  const auto* from = static_cast<const char*>(rows->const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  const size_t width = 2;   // bytes of a number
  const int64_t step = rows_per_launch(plan, from);
  for (int64_t first = 0; first < count; first += step)
    multiply(plan, data, starts, from + width * first * plan.columns, bias ? bias->const_data_ptr() : nullptr,
             to + width * first * plan.rows, static_cast<int>(std::min(step, count - first)));
  return y;
}

// The product of several weights stacked in one layout, as one tensor (..., size) each.
std::vector<at::Tensor> linear_parts(const at::Tensor& x, const at::Tensor& data, const at::Tensor& starts, at::IntArrayRef numbers,
                                     const std::optional<at::Tensor>& bias, at::IntArrayRef sizes) {
  const at::AutoDispatchBelowADInplaceOrView no_gradient;
  return linear(x, data, starts, numbers, bias).split_with_sizes(sizes, -1);
}

// As in cuda_decode.h.
enum Ending { NORMED = 1, GATED, ADDED };

void check_part(const at::Tensor& given, const char* name, at::ScalarType dtype, at::IntArrayRef sizes, const at::Tensor& data) {
  TORCH_CHECK_VALUE(given.scalar_type() == dtype && given.sizes() == sizes && given.is_contiguous() && given.device() == data.device(), name,
                    " is ", given.scalar_type(), " ", given.sizes(), " on ", given.device(), "; allowed: ", dtype, " ", sizes, ", contiguous, on ",
                    data.device());
}

int64_t strips(const Plan& p) { return p.gaps ? (p.rows + 31) / 32 : (p.rows + 15) / 16; }

// A product for up to eight rows of x, contiguous, with another ending than `linear`: `width` numbers of the result per row.
at::Tensor multiply_ending(Ending ending, const Plan& p, const at::Tensor& x, const at::Tensor& data, const at::Tensor& starts,
                           const std::optional<at::Tensor>& bias, int64_t width, const at::Tensor& squares, double eps, void* total, const void* gain) {
  check_operands(p, x, data, bias);
  const int share = ending == GATED ? p.gated : p.alone;
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(0) >= 1 && x.size(0) <= BATCH && x.is_contiguous(), "x has shape ", x.sizes(),
                    "; allowed: 1 to 8 rows, contiguous");
  TORCH_CHECK_TYPE(p.dtype() == at::kBFloat16, "the weight has dtype ", p.dtype(), "; allowed: BFloat16");
  TORCH_CHECK_VALUE(share > 0, "a block's panels do not fit in shared memory");
  const int batch = static_cast<int>(x.size(0)), parts = static_cast<int>(squares.size(1));
  at::Tensor y = at::empty({batch, width}, x.options());
  const void *panels = data.const_data_ptr(), *first = starts.const_data_ptr(), *from = x.const_data_ptr();
  const void* own_bias = bias ? bias->const_data_ptr() : nullptr;
  void *to = y.mutable_data_ptr(), *sums = squares.mutable_data_ptr(), *stream = current_stream(data);
  const auto least = static_cast<float>(eps);
  check_launch(p.gaps && p.bits ? losa_ending_coded_gaps(panels, first, from, own_bias, to, p.rows, p.columns, p.panels, p.slot, p.bits, batch, p.overlap,
                                                         ending, sums, parts, least, total, gain, stream)
               : p.gaps ? losa_ending_gaps(panels, first, from, own_bias, to, p.rows, p.columns, p.panels, p.slot, batch, p.overlap, ending, sums, parts,
                                         least, total, gain, stream)
               : p.bits ? losa_ending_coded(panels, first, from, own_bias, to, p.rows, p.columns, p.panels, p.slot, p.bits, batch, share, p.overlap,
                                            ending, sums, parts, least, total, gain, stream)
                        : losa_ending(panels, first, from, own_bias, to, p.rows, p.columns, p.panels, p.slot, batch, share, p.overlap, ending, sums,
                                      parts, least, total, gain, stream),
               "losa_ending");
  return y;
}

// y = x W^T / the root of (sum of squares / columns + eps) (+ bias), and if gated SiLU(its first half) * its second half.
template <Ending ENDING>
at::Tensor linear_normed(const at::Tensor& x, const at::Tensor& squares, double eps, const at::Tensor& data, const at::Tensor& starts,
                         at::IntArrayRef numbers, const std::optional<at::Tensor>& bias) {
  const Plan plan(numbers);
  const at::AutoDispatchBelowADInplaceOrView no_gradient;
  TORCH_CHECK_VALUE(squares.dim() == 2, "squares has shape ", squares.sizes(), "; allowed: [rows of x, parts]");
  check_part(squares, "squares", at::kFloat, {x.size(0), squares.size(1)}, data);
  TORCH_CHECK_VALUE(ENDING != GATED || plan.rows % 32 == 0, "the weight has ", plan.rows, " rows; allowed: a multiple of 32");
  const c10::cuda::CUDAGuard guard(data.device());
  return multiply_ending(ENDING, plan, x, data, starts, bias, ENDING == GATED ? plan.rows / 2 : plan.rows, squares, eps, nullptr, nullptr);
}

// total += x W^T (+ bias); returns total * gain, and the sums of total's squares per strip.
std::tuple<at::Tensor, at::Tensor> linear_added(const at::Tensor& x, at::Tensor& total, const at::Tensor& gain, const at::Tensor& data,
                                                const at::Tensor& starts, at::IntArrayRef numbers, const std::optional<at::Tensor>& bias) {
  const Plan plan(numbers);
  const at::AutoDispatchBelowADInplaceOrView no_gradient;
  check_part(total, "total", at::kBFloat16, {x.size(0), plan.rows}, data);
  check_part(gain, "gain", at::kBFloat16, {plan.rows}, data);
  const c10::cuda::CUDAGuard guard(data.device());
  const at::Tensor squares = at::empty({x.size(0), strips(plan)}, x.options().dtype(at::kFloat));
  at::Tensor scaled = multiply_ending(ADDED, plan, x, data, starts, bias, plan.rows, squares, 0, total.mutable_data_ptr(), gain.const_data_ptr());
  return {scaled, squares};
}

}  // namespace

TORCH_LIBRARY(losa_cuda_decode, library) {
  library.def("linear(Tensor x, Tensor data, Tensor starts, int[] plan, Tensor? bias) -> Tensor");
  library.def("linear_parts(Tensor x, Tensor data, Tensor starts, int[] plan, Tensor? bias, int[] sizes) -> Tensor[]");
  library.def("linear_normed(Tensor x, Tensor squares, float eps, Tensor data, Tensor starts, int[] plan, Tensor? bias) -> Tensor");
  library.def("linear_gated(Tensor x, Tensor squares, float eps, Tensor data, Tensor starts, int[] plan, Tensor? bias) -> Tensor");
  library.def("linear_added(Tensor x, Tensor(a!) total, Tensor gain, Tensor data, Tensor starts, int[] plan, Tensor? bias) -> (Tensor, Tensor)");
  library.def("expand(Tensor data, Tensor starts, int[] plan) -> Tensor");
}

TORCH_LIBRARY_IMPL(losa_cuda_decode, CUDA, library) {
  library.impl("linear", &linear);
  library.impl("linear_parts", &linear_parts);
  library.impl("linear_normed", &linear_normed<NORMED>);
  library.impl("linear_gated", &linear_normed<GATED>);
  library.impl("linear_added", &linear_added);
  library.impl("expand", &expand);
}

// A packed weight passes no gradient on.
TORCH_LIBRARY_IMPL(losa_cuda_decode, AutogradCUDA, library) {
  library.impl("linear", torch::CppFunction::makeFallthrough());
  library.impl("linear_parts", torch::CppFunction::makeFallthrough());
  library.impl("linear_normed", torch::CppFunction::makeFallthrough());
  library.impl("linear_gated", torch::CppFunction::makeFallthrough());
  library.impl("linear_added", torch::CppFunction::makeFallthrough());
  library.impl("expand", torch::CppFunction::makeFallthrough());
}
