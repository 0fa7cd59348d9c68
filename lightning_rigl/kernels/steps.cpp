// Optimizer steps over active connections only, operation by operation as torch's dense steps of one tensor.
//
// The order of roundings is theirs: where torch fuses a product and a sum, so does `fused`, and the compiler
// must fuse nothing else.
#include "vectors.h"

#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

namespace {

constexpr int kBlock = 256;  // connections worked on together, in the first level of cache

inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;  // torch has nothing else there either
#endif
}

// Where the connections are, and what a step reads and writes besides its own state.
struct Layer {
    float* weights;       // dense
    const float* grads;   // dense, or one each connection
    bool compact;         // the latter
    float* values;        // of the connections after the step, or null
    const int32_t* starts;
    const void* columns;
    int64_t rows, inputs;
    bool negated;  // gradients are to be followed upwards
};

struct Block {
    int64_t places[kBlock];
    float weights[kBlock], grads[kBlock];
};

inline int64_t row_of(const Layer& layer, int64_t connection) {
    int64_t low = 0, high = layer.rows;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (layer.starts[middle] <= connection ? low : high) = middle;
    }
    return low;
}

// The arithmetic is `rule(block, first, size)`: weights and grads of `size` connections from `first` on.
template <class Column, class Rule>
void walk(const Layer& layer, int64_t begin, int64_t end, const Rule& rule) {
    const auto* columns = static_cast<const Column*>(layer.columns);
    Block block;
    int64_t row = row_of(layer, begin);
    for (int64_t first = begin; first < end; first += kBlock) {
        const int64_t last = lr::least(first + kBlock, end), size = last - first;
        for (int64_t k = first; k < last; ++row) {
            const int64_t stop = lr::least(last, layer.starts[row + 1]), offset = row * layer.inputs;
            for (; k < stop; ++k) block.places[k - first] = offset + columns[k];
            if (k == last && layer.starts[row + 1] > last) break;
        }
        for (int64_t i = 0; i < size; ++i) block.weights[i] = layer.weights[block.places[i]];
        if (layer.compact)
            std::memcpy(block.grads, layer.grads + first, size * sizeof(float));
        else
            for (int64_t i = 0; i < size; ++i) block.grads[i] = layer.grads[block.places[i]];
        if (layer.negated)
            for (int64_t i = 0; i < size; ++i) block.grads[i] = -block.grads[i];
        rule(block, first, size);
        for (int64_t i = 0; i < size; ++i) layer.weights[block.places[i]] = block.weights[i];
        if (layer.values) std::memcpy(layer.values + first, block.weights, size * sizeof(float));
    }
}

template <class Rule>
void step(const Layer& layer, int wide, int threads, const Rule& rule) {
    const int64_t total = layer.starts[layer.rows];
    const int parts = lr::useful_threads(threads, total * 2);
#pragma omp parallel for num_threads(parts) schedule(static, 1)
    for (int part = 0; part < parts; ++part) {
        const int64_t begin = total * part / parts, end = total * (part + 1) / parts;
        if (begin == end) continue;
        if (wide)
            walk<int32_t>(layer, begin, end, rule);
        else
            walk<uint16_t>(layer, begin, end, rule);
    }
}

inline void add_decay(Block& block, int64_t size, float decay) {
    if (decay == 0) return;  // else an infinite weight would make a nan
    for (int64_t i = 0; i < size; ++i) block.grads[i] = fused(decay, block.weights[i], block.grads[i]);
}

}  // namespace

// SGD. `velocity` has a number for each connection, or is null without momentum; with `first` it is written
// only. `kept` is 1 - dampening.
LR_EXPORT void lr_sgd(float* weights, const float* grads, int compact, float* velocity, float* values,
                      const int32_t* starts, const void* columns, int wide, int64_t rows, int64_t inputs,
                      float rate, float momentum, float kept, float decay, int nesterov, int maximize,
                      int first, int threads) {
    const Layer layer{weights, grads, compact != 0, values, starts, columns, rows, inputs, maximize != 0};
    step(layer, wide, threads, [=](Block& block, int64_t begin, int64_t size) {
        add_decay(block, size, decay);
        if (velocity) {
            float* mine = velocity + begin;
            if (first)
                std::memcpy(mine, block.grads, size * sizeof(float));
            else
                for (int64_t i = 0; i < size; ++i) mine[i] = fused(kept, block.grads[i], mine[i] * momentum);
            if (nesterov)
                for (int64_t i = 0; i < size; ++i) block.grads[i] = fused(momentum, mine[i], block.grads[i]);
            else
                std::memcpy(block.grads, mine, size * sizeof(float));
        }
        for (int64_t i = 0; i < size; ++i) block.weights[i] = fused(-rate, block.grads[i], block.weights[i]);
    });
}

// Adam with decoupled decay (`shrink` is what weights are multiplied by first) or with L2 (`decay`); `toward`
// is 1 - beta1, `fresh` 1 - beta2, `correction` the root of 1 - beta2^step, `rate` lr / (1 - beta1^step).
LR_EXPORT void lr_adam(float* weights, const float* grads, int compact, float* mean, float* square,
                       float* values, const int32_t* starts, const void* columns, int wide, int64_t rows,
                       int64_t inputs, float rate, float toward, float beta2, float fresh, float correction,
                       float epsilon, float shrink, float decay, int maximize, int threads) {
    const Layer layer{weights, grads, compact != 0, values, starts, columns, rows, inputs, maximize != 0};
    const bool near = toward < 0.5f && toward > -0.5f;  // torch's lerp starts from the nearer end
    const float coefficient = near ? toward : toward - 1.0f;
    step(layer, wide, threads, [=](Block& block, int64_t begin, int64_t size) {
        float *m = mean + begin, *s = square + begin;
        for (int64_t i = 0; i < size; ++i) block.weights[i] *= shrink;
        add_decay(block, size, decay);
        for (int64_t i = 0; i < size; ++i) {
            const float grad = block.grads[i];
            m[i] = fused(coefficient, grad - m[i], near ? m[i] : grad);
            const float fading = s[i] * beta2;
            s[i] = fused(fresh * grad, grad, fading);
            const float bottom = __builtin_sqrtf(s[i]) / correction + epsilon;
            block.weights[i] += -rate * m[i] / bottom;
        }
    });
}
