// Runs the products over edge shapes and compares with plain loops; built with sanitizers and for other CPUs.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

extern "C" {
const char* lr_isa(void);
int lr_panel(void);
void lr_pack(const float*, int64_t, int64_t, int64_t, int64_t, float*, int);
void lr_spmm(const float*, int64_t, int64_t, const int32_t*, const void*, int, const float*, const float*, int64_t,
             float*, int64_t, int);
void lr_spmv(const float*, int64_t, int64_t, int64_t, const int32_t*, const void*, int, const float*, const float*,
             int64_t, float*, int64_t, int);
void lr_sddmm(const float*, const float*, int64_t, int64_t, int64_t, const int32_t*, const void*, int, float*, float*,
              int);
void lr_conv1x1(const float*, int64_t, int64_t, int64_t, const int32_t*, const void*, int, const float*,
                const float*, int64_t, float*, int);
void lr_gather(const float*, int64_t, int64_t, const int32_t*, const void*, int, float*, int);
void lr_scatter(const float*, int64_t, int64_t, const int32_t*, const void*, int, float*, int);
void lr_permute(const float*, const int32_t*, int64_t, float*, int);
}

namespace {

uint32_t state = 1;
uint32_t number() { return state = state * 1664525u + 1013904223u; }
float uniform() { return static_cast<float>(number() >> 8) / (1 << 23) - 1.0f; }

// Memory of exactly so many elements, at an address that is aligned to 4 only; a sanitizer watches both ends.
template <typename T>
struct Array {
    explicit Array(int64_t n) : memory(new T[n + 1]), size(n) {}
    T* get() { return memory.get() + 1; }
    T& operator[](int64_t i) { return memory[i + 1]; }
    std::unique_ptr<T[]> memory;
    int64_t size;
};

Array<float> random_floats(int64_t n) {
    Array<float> made(n);
    for (int64_t i = 0; i < n; ++i) made[i] = uniform();
    return made;
}

int failures = 0;
void near(const char* what, double found, double wanted, int64_t terms) {
    if (std::fabs(found - wanted) <= 1e-6 * (terms + 8)) return;
    if (++failures < 20) std::printf("%s: %g, and plain loops give %g\n", what, found, wanted);
}

struct Problem {
    int64_t outputs, inputs;
    std::vector<float> dense;   // zeros where there is no connection
    std::vector<bool> active;
    std::vector<int32_t> starts{0};
    std::vector<int32_t> wide;
    std::vector<uint16_t> narrow;
    std::vector<float> values, bias;

    Problem(int64_t o, int64_t i, double density) : outputs(o), inputs(i), dense(o * i), active(o * i) {
        for (int64_t row = 0; row < o; ++row) {
            const double share = row % 3 == 1 ? 0.0 : density;  // every third row has no connection
            for (int64_t column = 0; column < i; ++column)
                if (number() / 4294967296.0 < share) {
                    wide.push_back(static_cast<int32_t>(column));
                    narrow.push_back(static_cast<uint16_t>(column));
                    values.push_back(dense[row * i + column] = uniform());
                    active[row * i + column] = true;
                }
            starts.push_back(static_cast<int32_t>(values.size()));
            bias.push_back(uniform());
        }
    }
};

void linear(Problem& p, int64_t batch, bool wide, bool turned, bool biased, int threads) {
    const int64_t panel = lr_panel(), panels = (batch + panel - 1) / panel, nnz = p.values.size();
    const void* columns = wide ? static_cast<void*>(p.wide.data()) : p.narrow.data();
    const float* bias = biased ? p.bias.data() : nullptr;
    auto x = random_floats(batch * p.inputs), gradient = random_floats(batch * p.outputs);
    const int64_t row = turned ? 1 : p.inputs, column = turned ? batch : 1;
    Array<float> xs(panels * p.inputs * panel), gs(panels * p.outputs * panel), y(batch * p.outputs);
    Array<float> again(batch * p.outputs), compact(nnz), into(p.outputs * p.inputs), gathered(nnz);
    for (int64_t i = 0; i < into.size; ++i) into[i] = 7.0f;
    lr_pack(x.get(), batch, p.inputs, row, column, xs.get(), threads);
    lr_pack(gradient.get(), batch, p.outputs, p.outputs, 1, gs.get(), threads);
    lr_spmm(xs.get(), batch, p.inputs, p.starts.data(), columns, wide, p.values.data(), bias, p.outputs, y.get(),
            p.outputs, threads);
    lr_spmv(x.get(), batch, row, column, p.starts.data(), columns, wide, p.values.data(), bias, p.outputs,
            again.get(), p.outputs, threads);
    lr_sddmm(gs.get(), xs.get(), batch, p.inputs, p.outputs, p.starts.data(), columns, wide, compact.get(),
             turned ? nullptr : into.get(), threads);
    lr_gather(p.dense.data(), p.inputs, p.outputs, p.starts.data(), columns, wide, gathered.get(), threads);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t o = 0; o < p.outputs; ++o) {
            double wanted = biased ? p.bias[o] : 0.0;
            for (int64_t i = 0; i < p.inputs; ++i)
                wanted += static_cast<double>(p.dense[o * p.inputs + i]) * x[b * row + i * column];
            near("spmm", y[b * p.outputs + o], wanted, p.inputs);
            near("spmv", again[b * p.outputs + o], wanted, p.inputs);
        }
    int64_t k = 0;
    for (int64_t o = 0; o < p.outputs; ++o)
        for (int64_t i = 0; i < p.inputs; ++i) {
            if (!p.active[o * p.inputs + i]) {
                near("untouched", into[o * p.inputs + i], 7.0, 0);
                continue;
            }
            double wanted = 0.0;
            for (int64_t b = 0; b < batch; ++b)
                wanted += static_cast<double>(gradient[b * p.outputs + o]) * x[b * row + i * column];
            near("sddmm", compact[k], wanted, batch);
            if (!turned) near("sddmm into", into[o * p.inputs + i], wanted, batch);
            near("gather", gathered[k], p.values[k], 0);
            ++k;
        }
    Array<float> scattered(p.outputs * p.inputs), permuted(nnz);
    for (int64_t i = 0; i < scattered.size; ++i) scattered[i] = 0.0f;
    lr_scatter(p.values.data(), p.inputs, p.outputs, p.starts.data(), columns, wide, scattered.get(), threads);
    for (int64_t i = 0; i < scattered.size; ++i) near("scatter", scattered[i], p.dense[i], 0);
    std::vector<int32_t> backwards;
    for (int64_t i = nnz; i > 0; --i) backwards.push_back(static_cast<int32_t>(i - 1));
    lr_permute(p.values.data(), backwards.data(), nnz, permuted.get(), threads);
    for (int64_t i = 0; i < nnz; ++i) near("permute", permuted[i], p.values[nnz - 1 - i], 0);
}

void convolution(Problem& p, int64_t images, int64_t pixels, int threads) {
    auto x = random_floats(images * p.inputs * pixels);
    Array<float> y(images * p.outputs * pixels);
    lr_conv1x1(x.get(), images, pixels, p.inputs * pixels, p.starts.data(), p.wide.data(), 1,
               p.values.data(), p.bias.data(), p.outputs, y.get(), threads);
    for (int64_t n = 0; n < images; ++n)
        for (int64_t o = 0; o < p.outputs; ++o)
            for (int64_t q = 0; q < pixels; ++q) {
                double wanted = p.bias[o];
                for (int64_t i = 0; i < p.inputs; ++i)
                    wanted += static_cast<double>(p.dense[o * p.inputs + i]) * x[(n * p.inputs + i) * pixels + q];
                near("conv1x1", y[(n * p.outputs + o) * pixels + q], wanted, p.inputs);
            }
}

}  // namespace

int main() {
    const int64_t shapes[][2] = {{0, 0}, {0, 5}, {5, 0}, {1, 1}, {15, 17}, {16, 64}, {17, 65}, {33, 130}, {70, 200}};
    for (const auto& shape : shapes)
        for (double density : {0.0, 0.1, 1.0}) {
            Problem problem(shape[0], shape[1], density);
            for (int64_t batch : {0, 1, 2, 15, 16, 17, 31, 32, 33, 64, 97})
                for (int threads : {1, 3})
                    linear(problem, batch, batch % 2, batch % 3 == 1, batch % 5 != 2, threads);
            for (int64_t pixels : {0, 1, 3, 4, 5, 15, 16, 17, 49, 63, 64, 65, 129, 196})
                for (int64_t images : {0, 1, 3}) convolution(problem, images, pixels, 2);
        }
    std::printf("%s: %d differences\n", lr_isa(), failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
