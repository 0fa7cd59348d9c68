// Runs a linear layer's passes and the optimizers' steps over edge shapes and compares with plain loops. The
// numbers are whole or halves of them, so that all but Adam is exact in any order.
#include <limits>

#include "driver.h"

extern "C" {
int lr_panel(void);
int lr_transpose(const int32_t*, const void*, int, int64_t, int64_t, int32_t*, void*, int, int32_t*, int);
int lr_linear_forward(const float*, int64_t, int64_t, int64_t, int64_t, const float*, const int32_t*, const void*, int,
                      const float*, int64_t, float*, float*, int64_t, float*, int);
int lr_linear_backward(const float*, int64_t, int64_t, int64_t, int64_t, const float*, const float*, int64_t,
                       const int32_t*, const void*, int, const int32_t*, const void*, int, const int32_t*, int64_t,
                       float*, int64_t, float*, float*, float*, float*, int);
void lr_sgd(float*, const float*, int, float*, float*, const int32_t*, const void*, int, int64_t, int64_t, float, float,
            float, float, int, int, int, int);
void lr_adam(float*, const float*, int, float*, float*, float*, const int32_t*, const void*, int, int64_t, int64_t,
             float, float, float, float, float, float, float, float, int, int);
}

namespace {

constexpr float kUnwritten = 77.0f;
float unwritten() { return kUnwritten; }

struct Passes {  // of one layer and one batch
    const Problem& p;
    int64_t batch, rows;  // panels of examples
    bool wide, turned;    // turned: examples lie in columns
    int threads;
    Array<float> x, gradient, x_panels, values;

    Passes(const Problem& problem, int64_t b, bool w, bool t, int n)
        : p(problem), batch(b), rows((b + lr_panel() - 1) / lr_panel()), wide(w), turned(t), threads(n),
          x(b * p.inputs, whole), gradient(b * p.outputs, whole), x_panels(rows * p.inputs * lr_panel()),
          values(p.count()) {}

    int64_t place(int64_t example, int64_t feature, int64_t features) const {
        return turned ? feature * batch + example : example * features + feature;
    }
    int64_t row_stride(int64_t features) const { return turned ? 1 : features; }
    int64_t column_stride() const { return turned ? batch : 1; }

    int forward(const float* bias, Array<float>& y) {
        return lr_linear_forward(x.get(), batch, p.inputs, row_stride(p.inputs), column_stride(), p.dense.data(),
                                 p.starts.data(), p.columns(wide), wide, bias, p.outputs, values.get(), x_panels.get(),
                                 x_panels.size, y.get(), threads);
    }

    int backward(float* dx, float* compact, float* dense) {
        Array<int32_t> starts_t(p.inputs + 1), permutation(p.count()), rows_t(p.count());
        lr_transpose(p.starts.data(), p.columns(wide), wide, p.outputs, p.inputs, starts_t.get(), rows_t.get(), 1,
                     permutation.get(), 1);
        Array<float> panels(rows * p.outputs * lr_panel()), values_t(p.count());
        return lr_linear_backward(gradient.get(), batch, p.outputs, row_stride(p.outputs), column_stride(),
                                  x_panels.get(), values.get(), p.inputs, p.starts.data(), p.columns(wide), wide,
                                  starts_t.get(), rows_t.get(), 1, permutation.get(), p.count(), panels.get(),
                                  panels.size, dx ? values_t.get() : nullptr, dx, compact, dense, threads);
    }
};

void check_forward(Passes& run, bool biased) {
    const Problem& p = run.p;
    Array<float> y(run.batch * p.outputs, unwritten);
    same("forward", run.forward(biased ? p.bias.data() : nullptr, y), 1);
    for (int64_t k = 0; k < p.count(); ++k) same("forward, values", run.values[k], p.values[k]);
    for (int64_t b = 0; b < run.batch; ++b)
        for (int64_t o = 0; o < p.outputs; ++o) {
            float wanted = biased ? p.bias[o] : 0.0f;
            for (int64_t i = 0; i < p.inputs; ++i)
                wanted += p.dense[o * p.inputs + i] * run.x[run.place(b, i, p.inputs)];
            same("forward, y", y[b * p.outputs + o], wanted);
        }
}

void check_backward(Passes& run, bool into_dense) {
    const Problem& p = run.p;
    Array<float> dx(run.batch * p.inputs, unwritten), compact(p.count(), unwritten);
    Array<float> dense(p.outputs * p.inputs, unwritten), alone(p.count(), unwritten);
    same("backward", run.backward(dx.get(), compact.get(), into_dense ? dense.get() : nullptr), 1);
    same("backward, no dx", run.backward(nullptr, alone.get(), nullptr), 1);
    for (int64_t b = 0; b < run.batch; ++b)
        for (int64_t i = 0; i < p.inputs; ++i) {
            float wanted = 0.0f;
            for (int64_t o = 0; o < p.outputs; ++o)
                wanted += p.dense[o * p.inputs + i] * run.gradient[run.place(b, o, p.outputs)];
            same("backward, dx", dx[b * p.inputs + i], wanted);
        }
    int64_t k = 0;
    for (int64_t o = 0; o < p.outputs; ++o)
        for (int64_t i = 0; i < p.inputs; ++i) {
            const bool active = p.active[o * p.inputs + i];
            float wanted = active ? 0.0f : kUnwritten;
            for (int64_t b = 0; active && b < run.batch; ++b)
                wanted += run.gradient[run.place(b, o, p.outputs)] * run.x[run.place(b, i, p.inputs)];
            same("backward, dense", dense[o * p.inputs + i], into_dense ? wanted : kUnwritten);
            if (!active) continue;
            same("backward, compact", compact[k], wanted);
            same("backward, compact alone", alone[k++], wanted);
        }
}

void check_refusals(Passes& run, float bad) {  // of numbers that are not finite, wherever they are
    Array<float> y(run.batch * run.p.outputs, unwritten), dx(run.batch * run.p.inputs, unwritten);
    if (run.gradient.size) {
        run.gradient[number() % run.gradient.size] = bad;
        same("backward, refused", run.backward(dx.get(), nullptr, nullptr), dx.get() ? 0 : 1);
    }
    if (run.x.size) {
        run.x[number() % run.x.size] = bad;
        same("forward, refused", run.forward(nullptr, y), 0);
    }
    for (int64_t i = 0; i < y.size; ++i)
        if (run.x.size) same("forward, refused y", y[i], kUnwritten);
    for (int64_t i = 0; i < dx.size; ++i) same("backward, refused dx", dx[i], kUnwritten);
}

struct Step {  // of one layer: the dense weights and gradients, and what the step may leave behind
    const Problem& p;
    bool compact, wide, maximize;
    Array<float> weights, grads, kept;
    std::vector<int64_t> places;

    Step(const Problem& problem, int variant)
        : p(problem), compact(variant & 1), wide(variant & 2), maximize(variant & 4),
          weights(p.outputs * p.inputs, whole), grads(compact ? p.count() : weights.size, whole),
          kept(p.count(), unwritten) {
        for (int64_t place = 0; place < weights.size; ++place)
            if (p.active[place]) places.push_back(place);
    }
    double grad(int64_t k) { return grads[compact ? k : places[k]] * (maximize ? -1.0 : 1.0); }

    // Compares active weights by `check(k, found)`; the others must be as before.
    template <typename Check>
    void compare(Array<float>& before, const Check& check) {
        int64_t k = 0;
        for (int64_t place = 0; place < weights.size; ++place) {
            if (!p.active[place]) {
                same("step, inactive", weights[place], before[place]);
                continue;
            }
            same("step, values", kept[k], weights[place]);
            check(k++, before[place], weights[place]);
        }
    }
};

Array<float> copy_of(Array<float>& from) {
    int64_t i = 0;
    return Array<float>(from.size, [&] { return from[i++]; });
}

void sgd(const Problem& p, int variant, int threads) {
    Step s(p, variant);
    const bool momentum = variant & 8, first = variant & 16, nesterov = momentum && variant & 32;
    const double decay = variant & 64 ? 0.25 : 0.0;
    Array<float> velocity(p.count(), whole);
    auto before = copy_of(s.weights), old = copy_of(velocity);
    lr_sgd(s.weights.get(), s.grads.get(), s.compact, momentum ? velocity.get() : nullptr, s.kept.get(),
           p.starts.data(), p.columns(s.wide), s.wide, p.outputs, p.inputs, 0.5f, 0.5f, 0.75f, decay, nesterov,
           s.maximize, first, threads);
    s.compare(before, [&](int64_t k, double was, double found) {
        const double g = s.grad(k) + decay * was, v = first ? g : 0.5 * old[k] + 0.75 * g;
        same("sgd", found, was - 0.5 * (nesterov ? g + 0.5 * v : momentum ? v : g));
        same("sgd, velocity", velocity[k], momentum ? v : old[k]);
    });
}

void adam(const Problem& p, int variant, int threads) {
    Step s(p, variant);
    const double toward = variant & 8 ? 0.75 : 0.125, shrink = variant & 16 ? 0.5 : 1.0;
    const double decay = variant & 32 ? 0.25 : 0.0;
    Array<float> mean(p.count(), whole), square(p.count(), [] { return whole() + 8.0f; });
    auto before = copy_of(s.weights), m = copy_of(mean), v = copy_of(square);
    lr_adam(s.weights.get(), s.grads.get(), s.compact, mean.get(), square.get(), s.kept.get(), p.starts.data(),
            p.columns(s.wide), s.wide, p.outputs, p.inputs, 0.125f, toward, 0.5f, 0.5f, 0.75f, 0.25f, shrink, decay,
            s.maximize, threads);
    s.compare(before, [&](int64_t k, double was, double found) {
        const double g = s.grad(k) + decay * shrink * was;
        const double next_m = m[k] + toward * (g - m[k]), next_v = 0.5 * v[k] + 0.5 * g * g;
        same("adam, mean", mean[k], next_m);
        same("adam, square", square[k], next_v);
        near("adam", found, shrink * was - 0.125 * next_m / (std::sqrt(next_v) / 0.75 + 0.25), 8);
    });
}

}  // namespace

int main() {
    const int64_t shapes[][2] = {{0, 0}, {0, 5}, {5, 0}, {1, 1}, {15, 17}, {16, 64}, {17, 65}, {33, 130}, {70, 200}};
    for (const auto& shape : shapes)
        for (double density : {0.0, 0.1, 1.0}) {
            const Problem p(shape[0], shape[1], density, shape[0] % 2, whole);
            for (int64_t batch : {0, 1, 15, 16, 17, 31, 32, 33, 65})
                for (int threads : {1, 3}) {
                    Passes run(p, batch, batch % 2, batch % 3 == 1, threads);
                    check_forward(run, batch % 5 != 2);
                    check_backward(run, batch % 4 != 1);
                    check_refusals(run, batch % 2 ? std::numeric_limits<float>::quiet_NaN()
                                                  : -std::numeric_limits<float>::infinity());
                }
            for (int variant = 0; variant < 128; ++variant) sgd(p, variant, 1);
            for (int variant = 0; variant < 64; ++variant) adam(p, variant, 1);
        }
    const Problem large(300, 400, 0.9, 2, whole);  // worth three threads
    for (int variant : {0, 3, 25, 126}) sgd(large, variant, 3);
    for (int variant : {0, 3, 25, 62}) adam(large, variant, 3);
    return outcome();
}
