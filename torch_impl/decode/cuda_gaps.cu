// Products with values and gaps, the layout of cuda_gaps.py.

#include "cuda_gaps.h"

// As losa_matvec of cuda.cu. panels: parts of a strip, a warp for each; slot: bytes of a group; groups: strips of a block.
extern "C" int losa_matvec_gaps(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns,
                                int panels, int slot, int half, int batch, int groups, int overlap, void* stream) {
    const Layout w{static_cast<const uint8_t*>(data), static_cast<const int*>(starts), rows, columns, panels, slot};
    const auto call = half ? launch_gaps<__half, 16> : launch_gaps<__nv_bfloat16, 16>;
    return call(w, x, bias, y, batch, groups, overlap, {}, static_cast<cudaStream_t>(stream));
}

// As losa_ending of cuda.cu.
extern "C" int losa_ending_gaps(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns, int panels,
                                int slot, int batch, int overlap, int ending, void* squares, int parts, float eps, void* total, const void* gain,
                                void* stream) {
    const Layout w{static_cast<const uint8_t*>(data), static_cast<const int*>(starts), rows, columns, panels, slot};
    const Around around{static_cast<float*>(squares), parts, eps, static_cast<uint16_t*>(total), static_cast<const uint16_t*>(gain), 0, overlap == 2};
    return launch_ending_gaps<16>(ending, w, x, bias, y, batch, overlap, around, static_cast<cudaStream_t>(stream));
}

// width: columns of a block, a multiple of 8.
extern "C" int losa_expand_gaps(const void* data, const void* starts, void* dense, int rows, int columns, int panels, int slot, int width,
                                void* stream) {
    const Layout w{static_cast<const uint8_t*>(data), static_cast<const int*>(starts), rows, columns, panels, slot};
    return launch_expand<__nv_bfloat16, 16>(w, dense, width, static_cast<cudaStream_t>(stream));
}
