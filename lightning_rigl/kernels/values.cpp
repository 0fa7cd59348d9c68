// The values of active connections: their gradient, and moves between compact order and dense places.

#include "matrix.h"

namespace lr {
namespace {

constexpr int64_t kPaired = 2048;  // up to so many inputs two panels stay in the cache together

// Lane l of the result: a[l] + a[l ^ Step] where l lacks the bit Step, and the same of b where it has it.
template <int Step, int... Lane>
inline Vector fold(Vector a, Vector b, std::integer_sequence<int, Lane...>) {
    return pick<(Lane & Step ? kWidth + Lane : Lane)...>(a, b) +
           pick<(Lane & Step ? kWidth + (Lane ^ Step) : Lane ^ Step)...>(a, b);
}

// Lane k of the result: the product of `gradient` with the column `columns[k]`, over the first R registers of
// neighbouring panels.
template <int R, int Step, typename Index>
inline Vector sampled(const Vector (&gradient)[R], const float* x, int64_t panel,
                      const Index* columns) {
    if constexpr (Step == kWidth) {
        const float* column = x + static_cast<int64_t>(*columns) * P;
        Vector sum = gradient[0] * load(column);
#pragma GCC unroll 16
        for (int v = 1; v < R; ++v)
            sum += gradient[v] * load(column + v / kVectors * panel + v % kVectors * kWidth);
        return sum;
    } else {
        return fold<Step>(sampled<R, Step * 2>(gradient, x, panel, columns),
                          sampled<R, Step * 2>(gradient, x, panel, columns + Step), Lanes{});
    }
}

// The sums of row `row` over R registers of panels with `inputs` features: set where `fresh`, else added to.
template <int R, typename Index>
inline void add_panels(const Matrix<Index>& matrix, int64_t row, const float* gradient, const float* x,
                       int64_t inputs, bool fresh, float* compact) {
    Vector held[R];
    for (int v = 0; v < R; ++v)
        held[v] = load(gradient + (v / kVectors * matrix.outputs + row) * P + v % kVectors * kWidth);
    const int64_t count = matrix.starts[row + 1] - matrix.starts[row], whole = count - count % kWidth;
    const Index* columns = matrix.columns + matrix.starts[row];
    float* sums = compact + matrix.starts[row];
    for (int64_t k = 0; k < whole; k += kWidth) {
        const Vector some = sampled<R, 1>(held, x, inputs * P, columns + k);
        store(sums + k, fresh ? some : load(sums + k) + some);
    }
    if (whole == count) return;
    Index last[kWidth];  // the rest of the row, filled up with a column that is at hand
    for (int64_t i = 0; i < kWidth; ++i) last[i] = columns[least(whole + i, count - 1)];
    float some[kWidth];
    store(some, sampled<R, 1>(held, x, inputs * P, last));
    for (int64_t k = whole; k < count; ++k) sums[k] = fresh ? some[k - whole] : sums[k] + some[k - whole];
}

// Call body(row's first connection, how many, its columns, the row's first place in a dense matrix).
template <typename Body>
void each_row(int64_t inputs, int64_t outputs, const int32_t* starts, const void* columns, int wide,
              int threads, const Body& body) {
    with_matrix(outputs, starts, columns, wide, nullptr, nullptr, [&](const auto& matrix) {
        share(matrix, 1, matrix.cost(outputs), threads, [&](int64_t place, int64_t end) {
            for (int64_t row = place * kTile; row < least(outputs, end * kTile); ++row)
                body(starts[row], starts[row + 1] - starts[row], matrix.columns + starts[row], row * inputs);
        });
    });
}

}  // namespace
}  // namespace lr

using namespace lr;

// For each connection (o, i): compact = sum over b of gradient[b][o] * x[b][i], both in panels. Written to
// its place in dense[outputs][inputs] too unless that is NULL; other places stay as they are.
LR_EXPORT void lr_sddmm(const float* gradient_panels, const float* x_panels, int64_t batch, int64_t inputs,
                        int64_t outputs, const int32_t* starts, const void* columns, int wide, float* compact,
                        float* dense, int threads) {
    const int64_t panels = ceil_div(batch, P);
    const bool pairs = kWidth > 4 && inputs <= kPaired;
    with_matrix(outputs, starts, columns, wide, nullptr, nullptr, [&](const auto& matrix) {
        const int64_t work = matrix.cost(outputs) * most(1, batch);
        share(matrix, 1, work, threads, [&](int64_t place, int64_t end) {
            const int64_t first = place * kTile, last = least(outputs, end * kTile);
            if (!panels && first < last && starts[first] < starts[last])
                std::memset(compact + starts[first], 0, sizeof(float) * (starts[last] - starts[first]));
            for (int64_t p = 0; p < panels;) {  // all rows before the next panels: these stay in the cache
                const float *gradient = gradient_panels + p * outputs * P, *x = x_panels + p * inputs * P;
                const bool two = pairs && p + 2 <= panels, narrow = batch - p * P <= kWidth;
                for (int64_t row = first; row < last; ++row)
                    if (two)
                        add_panels<2 * kVectors>(matrix, row, gradient, x, inputs, p == 0, compact);
                    else if (narrow)
                        add_panels<1>(matrix, row, gradient, x, inputs, p == 0, compact);
                    else
                        add_panels<kVectors>(matrix, row, gradient, x, inputs, p == 0, compact);
                p += two ? 2 : 1;
            }
            for (int64_t row = first; dense && row < last; ++row)
                for (int64_t k = starts[row]; k < starts[row + 1]; ++k)
                    dense[row * inputs + matrix.columns[k]] = compact[k];
        });
    });
}

// values = dense at the connections.
LR_EXPORT void lr_gather(const float* dense, int64_t inputs, int64_t outputs, const int32_t* starts,
                         const void* columns, int wide, float* values, int threads) {
    each_row(inputs, outputs, starts, columns, wide, threads,
             [&](int64_t first, int64_t count, const auto* column, int64_t place) {
                 const float* row = dense + place;
                 float* to = values + first;
                 for (int64_t k = 0; k < count; ++k) to[k] = row[column[k]];
             });
}

// dense at the connections = values; other places stay as they are.
LR_EXPORT void lr_scatter(const float* values, int64_t inputs, int64_t outputs, const int32_t* starts,
                          const void* columns, int wide, float* dense, int threads) {
    each_row(inputs, outputs, starts, columns, wide, threads,
             [&](int64_t first, int64_t count, const auto* column, int64_t place) {
                 float* row = dense + place;
                 const float* from = values + first;
                 for (int64_t k = 0; k < count; ++k) row[column[k]] = from[k];
             });
}

// out[k] = values[permutation[k]].
LR_EXPORT void lr_permute(const float* values, const int32_t* permutation, int64_t count, float* out,
                          int threads) {
    const int team = useful_threads(threads, count);
#pragma omp parallel for simd num_threads(team) schedule(static) if (team > 1)
    for (int64_t k = 0; k < count; ++k) out[k] = values[permutation[k]];
}
