// Products with codes, scales and gaps, the layout of cuda_coded_gaps.py.

#include "cuda_gaps.h"

// As losa_matvec_gaps and losa_expand_gaps of cuda_gaps.cu. bits: of a code, 8 or 4.
extern "C" int losa_matvec_coded_gaps(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns,
                                      int panels, int slot, int half, int bits, int batch, int groups, int overlap, void* stream) {
    const Layout w{static_cast<const uint8_t*>(data), static_cast<const int*>(starts), rows, columns, panels, slot};
    const auto call = half ? (bits == 8 ? launch_gaps<__half, 8> : launch_gaps<__half, 4>)
                           : (bits == 8 ? launch_gaps<__nv_bfloat16, 8> : launch_gaps<__nv_bfloat16, 4>);
    return call(w, x, bias, y, batch, groups, overlap, {}, static_cast<cudaStream_t>(stream));
}

// As losa_ending_gaps.
extern "C" int losa_ending_coded_gaps(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns,
                                      int panels, int slot, int bits, int batch, int overlap, int ending, void* squares, int parts, float eps,
                                      void* total, const void* gain, void* stream) {
    const Layout w{static_cast<const uint8_t*>(data), static_cast<const int*>(starts), rows, columns, panels, slot};
    const Around around{static_cast<float*>(squares), parts, eps, static_cast<uint16_t*>(total), static_cast<const uint16_t*>(gain), 0, overlap == 2};
    const auto call = bits == 8 ? launch_ending_gaps<8> : launch_ending_gaps<4>;
    return call(ending, w, x, bias, y, batch, overlap, around, static_cast<cudaStream_t>(stream));
}

extern "C" int losa_expand_coded_gaps(const void* data, const void* starts, void* dense, int rows, int columns, int panels, int slot, int half,
                                      int bits, int width, void* stream) {
    const Layout w{static_cast<const uint8_t*>(data), static_cast<const int*>(starts), rows, columns, panels, slot};
    const auto call = half ? (bits == 8 ? launch_expand<__half, 8> : launch_expand<__half, 4>)
                           : (bits == 8 ? launch_expand<__nv_bfloat16, 8> : launch_expand<__nv_bfloat16, 4>);
    return call(w, dense, width, static_cast<cudaStream_t>(stream));
}
