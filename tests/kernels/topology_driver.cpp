// Runs selection, index structures and masks of bits over edge sizes and compares with plain loops, exactly.
#include <algorithm>
#include <cstring>
#include <limits>

#include "driver.h"

extern "C" {
int64_t lr_count(const uint8_t*, int64_t);
int64_t lr_top(const float*, const uint8_t*, int64_t, int64_t, uint8_t*, int);
int64_t lr_starts(const uint8_t*, int64_t, int64_t, int32_t*, int);
void lr_columns(const uint8_t*, int64_t, int64_t, const int32_t*, void*, int, int);
int lr_transpose(const int32_t*, const void*, int, int64_t, int64_t, int32_t*, void*, int, int32_t*, int);
int lr_carry(const int32_t*, const void*, const float*, const int32_t*, const void*, int, int64_t, int64_t, float*,
             int);
void lr_pack_bits(const uint8_t*, int64_t, uint8_t*, int);
void lr_and_bits(float*, const uint8_t*, int64_t, int);
}

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
constexpr uint8_t kUnwritten = 9;

template <typename Index>
void same_all(const char* what, Array<Index>& found, const std::vector<Index>& wanted) {
    same(what, found.size, wanted.size());
    for (int64_t i = 0; i < found.size; ++i) same(what, found[i], wanted[i]);
}

Array<uint8_t> mask_of(const Problem& p) {
    Array<uint8_t> mask(p.outputs * p.inputs);
    for (int64_t i = 0; i < mask.size; ++i) mask[i] = p.active[i];
    return mask;
}

template <typename Index>
void structure(const Problem& p, const std::vector<Index>& wanted, int threads) {
    constexpr int wide = sizeof(Index) == 4;
    auto mask = mask_of(p);
    Array<int32_t> starts(p.outputs + 1);
    Array<Index> columns(p.count());
    same("count", lr_count(mask.get(), mask.size), p.count());
    same("starts, total", lr_starts(mask.get(), p.outputs, p.inputs, starts.get(), threads), p.count());
    same_all("starts", starts, p.starts);
    lr_columns(mask.get(), p.outputs, p.inputs, starts.get(), columns.get(), wide, threads);
    same_all("columns", columns, wanted);
}

template <typename Row>
void transposed(const Problem& p, bool wide, int threads) {
    std::vector<std::vector<int32_t>> of_input(p.inputs), rows_of_input(p.inputs);
    for (int64_t row = 0; row < p.outputs; ++row)
        for (int32_t k = p.starts[row]; k < p.starts[row + 1]; ++k) {
            of_input[p.wide[k]].push_back(k);
            rows_of_input[p.wide[k]].push_back(static_cast<int32_t>(row));
        }
    std::vector<int32_t> starts{0}, permutation;
    std::vector<Row> rows;
    for (int64_t input = 0; input < p.inputs; ++input) {
        permutation.insert(permutation.end(), of_input[input].begin(), of_input[input].end());
        rows.insert(rows.end(), rows_of_input[input].begin(), rows_of_input[input].end());
        starts.push_back(static_cast<int32_t>(rows.size()));
    }
    Array<int32_t> starts_t(p.inputs + 1), into(p.count());
    Array<Row> rows_t(p.count());
    const int failed = lr_transpose(p.starts.data(), p.columns(wide), wide, p.outputs, p.inputs, starts_t.get(),
                                    rows_t.get(), sizeof(Row) == 4, into.get(), threads);
    same("transpose", failed, 0);
    same_all("transpose, starts", starts_t, starts);
    same_all("transpose, rows", rows_t, rows);
    same_all("transpose, permutation", into, permutation);
}

void carried(const Problem& old, const Problem& fresh, bool wide, int threads) {
    Array<float> values(old.count()), moved(fresh.count());
    for (int64_t k = 0; k < values.size; ++k) values[k] = old.values[k];
    const int failed = lr_carry(old.starts.data(), old.columns(wide), values.get(), fresh.starts.data(),
                                fresh.columns(wide), wide, old.outputs, old.inputs, moved.get(), threads);
    same("carry", failed, 0);
    for (int64_t row = 0; row < fresh.outputs; ++row)
        for (int32_t k = fresh.starts[row]; k < fresh.starts[row + 1]; ++k)
            same("carry, values", moved[k], old.dense[row * old.inputs + fresh.wide[k]]);
}

void bits(int64_t size, double density, int threads) {
    Array<uint8_t> mask(size, [=] { return chance(density); }), packed((size + 7) / 8);
    lr_pack_bits(mask.get(), size, packed.get(), threads);
    for (int64_t byte = 0; byte < packed.size; ++byte) {
        int wanted = 0;
        for (int64_t i = 8 * byte; i < std::min(size, 8 * byte + 8); ++i) wanted |= mask[i] << i % 8;
        same("pack_bits", packed[byte], wanted);
    }
    const float some[] = {kNan, kInfinity, -kInfinity, -0.0f, 1e-40f, 2.0f};
    Array<float> values(size, [&] { return some[number() >> 8 & 3 ? 5 : (number() >> 16) % 6]; }), kept(size);
    for (int64_t i = 0; i < size; ++i) kept[i] = mask[i] ? values[i] : 0.0f;
    lr_and_bits(values.get(), packed.get(), size, threads);
    for (int64_t i = 0; i < size; ++i)
        same("and_bits", std::memcmp(&values[i], &kept[i], sizeof(float)), 0);
}

bool higher(float a, float b) { return std::isnan(a) ? !std::isnan(b) : a > b; }

void top(Array<float>& scores, Array<uint8_t>& among, int64_t count, int threads) {
    std::vector<int64_t> order;
    for (int64_t i = 0; i < scores.size; ++i)
        if (among[i]) order.push_back(i);
    const int64_t available = static_cast<int64_t>(order.size());
    Array<uint8_t> chosen(scores.size, [] { return kUnwritten; });
    same("top, candidates", lr_top(scores.get(), among.get(), scores.size, count, chosen.get(), threads), available);
    const bool possible = count >= 0 && count <= available;
    std::vector<uint8_t> wanted(scores.size, possible ? 0 : kUnwritten);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return higher(scores[a], scores[b]); });
    for (int64_t i = 0; possible && i < count; ++i) wanted[order[i]] = 1;
    same_all("top", chosen, wanted);
}

float spread() { return std::ldexp(uniform(), static_cast<int>(number() >> 26) - 32); }
float rare() {
    const float some[] = {kNan, -kNan, kInfinity, -kInfinity, 0.0f, -0.0f, 1e-40f, 3.0f};
    return some[number() >> 29];
}
float equal() { return -1.0f; }

void selections(int64_t size, int threads) {
    for (auto make : {uniform, whole, spread, rare, equal})
        for (double density : {0.0, 0.3, 1.0}) {
            Array<float> scores(size, make);
            Array<uint8_t> among(size, [=] { return chance(density); });
            const int64_t available = lr_count(among.get(), size);
            for (int64_t count : {int64_t{-1}, int64_t{0}, int64_t{1}, available / 10, available / 2, available - 1,
                                  available, available + 1})
                top(scores, among, count, threads);
        }
}

// Scores that the kernel's sample (its draw, repeated here) shows as other than they are: high, or low, ones only.
void misled(float sampled) {
    constexpr int64_t kStretch = 128, kSize = 20000;
    Array<float> scores(kSize, [=] { return uniform() - sampled; });
    Array<uint8_t> among(kSize, [] { return 1; });
    uint64_t noise = 0;
    for (int64_t i = 0; i < kSize / kStretch; ++i) {
        noise = noise * 6364136223846793005u + 1442695040888963407u;
        scores[i * kStretch + (static_cast<int64_t>(noise >> 33) * kStretch >> 31)] = sampled + uniform();
    }
    for (int64_t count : {int64_t{100}, kSize / 10, kSize / 2, kSize - 100}) top(scores, among, count, 1);
}

}  // namespace

int main() {
    const int64_t shapes[][2] = {{0, 0},   {0, 5},   {5, 0},   {1, 1},    {1, 64},   {7, 63},
                                 {15, 17}, {16, 64}, {17, 65}, {33, 130}, {64, 127}, {610, 900}};
    for (const auto& shape : shapes)
        for (double density : {0.0, 0.1, 0.4, 1.0})
            for (int threads : {1, 3}) {
                const Problem p(shape[0], shape[1], density, threads % 3, whole);
                const Problem later(shape[0], shape[1], density, 2, whole);
                structure(p, p.wide, threads);
                structure(p, p.narrow, threads);
                for (bool wide : {false, true}) {
                    transposed<uint16_t>(p, wide, threads);
                    transposed<int32_t>(p, wide, threads);
                    carried(p, later, wide, threads);
                }
            }
    for (int64_t size : {0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 1000, (1 << 20) + 77})
        for (double density : {0.0, 0.5, 1.0})
            for (int threads : {1, 3}) bits(size, density, threads);
    for (int64_t size : {0, 1, 2, 63, 64, 65, 127, 128, 129, 1000, 8191, 8192, 8193, 20000})
        selections(size, 1);
    selections((1 << 18) + 77, 3);
    for (float sampled : {5.0f, -5.0f}) misled(sampled);
    return outcome();
}
