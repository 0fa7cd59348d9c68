// Masks as the kernels read them: bools (bytes of 0 and 1) made into words of 64 bits, and back.
#pragma once

#include <cstdlib>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "vectors.h"

namespace lr {

constexpr int64_t kBlock = 64;  // connections in a word, the first in the lowest bit

template <class T>
struct Buffer {  // memory without exceptions: whoever makes one asks whether there was any
    T* at;
    explicit Buffer(int64_t size) : at(static_cast<T*>(std::malloc(size * sizeof(T) + 64))) {}
    ~Buffer() { std::free(at); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
};

inline uint64_t word_of(const uint8_t* bools) {
#if defined(__AVX512BW__)
    const __m512i bytes = _mm512_loadu_si512(bools);
    return _mm512_test_epi8_mask(bytes, bytes);
#else
    uint64_t word = 0;
    for (int byte = 0; byte < 8; ++byte) {
        uint64_t eight;
        std::memcpy(&eight, bools + 8 * byte, 8);
        word |= (eight * 0x0102040810204080u) >> 56 << (8 * byte);
    }
    return word;
#endif
}

inline uint64_t word_of(const uint8_t* bools, int64_t length) {  // of fewer than 64
    uint64_t word = 0;
    for (int64_t i = 0; i < length; ++i) word |= static_cast<uint64_t>(bools[i]) << i;
    return word;
}

inline void spread(uint64_t word, uint8_t* bools) {  // the way back
#if defined(__AVX512BW__)
    _mm512_storeu_si512(bools, _mm512_maskz_set1_epi8(word, 1));
#else
    for (int byte = 0; byte < 8; ++byte) {
        const uint64_t copies = ((word >> (8 * byte)) & 255) * 0x0101010101010101u & 0x8040201008040201u;
        const uint64_t eight = (copies + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
        std::memcpy(bools + 8 * byte, &eight, 8);
    }
#endif
}

inline void spread(uint64_t word, uint8_t* bools, int64_t length) {
    for (int64_t i = 0; i < length; ++i) bools[i] = word >> i & 1;
}

inline int64_t count_marked(const uint8_t* mask, int64_t size) {
    int64_t total = 0, place = 0;
    for (; place + kBlock <= size; place += kBlock) total += __builtin_popcountll(word_of(mask + place));
    return total + __builtin_popcountll(word_of(mask + place, size - place));
}

}  // namespace lr
