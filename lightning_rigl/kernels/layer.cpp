// A linear layer's passes in one call each: what products.cpp and values.cpp have, one after the other.

#include "vectors.h"

using namespace lr;

extern "C" {
void lr_pack(const float*, int64_t, int64_t, int64_t, int64_t, float*, int);
void lr_spmm(const float*, int64_t, int64_t, const int32_t*, const void*, int, const float*, const float*, int64_t,
             float*, int64_t, int);
void lr_sddmm(const float*, const float*, int64_t, int64_t, int64_t, const int32_t*, const void*, int, float*, float*,
              int);
void lr_gather(const float*, int64_t, int64_t, const int32_t*, const void*, int, float*, int);
void lr_permute(const float*, const int32_t*, int64_t, float*, int);
}

namespace {

// Whether all are finite: 0 times a number is 0 for these only. Panels hold zeros past the batch.
bool finite(const float* values, int64_t count, int threads) {
    const int team = useful_threads(threads, count);
    float sum = 0.0f;
#pragma omp parallel for simd num_threads(team) schedule(static) reduction(+ : sum) if (team > 1)
    for (int64_t k = 0; k < count; ++k) sum += values[k] * 0.0f;
    return sum == 0.0f;
}

}  // namespace

// y = x W^T + bias of the connections of a dense W; their values and x in panels are left for the backward pass.
// Returns 0, without y, if x is not finite.
LR_EXPORT int lr_linear_forward(const float* x, int64_t batch, int64_t inputs, int64_t row_stride,
                                int64_t column_stride, const float* weight, const int32_t* starts,
                                const void* columns, int wide, const float* bias, int64_t outputs, float* values,
                                float* panels, int64_t panel_floats, float* y, int threads) {
    lr_gather(weight, inputs, outputs, starts, columns, wide, values, threads);
    lr_pack(x, batch, inputs, row_stride, column_stride, panels, threads);
    if (!finite(panels, panel_floats, threads)) return 0;
    lr_spmm(panels, batch, inputs, starts, columns, wide, values, bias, outputs, y, outputs, threads);
    return 1;
}

// dx = g W, unless dx is null, and the gradient of each connection, unless compact is null; that also goes to its
// place of a dense matrix, unless dense is null. Returns 0, without dx, if g is not finite.
LR_EXPORT int lr_linear_backward(const float* gradient, int64_t batch, int64_t outputs, int64_t row_stride,
                                 int64_t column_stride, const float* x_panels, const float* values, int64_t inputs,
                                 const int32_t* starts, const void* columns, int wide, const int32_t* starts_t,
                                 const void* columns_t, int wide_t, const int32_t* permutation, int64_t count,
                                 float* panels, int64_t panel_floats, float* values_t, float* dx, float* compact,
                                 float* dense, int threads) {
    lr_pack(gradient, batch, outputs, row_stride, column_stride, panels, threads);
    const bool whole = dx == nullptr || finite(panels, panel_floats, threads);
    if (dx != nullptr && whole) {
        lr_permute(values, permutation, count, values_t, threads);
        lr_spmm(panels, batch, outputs, starts_t, columns_t, wide_t, values_t, nullptr, inputs, dx, inputs, threads);
    }
    if (compact != nullptr)
        lr_sddmm(panels, x_panels, batch, inputs, outputs, starts, columns, wide, compact, dense, threads);
    return whole ? 1 : 0;
}
