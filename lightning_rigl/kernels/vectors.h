// What the kernels share: a vector of floats as wide as the target's registers, and how many threads to wake.
//
// GCC's and Clang's vector extensions give one source for AVX-512, AVX2, NEON and plain SSE2.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#define LR_ISA "avx512"
#define LR_WIDTH 16
#elif defined(__AVX2__) && defined(__FMA__)
#define LR_ISA "avx2"
#define LR_WIDTH 8
#elif defined(__ARM_NEON)
#define LR_ISA "neon"
#define LR_WIDTH 4
#else
#define LR_ISA "generic"
#define LR_WIDTH 4
#endif

#define LR_EXPORT extern "C" __attribute__((visibility("default")))

namespace lr {

constexpr int kWidth = LR_WIDTH;  // floats a register holds

// Unaligned, and allowed to alias floats: a load or a store is a plain dereference.
typedef float Vector __attribute__((vector_size(LR_WIDTH * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(LR_WIDTH * 4), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector v) { *reinterpret_cast<Vector*>(to) = v; }
inline Vector broadcast(float v) { return v - Vector{}; }  // -0.0 - 0.0 is -0.0

// Lane i of the result is lane Lane[i] of a and b together.
template <int... Lane>
inline Vector pick(Vector a, Vector b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, Lane...);
#else
    return __builtin_shuffle(a, b, Integers{Lane...});
#endif
}

using Lanes = std::make_integer_sequence<int, kWidth>;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads worth waking for this much work (multiplications, or floats moved): 1 in a forked child, where the
// threads of the OpenMP runtime do not exist any more and waiting for them would never end.
int useful_threads(int asked, int64_t work);

}  // namespace lr
