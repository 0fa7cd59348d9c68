// A sparse matrix in compressed rows, a row's product with examples that lie side by side, and how rows are
// shared among threads.
//
// Row o's connections are starts[o] .. starts[o + 1] of `columns` (uint16, or int32 where `wide`) and of
// `values`.
// A batch lies in panels of P examples, feature by feature: panels[panel][feature][P], zeros past the batch.
#pragma once

#include "vectors.h"

namespace lr {

constexpr int64_t P = 32;             // examples a panel holds
constexpr int kVectors = P / kWidth;  // registers for one feature of a panel
constexpr int64_t kTile = 16;         // rows that one thread takes together

template <typename Index>
struct Matrix {
    int64_t outputs;
    const int32_t* starts;
    const Index* columns;
    const float* values;
    const float* bias;

    int64_t tiles() const { return ceil_div(outputs, kTile); }
    int64_t cost(int64_t row) const { return starts[row] - starts[0] + 4 * row; }  // of the rows before it
    float offset(int64_t row) const { return bias ? bias[row] : 0.0f; }

    // The tile, counted over all repetitions, before which `part` of `parts` of the whole cost lies.
    int64_t place(int64_t repetitions, int64_t part, int64_t parts) const {
        if (part == parts) return repetitions * tiles();
        const int64_t once = cost(outputs);
        const auto wanted = static_cast<int64_t>(static_cast<double>(once) * repetitions * part / parts);
        const int64_t whole = wanted / once, rest = wanted - whole * once;
        int64_t low = 0, high = tiles();
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (cost(middle * kTile) < rest)
                low = middle + 1;
            else
                high = middle;
        }
        return whole * tiles() + low;
    }
};

// Call body(Matrix) with the index type that `wide` tells.
template <typename Body>
inline void with_matrix(int64_t outputs, const int32_t* starts, const void* columns, int wide,
                        const float* values, const float* bias, const Body& body) {
    if (wide)
        body(Matrix<int32_t>{outputs, starts, static_cast<const int32_t*>(columns), values, bias});
    else
        body(Matrix<uint16_t>{outputs, starts, static_cast<const uint16_t*>(columns), values, bias});
}

// Call body(first, last) with ranges of tiles that together are all tiles of all repetitions. The ranges
// depend on the number of threads; what is computed for a tile must not.
template <typename Index, typename Body>
inline void share(const Matrix<Index>& matrix, int64_t repetitions, int64_t work, int threads,
                  const Body& body) {
    if (matrix.outputs == 0 || repetitions == 0) return;
    const int team = useful_threads(threads, work);
#pragma omp parallel for num_threads(team) schedule(static, 1) if (team > 1)
    for (int part = 0; part < team; ++part)
        body(matrix.place(repetitions, part, team), matrix.place(repetitions, part + 1, team));
}

// Row times V registers of examples, x at base + column * stride, plus the bias. Independent chains of sums
// hide the latency.
template <int V, typename Index>
inline void row_product(const Matrix<Index>& matrix, int64_t row, const float* base, int64_t stride,
                        Vector (&sums)[V]) {
    constexpr int kChains = V == 1 ? 4 : V <= 4 ? 2 : 1;
    const Index* columns = matrix.columns;
    const float* values = matrix.values;
    Vector chains[kChains][V] = {};
    for (int v = 0; v < V; ++v) chains[0][v] = broadcast(matrix.offset(row));
    const auto add = [&](int64_t k, Vector(&chain)[V]) __attribute__((always_inline)) {
        const float* x = base + static_cast<int64_t>(columns[k]) * stride;
        const Vector value = broadcast(values[k]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) chain[v] += value * load(x + v * kWidth);
    };
    const int64_t end = matrix.starts[row + 1];
    int64_t k = matrix.starts[row];
    for (; k + kChains <= end; k += kChains)
#pragma GCC unroll 4
        for (int c = 0; c < kChains; ++c) add(k + c, chains[c]);
    for (; k < end; ++k) add(k, chains[0]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
        sums[v] = chains[0][v];
#pragma GCC unroll 4
        for (int c = 1; c < kChains; ++c) sums[v] += chains[c][v];
    }
}

}  // namespace lr
