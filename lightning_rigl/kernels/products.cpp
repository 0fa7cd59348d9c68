// Products with a matrix whose zeros are skipped: of a batch in panels, of a few examples, of images.
//
// Each output is computed by one thread, in an order that does not depend on how many there are.

#include <pthread.h>

#include "matrix.h"

namespace lr {

static volatile bool forked = false;
__attribute__((constructor)) static void watch_forks() {
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
}

int useful_threads(int asked, int64_t work) {
    if (forked || asked < 1) return 1;
    return static_cast<int>(most(1, least(asked, work / 32768)));
}

namespace {

template <int Step, int... Lane>
inline void exchange(Vector& a, Vector& b, std::integer_sequence<int, Lane...>) {
    const Vector upper = pick<(Lane & Step ? kWidth + (Lane ^ Step) : Lane)...>(a, b);
    b = pick<(Lane & Step ? kWidth + Lane : (Lane | Step))...>(a, b);
    a = upper;
}

template <int Step>
inline void transpose_steps(Vector (&rows)[kWidth]) {
    if constexpr (Step > 0) {
#pragma GCC unroll 16
        for (int row = 0; row < kWidth; ++row)
            if (!(row & Step)) exchange<Step>(rows[row], rows[row | Step], Lanes{});
        transpose_steps<Step / 2>(rows);
    }
}

// to[j * to_stride + i] = from[i * from_stride + j] for i, j < kWidth.
inline void transpose_square(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    Vector rows[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) rows[i] = load(from + i * from_stride);
    transpose_steps<kWidth / 2>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) store(to + i * to_stride, rows[i]);
}

// The same for any height and width.
void transpose(const float* from, int64_t from_stride, int64_t height, int64_t width, float* to,
               int64_t to_stride) {
    const int64_t whole_i = height - height % kWidth, whole_j = width - width % kWidth;
    for (int64_t j = 0; j < whole_j; j += kWidth)
        for (int64_t i = 0; i < whole_i; i += kWidth)
            transpose_square(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    for (int64_t j = 0; j < width; ++j)
        for (int64_t i = j < whole_j ? whole_i : 0; i < height; ++i)
            to[j * to_stride + i] = from[i * from_stride + j];
}

// Rows first .. last for the examples of one panel, of which only the registers in use are computed.
template <int V, typename Index>
void panel_product(const Matrix<Index>& matrix, const float* panel, int64_t first, int64_t last,
                   int64_t examples, float* y, int64_t y_stride) {
    if constexpr (V > 1)
        if (examples <= V / 2 * kWidth)
            return panel_product<V / 2>(matrix, panel, first, last, examples, y, y_stride);
    alignas(64) float tile[kTile * P];
    for (int64_t row = first; row < last; ++row) {
        Vector sums[V];
        row_product<V>(matrix, row, panel, P, sums);
        for (int v = 0; v < V; ++v) store(tile + (row - first) * P + v * kWidth, sums[v]);
    }
    transpose(tile, P, last - first, examples, y + first, y_stride);
}

// One example: each connection gathers its input. Independent sums hide the latency.
template <typename Index>
inline float gathered_product(const Matrix<Index>& matrix, int64_t row, const float* x, int64_t stride) {
    constexpr int kSums = 4;
    const Index* columns = matrix.columns;
    const float* values = matrix.values;
    const int64_t end = matrix.starts[row + 1];
    float sums[kSums] = {matrix.offset(row)};
    int64_t k = matrix.starts[row];
    for (; k + kSums <= end; k += kSums)
#pragma GCC unroll 8
        for (int s = 0; s < kSums; ++s) sums[s] += values[k + s] * x[columns[k + s] * stride];
    for (; k < end; ++k) sums[0] += values[k] * x[columns[k] * stride];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Rows first .. last for up to V registers of an image's pixels from `begin` on, one plane a channel. Returns
// how many pixels those were.
template <int V, typename Index>
int64_t pixel_product(const Matrix<Index>& matrix, const float* x, int64_t first, int64_t last,
                      int64_t pixels, int64_t begin, float* y) {
    const int64_t left = pixels - begin;
    if constexpr (V > 1)
        if (left <= V / 2 * kWidth || pixels < V * kWidth)
            return pixel_product<V / 2>(matrix, x, first, last, pixels, begin, y);
    const int64_t from = least(begin, pixels - V * kWidth);  // the last ones read some pixels a second time
    for (int64_t row = first; row < last; ++row) {
        Vector sums[V];
        row_product<V>(matrix, row, x + from, pixels, sums);
        float* to = y + row * pixels;
        if (from == begin)
            for (int v = 0; v < V; ++v) store(to + begin + v * kWidth, sums[v]);
        else
            std::memcpy(to + begin, reinterpret_cast<float*>(sums) + (begin - from), sizeof(float) * left);
    }
    return least(left, V * kWidth);
}

}  // namespace
}  // namespace lr

using namespace lr;

LR_EXPORT int lr_abi(void) { return 1; }
LR_EXPORT const char* lr_isa(void) { return LR_ISA; }
LR_EXPORT int lr_panel(void) { return static_cast<int>(P); }

// x[batch][features], at any strides, into panels.
LR_EXPORT void lr_pack(const float* x, int64_t batch, int64_t features, int64_t row_stride,
                       int64_t column_stride, float* panels, int threads) {
    constexpr int64_t kBlock = 64;  // features that one thread takes together
    const int64_t blocks = ceil_div(features, kBlock), tasks = ceil_div(batch, P) * blocks;
    const int team = useful_threads(threads, batch * features);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t example = task / blocks * P, feature = task % blocks * kBlock;
        const int64_t examples = least(P, batch - example), width = least(kBlock, features - feature);
        const float* from = x + example * row_stride + feature * column_stride;
        float* to = panels + (task / blocks * features + feature) * P;
        if (column_stride == 1)
            transpose(from, row_stride, examples, width, to, P);
        else
            for (int64_t j = 0; j < width; ++j)
                for (int64_t i = 0; i < examples; ++i)
                    to[j * P + i] = from[i * row_stride + j * column_stride];
        for (int64_t j = 0; j < width && examples < P; ++j)
            std::memset(to + j * P + examples, 0, sizeof(float) * (P - examples));
    }
}

// y[batch][outputs] = x * matrix^T + bias, x in panels; bias may be NULL.
LR_EXPORT void lr_spmm(const float* panels, int64_t batch, int64_t inputs, const int32_t* starts,
                       const void* columns, int wide, const float* values, const float* bias, int64_t outputs,
                       float* y, int64_t y_row_stride, int threads) {
    with_matrix(outputs, starts, columns, wide, values, bias, [&](const auto& matrix) {
        const int64_t work = matrix.cost(outputs) * batch;
        share(matrix, ceil_div(batch, P), work, threads, [&](int64_t place, int64_t end) {
            for (; place < end; ++place) {
                const int64_t panel = place / matrix.tiles(), first = place % matrix.tiles() * kTile;
                panel_product<kVectors>(matrix, panels + panel * inputs * P, first,
                                        least(outputs, first + kTile), least(P, batch - panel * P),
                                        y + panel * P * y_row_stride, y_row_stride);
            }
        });
    });
}

// The same for a batch so small that panels would stay empty: x[batch][inputs] at any strides.
LR_EXPORT void lr_spmv(const float* x, int64_t batch, int64_t row_stride, int64_t column_stride,
                       const int32_t* starts, const void* columns, int wide, const float* values,
                       const float* bias, int64_t outputs, float* y, int64_t y_row_stride, int threads) {
    with_matrix(outputs, starts, columns, wide, values, bias, [&](const auto& matrix) {
        share(matrix, batch, matrix.cost(outputs) * batch, threads, [&](int64_t place, int64_t end) {
            for (; place < end; ++place) {
                const int64_t example = place / matrix.tiles(), first = place % matrix.tiles() * kTile;
                const float* from = x + example * row_stride;
                for (int64_t row = first; row < least(outputs, first + kTile); ++row)
                    y[example * y_row_stride + row] = column_stride == 1
                        ? gathered_product(matrix, row, from, 1)
                        : gathered_product(matrix, row, from, column_stride);
            }
        });
    });
}

// y[image][outputs][pixels] = matrix * x[image][inputs][pixels] + bias; an image's planes lie together.
LR_EXPORT void lr_conv1x1(const float* x, int64_t images, int64_t pixels, int64_t image_stride,
                          const int32_t* starts, const void* columns, int wide, const float* values,
                          const float* bias, int64_t outputs, float* y, int threads) {
    constexpr int64_t kMost = 8;  // registers of pixels
    with_matrix(outputs, starts, columns, wide, values, bias, [&](const auto& matrix) {
        const int64_t strips = ceil_div(pixels, kMost * kWidth);
        const int64_t work = matrix.cost(outputs) * images * pixels;
        share(matrix, images * strips, work, threads, [&](int64_t place, int64_t end) {
            for (; place < end; ++place) {
                const int64_t strip = place / matrix.tiles(), first = place % matrix.tiles() * kTile;
                const int64_t last = least(outputs, first + kTile);
                const int64_t begin = strip % strips * kMost * kWidth;
                const int64_t stop = least(pixels, begin + kMost * kWidth);
                const float* image = x + strip / strips * image_stride;
                float* to = y + strip / strips * outputs * pixels;
                for (int64_t pixel = begin; pixels >= kWidth && pixel < stop;)
                    pixel += pixel_product<kMost>(matrix, image, first, last, pixels, pixel, to);
                for (int64_t row = first; pixels < kWidth && row < last; ++row)
                    for (int64_t pixel = 0; pixel < pixels; ++pixel)
                        to[row * pixels + pixel] = gathered_product(matrix, row, image + pixel, pixels);
            }
        });
    });
}
