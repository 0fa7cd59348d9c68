// A layer's index structure, of its mask and of the mask transposed; and masks of one bit a connection.
#include "bools.h"

namespace {

using lr::Buffer;
using lr::kBlock;

// Calls `found` with the column of each connection of a row, in order.
template <class Found>
inline void each_marked(const uint8_t* row, int64_t columns, Found found) {
    for (int64_t column = 0; column < columns; column += kBlock) {
        const int64_t length = lr::least(kBlock, columns - column);
        uint64_t word = length == kBlock ? lr::word_of(row + column) : lr::word_of(row + column, length);
        for (; word; word &= word - 1) found(column + __builtin_ctzll(word));
    }
}

bool point(const uint8_t* mask, int64_t rows, int64_t columns, int32_t* starts, int threads) {
    starts[0] = 0;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row)
        starts[row + 1] = static_cast<int32_t>(lr::count_marked(mask + row * columns, columns));
    int64_t total = 0;
    for (int64_t row = 0; row < rows; ++row) {
        total += starts[row + 1];
        if (total > INT32_MAX) return false;
        starts[row + 1] = static_cast<int32_t>(total);
    }
    return true;
}

template <class Column>
void list(const uint8_t* mask, int64_t rows, int64_t columns, const int32_t* starts, Column* into,
          int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        Column* next = into + starts[row];
        each_marked(mask + row * columns, columns,
                    [&](int64_t column) { *next++ = static_cast<Column>(column); });
    }
}

// Every stretch of rows counts its columns, then writes where the stretches before it end: in order of rows.
template <class Column, class Row>
bool transpose(const int32_t* starts, const Column* columns, int64_t rows, int64_t inputs, int32_t* starts_t,
               Row* rows_t, int32_t* permutation, int threads) {
    const int parts = lr::useful_threads(threads, lr::most(0, starts[rows] / 2 - inputs));
    Buffer<int32_t> places(inputs * parts);
    if (!places.at) return false;
#pragma omp parallel for num_threads(parts) schedule(static, 1)
    for (int part = 0; part < parts; ++part) {
        int32_t* mine = places.at + part * inputs;
        std::memset(mine, 0, inputs * sizeof(int32_t));
        for (int64_t k = starts[rows * part / parts], end = starts[rows * (part + 1) / parts]; k < end; ++k)
            ++mine[columns[k]];
    }
    int32_t total = 0;
    for (int64_t input = 0; input < inputs; ++input) {
        starts_t[input] = total;
        for (int part = 0; part < parts; ++part) {
            const int32_t count = places.at[part * inputs + input];
            places.at[part * inputs + input] = total;
            total += count;
        }
    }
    starts_t[inputs] = total;
#pragma omp parallel for num_threads(parts) schedule(static, 1)
    for (int part = 0; part < parts; ++part) {
        int32_t* mine = places.at + part * inputs;
        for (int64_t row = rows * part / parts, end = rows * (part + 1) / parts; row < end; ++row)
            for (int32_t k = starts[row]; k < starts[row + 1]; ++k) {
                const int32_t place = mine[columns[k]]++;
                rows_t[place] = static_cast<Row>(row);
                permutation[place] = k;
            }
    }
    return true;
}

// A dense row between the two orders: no comparing of columns, whose outcome no branch predictor would guess.
template <class Column>
bool carry(const int32_t* starts, const Column* columns, const float* values, const int32_t* new_starts,
           const Column* new_columns, int64_t rows, int64_t inputs, float* new_values, int threads) {
    const int parts = lr::useful_threads(threads, int64_t{2} * new_starts[rows]);
    Buffer<float> dense(inputs * parts);
    if (!dense.at) return false;
    std::memset(dense.at, 0, inputs * parts * sizeof(float));
#pragma omp parallel for num_threads(parts) schedule(static, 1)
    for (int part = 0; part < parts; ++part) {
        float* mine = dense.at + part * inputs;
        for (int64_t row = rows * part / parts, end = rows * (part + 1) / parts; row < end; ++row) {
            for (int32_t k = starts[row]; k < starts[row + 1]; ++k) mine[columns[k]] = values[k];
            for (int32_t k = new_starts[row]; k < new_starts[row + 1]; ++k)
                new_values[k] = mine[new_columns[k]];
            for (int32_t k = starts[row]; k < starts[row + 1]; ++k) mine[columns[k]] = 0.0f;
        }
    }
    return true;
}

}  // namespace

// Row pointers (int32, rows + 1) of a mask. Gives the number of connections, -1 if int32 cannot count them.
LR_EXPORT int64_t lr_starts(const uint8_t* mask, int64_t rows, int64_t columns, int32_t* starts,
                            int threads) {
    const int useful = lr::useful_threads(threads, rows * columns / 8);
    return point(mask, rows, columns, starts, useful) ? starts[rows] : -1;
}

// The columns of the connections in row-major order, uint16 or (wide) int32; `starts` as lr_starts gave them.
LR_EXPORT void lr_columns(const uint8_t* mask, int64_t rows, int64_t columns, const int32_t* starts,
                          void* into, int wide, int threads) {
    const int useful = lr::useful_threads(threads, rows * columns / 8 + starts[rows]);
    if (wide)
        list(mask, rows, columns, starts, static_cast<int32_t*>(into), useful);
    else
        list(mask, rows, columns, starts, static_cast<uint16_t*>(into), useful);
}

// The structure of the transposed matrix; permutation[k] is the place in row-major order of its k-th
// connection. 0, or -1: no memory.
LR_EXPORT int lr_transpose(const int32_t* starts, const void* columns, int wide, int64_t rows, int64_t inputs,
                           int32_t* starts_t, void* rows_t, int wide_t, int32_t* permutation, int threads) {
    const auto* narrow = static_cast<const uint16_t*>(columns);
    const auto* broad = static_cast<const int32_t*>(columns);
    auto* narrow_t = static_cast<uint16_t*>(rows_t);
    auto* broad_t = static_cast<int32_t*>(rows_t);
    bool done;
    if (wide && wide_t)
        done = transpose(starts, broad, rows, inputs, starts_t, broad_t, permutation, threads);
    else if (wide)
        done = transpose(starts, broad, rows, inputs, starts_t, narrow_t, permutation, threads);
    else if (wide_t)
        done = transpose(starts, narrow, rows, inputs, starts_t, broad_t, permutation, threads);
    else
        done = transpose(starts, narrow, rows, inputs, starts_t, narrow_t, permutation, threads);
    return done ? 0 : -1;
}

// A number for each connection of a new structure: that of the old one where it had the connection, else 0.
// 0, or -1: no memory.
LR_EXPORT int lr_carry(const int32_t* starts, const void* columns, const float* values,
                       const int32_t* new_starts, const void* new_columns, int wide, int64_t rows,
                       int64_t inputs, float* new_values, int threads) {
    bool done;
    if (wide)
        done = carry(starts, static_cast<const int32_t*>(columns), values, new_starts,
                     static_cast<const int32_t*>(new_columns), rows, inputs, new_values, threads);
    else
        done = carry(starts, static_cast<const uint16_t*>(columns), values, new_starts,
                     static_cast<const uint16_t*>(new_columns), rows, inputs, new_values, threads);
    return done ? 0 : -1;
}

// Eight connections a byte, the first in the lowest bit; bits past the end are 0.
LR_EXPORT void lr_pack_bits(const uint8_t* mask, int64_t size, uint8_t* bits, int threads) {
    const int parts = lr::useful_threads(threads, size / 16);
#pragma omp parallel for num_threads(parts) schedule(static)
    for (int64_t block = 0; block < lr::ceil_div(size, kBlock); ++block) {
        const int64_t length = lr::least(kBlock, size - block * kBlock);
        const uint8_t* from = mask + block * kBlock;
        const uint64_t word = length == kBlock ? lr::word_of(from) : lr::word_of(from, length);
        for (int64_t byte = 0; byte < lr::ceil_div(length, 8); ++byte)
            bits[block * 8 + byte] = word >> (8 * byte);
    }
}

// +0.0 where the bit is 0, whatever was there, nan included.
LR_EXPORT void lr_and_bits(float* values, const uint8_t* bits, int64_t size, int threads) {
    lr::Integers lane;
    for (int i = 0; i < LR_WIDTH; ++i) lane[i] = 1 << i;
    const int64_t blocks = size / kBlock;
    const int parts = lr::useful_threads(threads, size / 4);
#pragma omp parallel for num_threads(parts) schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
        uint64_t word;
        std::memcpy(&word, bits + block * 8, 8);
        for (int64_t j = 0; j < kBlock; j += lr::kWidth) {
            lr::Integers* at = reinterpret_cast<lr::Integers*>(values + block * kBlock + j);  // auto forgets aligned
            const int32_t some = static_cast<int32_t>(word >> j & ((1u << LR_WIDTH) - 1));
            *at &= ((lr::Integers{} + some) & lane) != 0;
        }
    }
    for (int64_t i = blocks * kBlock; i < size; ++i)
        if (!(bits[i >> 3] >> (i & 7) & 1)) values[i] = 0.0f;
}
