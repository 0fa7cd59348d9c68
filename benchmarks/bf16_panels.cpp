// Would activations in bfloat16 make the sparse product faster? One panel of 32 examples, one thread.
//
//     g++ -O3 -march=native -o /tmp/bf16_panels benchmarks/bf16_panels.cpp && /tmp/bf16_panels
//
// The loop is that of the kernels: a connection multiplies the 32 numbers of its input. They are two registers of
// float32, or one of bfloat16 that is widened by a shift and a mask ("exact"), or without the mask, which leaves noise
// below bfloat16's last bit in every other number. Prints GFLOP/s; the last result is in results/bf16_panels.txt.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int kExamples = 32, kWidth = 16;

struct Matrix {
    std::vector<int> starts{0};
    std::vector<uint16_t> columns;
    std::vector<float> values;
};

struct Float32 {
    using Word = float;
    static constexpr int kStride = kExamples;
    static void add(float value, const Word* x, Floats& low, Floats& high) {
        low += value * *reinterpret_cast<const Floats*>(x);
        high += value * *reinterpret_cast<const Floats*>(x + kWidth);
    }
};

// Word i holds example i in its lower half, and example i + 16 in its upper one.
template <bool Exact>
struct Bfloat16 {
    using Word = uint32_t;
    static constexpr int kStride = kWidth;
    static void add(float value, const Word* x, Floats& low, Floats& high) {
        const Words both = *reinterpret_cast<const Words*>(x);
        low += value * reinterpret_cast<const Floats&>(static_cast<const Words&>(both << 16));
        const Words upper = Exact ? both & 0xffff0000u : both;
        high += value * reinterpret_cast<const Floats&>(upper);
    }
};

template <class Type>
void product(const Matrix& matrix, const typename Type::Word* x, float* y) {
    for (size_t row = 0; row + 1 < matrix.starts.size(); ++row) {
        Floats sums[4] = {};  // two chains of additions hide their latency
        int k = matrix.starts[row];
        const int end = matrix.starts[row + 1];
        for (; k + 2 <= end; k += 2) {
            Type::add(matrix.values[k], x + matrix.columns[k] * Type::kStride, sums[0], sums[1]);
            Type::add(matrix.values[k + 1], x + matrix.columns[k + 1] * Type::kStride, sums[2], sums[3]);
        }
        if (k < end) Type::add(matrix.values[k], x + matrix.columns[k] * Type::kStride, sums[0], sums[1]);
        *reinterpret_cast<Floats*>(y + row * kExamples) = sums[0] + sums[2];
        *reinterpret_cast<Floats*>(y + row * kExamples + kWidth) = sums[1] + sums[3];
    }
}

template <class Type>
double speed(const Matrix& matrix, int inputs, std::vector<float>& y) {
    using Word = typename Type::Word;
    const std::vector<Word> memory(inputs * Type::kStride + kWidth, 0);
    const auto address = (reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64;  // as torch aligns tensors
    const auto* x = reinterpret_cast<const Word*>(address);
    double best = 1e9;
    for (int round = 0; round < 50; ++round) {
        const auto start = std::chrono::steady_clock::now();
        product<Type>(matrix, x, y.data());
        const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
        best = std::min(best, passed.count());
    }
    return 2e-9 * kExamples * matrix.columns.size() / best;
}

int main() {
    constexpr int kOutputs = 1024;
    std::mt19937 draw(0);
    std::vector<float> y(kOutputs * kExamples);
    std::printf("inputs density  float32  bfloat16 exact  without the mask\n");
    for (int inputs : {768, 1024, 3072})
        for (double density : {0.1, 0.05, 0.02}) {
            Matrix matrix;
            for (int row = 0; row < kOutputs; ++row) {
                for (int input = 0; input < inputs; ++input)
                    if (draw() < density * draw.max()) matrix.columns.push_back(input);
                matrix.starts.push_back(matrix.columns.size());
            }
            matrix.values.assign(matrix.columns.size(), 1.0f);
            const double plain = speed<Float32>(matrix, inputs, y), exact = speed<Bfloat16<true>>(matrix, inputs, y);
            const double noisy = speed<Bfloat16<false>>(matrix, inputs, y);
            std::printf("%6d %7.2f %8.0f %7.0f (%.2fx) %9.0f (%.2fx)\n", inputs, density, plain, exact, exact / plain,
                        noisy, noisy / plain);
        }
}
