// What the drivers share: numbers, memory that a sanitizer watches, a sparse layer, and how a difference is told.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

extern "C" const char* lr_isa(void);

inline uint32_t state = 1;
inline uint32_t number() { return state = state * 1664525u + 1013904223u; }
inline float uniform() { return static_cast<float>(number() >> 8) / (1 << 23) - 1.0f; }
inline float whole() { return static_cast<float>(number() >> 28) - 8.0f; }  // sums of products of these are exact
inline bool chance(double probability) { return number() / 4294967296.0 < probability; }

// Memory of exactly so many elements, aligned to one element only; a sanitizer watches its end. As a tensor's,
// its address is null where there are none.
template <typename T>
struct Array {
    explicit Array(int64_t n) : memory(new T[n + 1]), size(n) {}
    template <typename Make>
    Array(int64_t n, const Make& make) : Array(n) {
        for (int64_t i = 0; i < n; ++i) (*this)[i] = make();
    }
    T* get() { return size ? memory.get() + 1 : nullptr; }
    T& operator[](int64_t i) { return memory[i + 1]; }
    std::unique_ptr<T[]> memory;
    int64_t size;
};

inline int failures = 0;
inline void near(const char* what, double found, double wanted, int64_t terms) {
    if (std::fabs(found - wanted) <= 1e-6 * (terms + 8)) return;
    if (++failures < 20) std::printf("%s: %g, and plain loops give %g\n", what, found, wanted);
}
inline void same(const char* what, double found, double wanted) {
    if (found == wanted) return;
    if (++failures < 20) std::printf("%s: %.9g, and plain loops give %.9g\n", what, found, wanted);
}
inline int outcome() {
    std::printf("%s: %d differences\n", lr_isa(), failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}

// A layer of which every third row has no connection, from row `empty` on.
struct Problem {
    int64_t outputs, inputs;
    std::vector<float> dense;  // zeros where there is no connection
    std::vector<bool> active;
    std::vector<int32_t> starts{0};
    std::vector<int32_t> wide;
    std::vector<uint16_t> narrow;
    std::vector<float> values, bias;

    template <typename Make>
    Problem(int64_t o, int64_t i, double density, int64_t empty, const Make& make)
        : outputs(o), inputs(i), dense(o * i), active(o * i) {
        for (int64_t row = 0; row < o; ++row) {
            for (int64_t column = 0; column < i; ++column)
                if (row % 3 != empty && chance(density)) {
                    wide.push_back(static_cast<int32_t>(column));
                    narrow.push_back(static_cast<uint16_t>(column));
                    values.push_back(dense[row * i + column] = make());
                    active[row * i + column] = true;
                }
            starts.push_back(static_cast<int32_t>(values.size()));
            bias.push_back(make());
        }
    }
    const void* columns(bool as_wide) const { return as_wide ? static_cast<const void*>(wide.data()) : narrow.data(); }
    int64_t count() const { return static_cast<int64_t>(values.size()); }
};
