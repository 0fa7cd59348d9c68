// Runs the products over edge shapes and compares with plain loops; built with sanitizers and for other CPUs.
#include "driver.h"

extern "C" {
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

void linear(Problem& p, int64_t batch, bool wide, bool turned, bool biased, int threads) {
    const int64_t panel = lr_panel(), panels = (batch + panel - 1) / panel, nnz = p.count();
    const void* columns = p.columns(wide);
    const float* bias = biased ? p.bias.data() : nullptr;
    Array<float> x(batch * p.inputs, uniform), gradient(batch * p.outputs, uniform);
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
    Array<float> x(images * p.inputs * pixels, uniform);
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
            Problem problem(shape[0], shape[1], density, 1, uniform);
            for (int64_t batch : {0, 1, 2, 15, 16, 17, 31, 32, 33, 64, 97})
                for (int threads : {1, 3})
                    linear(problem, batch, batch % 2, batch % 3 == 1, batch % 5 != 2, threads);
            for (int64_t pixels : {0, 1, 3, 4, 5, 15, 16, 17, 49, 63, 64, 65, 129, 196})
                for (int64_t images : {0, 1, 3}) convolution(problem, images, pixels, 2);
        }
    return outcome();
}
