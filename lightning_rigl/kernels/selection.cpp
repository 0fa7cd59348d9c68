// The highest of many scores: exact, mostly in one pass, without sorting.
//
// A sample brackets the threshold; one pass chooses what is above the bracket and gathers what is inside it,
// which is little; there the threshold is found. When the sample misled, or too much is inside, histograms
// over all scores narrow the bracket first. The result depends neither on the sample nor on the threads.
#include <algorithm>

#include "bools.h"

namespace {

using lr::Buffer;
using lr::kBlock;

using Key = int32_t;  // in the order of the scores

constexpr int64_t kBins = 1 << 11;    // of one histogram
constexpr int64_t kWhole = 1 << 13;   // so few scores are all gathered at once
constexpr int64_t kSample = 1 << 13;  // candidates that a bracket is guessed from, at most
constexpr int64_t kAhead = 1 << 10;   // scores asked of the memory before they are looked at
constexpr int64_t kShare = 1 << 16;   // scores worth a thread of their own
constexpr Key kLowest = -INT32_MAX, kNan = INT32_MAX, kInfinity = 0x7f800000;

// One bit for each lane of a comparison's result.
inline uint64_t bits_of(lr::Integers lanes) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    return _mm512_movepi32_mask((__m512i)lanes);
#elif defined(__AVX2__) && LR_WIDTH == 8
    return static_cast<uint32_t>(_mm256_movemask_ps((__m256)lanes));
#elif defined(__SSE2__) && LR_WIDTH == 4
    return static_cast<uint32_t>(_mm_movemask_ps((__m128)lanes));
#else
    uint64_t bits = 0;
    for (int lane = 0; lane < LR_WIDTH; ++lane) bits |= static_cast<uint64_t>(lanes[lane] & 1) << lane;
    return bits;
#endif
}

// Integers in the scores' order: every nan above infinity and equal to each other, -0.0 equal to 0.0.
inline lr::Integers keys_of(lr::Integers bits) {
    const lr::Integers magnitude = bits & kNan, sign = bits >> 31;
    const lr::Integers key = (magnitude ^ sign) - sign;
    return magnitude > kInfinity ? lr::Integers{} + kNan : key;
}

inline Key key_at(const float* scores, int64_t place) {
    Key bits;
    std::memcpy(&bits, scores + place, 4);
    const Key magnitude = bits & kNan, sign = bits >> 31;
    return magnitude > kInfinity ? kNan : (magnitude ^ sign) - sign;
}

struct Task {
    const float* scores;
    const uint8_t* among;
    int64_t size, count;
    uint8_t* chosen;
    int parts;

    int64_t begin(int part) const { return size * part / parts / kBlock * kBlock; }
    int64_t end(int part) const { return part + 1 == parts ? size : begin(part + 1); }
};

struct Part {  // what one thread saw in its stretch
    int64_t above, inside;
};

struct Bracket {
    Key low, high;  // both inside
};

// Chooses what is above the bracket, gathers what is inside it, as far as there is room.
Part sweep(const Task& task, Bracket bracket, int part, int64_t room, Key* keys, int64_t* places) {
    const int64_t begin = task.begin(part), end = task.end(part);
    Part seen{0, 0};
    float rest[kBlock] = {};
    for (int64_t place = begin; place < end; place += kBlock) {
        const int64_t length = lr::least(kBlock, end - place);
        const bool full = length == kBlock;
        const float* scores = task.scores + place;
        if (!full) {
            std::memcpy(rest, scores, length * sizeof(float));
            scores = rest;
        }
        const uint8_t* among = task.among + place;
        for (int64_t j = 0; j < kBlock; j += 16) __builtin_prefetch(scores + kAhead + j);
        __builtin_prefetch(among + kAhead);
        const uint64_t candidates = full ? lr::word_of(among) : lr::word_of(among, length);
        uint64_t above = 0, reached = 0;
        for (int64_t j = 0; j < kBlock; j += lr::kWidth) {
            const lr::Integers lanes = keys_of(*reinterpret_cast<const lr::Integers*>(scores + j));
            above |= bits_of(lanes > bracket.high) << j;
            reached |= bits_of(lanes >= bracket.low) << j;
        }
        above &= candidates;
        uint64_t inside = reached & candidates & ~above;
        seen.above += __builtin_popcountll(above);
        full ? lr::spread(above, task.chosen + place) : lr::spread(above, task.chosen + place, length);
        if (seen.inside + kBlock > room) {  // only counted from here on
            seen.inside += __builtin_popcountll(inside);
            continue;
        }
        for (; inside; inside &= inside - 1) {
            const int64_t found = place + __builtin_ctzll(inside);
            keys[seen.inside] = key_at(task.scores, found);
            places[seen.inside++] = found;
        }
    }
    return seen;
}

// The bin of the `count`-th highest among counted bins; `count` becomes its rank within that bin.
int64_t bin_of(const int64_t* bins, int64_t& count) {
    int64_t bin = kBins - 1;
    while (bins[bin] < count) count -= bins[bin--];
    return bin;
}

inline int shift_for(Bracket bracket) {  // so that the bracket's keys fall into the bins
    const uint32_t range = static_cast<uint32_t>(bracket.high) - static_cast<uint32_t>(bracket.low);
    int shift = 0;
    while (range >> shift >= kBins) ++shift;
    return shift;
}

inline Bracket within(Bracket bracket, int shift, int64_t bin) {
    const int64_t low = bracket.low + (bin << shift), high = low + (int64_t{1} << shift) - 1;
    return {static_cast<Key>(low), static_cast<Key>(lr::least(high, bracket.high))};
}

// The `count`-th highest of keys within the bracket; `count` becomes how many of its equals to take.
Key threshold(const Key* keys, int64_t size, Bracket bracket, int64_t& count, Key* scratch) {
    while (bracket.low < bracket.high) {
        if (size <= 256) {
            if (keys != scratch) std::memcpy(scratch, keys, size * sizeof(Key));
            std::nth_element(scratch, scratch + count - 1, scratch + size,
                             [](Key a, Key b) { return a > b; });
            const Key found = scratch[count - 1];
            for (int64_t i = 0, rank = count; i < rank; ++i) count -= scratch[i] > found;
            return found;
        }
        int64_t bins[kBins] = {};
        const int shift = shift_for(bracket);
        const uint32_t base = static_cast<uint32_t>(bracket.low);
        for (int64_t i = 0; i < size; ++i) ++bins[(static_cast<uint32_t>(keys[i]) - base) >> shift];
        const uint32_t bin = static_cast<uint32_t>(bin_of(bins, count));
        int64_t left = 0;
        for (int64_t i = 0; i < size; ++i) {
            const Key key = keys[i];
            scratch[left] = key;
            left += (static_cast<uint32_t>(key) - base) >> shift == bin;
        }
        bracket = within(bracket, shift, bin);
        keys = scratch;
        size = left;
    }
    return bracket.low;
}

// A bracket that almost surely holds the threshold, from a sample with one candidate in each stretch.
Bracket guess(const Task& task, int64_t available) {
    const double enough = static_cast<double>(available) / kSample;  // scores for each one looked at
    const int64_t stretch = lr::most(128, static_cast<int64_t>(enough)), stretches = task.size / stretch;
    Buffer<Key> keys(stretches), scratch(stretches);
    if (!keys.at || !scratch.at) return {kLowest, kNan};
    const auto draw = [=](int64_t i, uint64_t& noise) {  // anywhere in its stretch: not along rows
        noise = noise * 6364136223846793005u + 1442695040888963407u;
        return i * stretch + (static_cast<int64_t>(noise >> 33) * stretch >> 31);
    };
    int64_t size = 0;
    uint64_t noise = 0, later = 0;
    for (int64_t i = 0, ahead = 0; i < stretches; ++i) {
        for (; ahead < stretches && ahead < i + 16; ++ahead) {  // memory answers late
            const int64_t place = draw(ahead, later);
            __builtin_prefetch(task.among + place);
            __builtin_prefetch(task.scores + place);
        }
        const int64_t place = draw(i, noise);
        if (task.among[place]) keys.at[size++] = key_at(task.scores, place);
    }
    const double share = static_cast<double>(task.count) / available, expected = share * size;
    const double margin = 4 * __builtin_sqrt(expected * (1 - share)) + 4;
    int64_t upper = static_cast<int64_t>(expected - margin);
    int64_t lower = static_cast<int64_t>(expected + margin) + 1;
    const Bracket all{kLowest, kNan};
    Bracket found = all;
    if (upper >= 1) found.high = threshold(keys.at, size, all, upper, scratch.at);
    if (lower <= size) found.low = threshold(keys.at, size, all, lower, scratch.at);
    return found;
}

// One step towards the threshold by a histogram over all candidates within the bracket, whatever they are.
bool narrow(const Task& task, Bracket& bracket, int64_t& rank, int64_t& inside) {
    Buffer<int64_t> counts(kBins * task.parts);
    if (!counts.at) return false;
    const int shift = shift_for(bracket);
    const uint32_t base = static_cast<uint32_t>(bracket.low);
#pragma omp parallel for num_threads(task.parts) schedule(static, 1)
    for (int part = 0; part < task.parts; ++part) {
        int64_t* mine = counts.at + part * kBins;
        std::memset(mine, 0, kBins * sizeof(int64_t));
        for (int64_t place = task.begin(part), end = task.end(part); place < end; ++place) {
            const Key key = key_at(task.scores, place);
            if (task.among[place] && key >= bracket.low && key <= bracket.high)
                ++mine[(static_cast<uint32_t>(key) - base) >> shift];
        }
    }
    for (int part = 1; part < task.parts; ++part)
        for (int64_t bin = 0; bin < kBins; ++bin) counts.at[bin] += counts.at[part * kBins + bin];
    const int64_t bin = bin_of(counts.at, rank);
    inside = counts.at[bin];
    bracket = within(bracket, shift, bin);
    return true;
}

void mark_first(const Task& task, Key key, int64_t count) {
    for (int64_t place = 0; count > 0; ++place) {
        if (!task.among[place] || key_at(task.scores, place) != key) continue;
        task.chosen[place] = 1;
        --count;
    }
}

bool choose(const Task& task, int64_t available) {
    const int64_t longest = task.size / task.parts + 2 * kBlock;
    const int64_t room = task.size <= kWhole ? longest + kBlock : longest / 8 + 4096;
    Buffer<Key> keys(room * task.parts), scratch(room * task.parts);
    Buffer<int64_t> places(room * task.parts);
    Buffer<Part> seen(task.parts);
    if (!keys.at || !scratch.at || !places.at || !seen.at) return false;
    Bracket bracket{kLowest, kNan};
    if (task.size > kWhole) bracket = guess(task, available);
    for (;;) {
#pragma omp parallel for num_threads(task.parts) schedule(static, 1)
        for (int part = 0; part < task.parts; ++part)
            seen.at[part] = sweep(task, bracket, part, bracket.low < bracket.high ? room : 0,
                                             keys.at + part * room, places.at + part * room);
        int64_t above = 0, inside = 0;
        bool fits = true;
        for (int part = 0; part < task.parts; ++part) {
            above += seen.at[part].above;
            inside += seen.at[part].inside;
            fits = fits && seen.at[part].inside + kBlock <= room;
        }
        int64_t rank = task.count - above;
        const bool missed = rank < 0 || rank > inside;
        if (!missed && rank == 0) return true;
        if (!missed && bracket.low == bracket.high) {
            mark_first(task, bracket.low, rank);
            return true;
        }
        if (missed || !fits) {
            if (missed) {
                bracket = {kLowest, kNan};
                rank = task.count;
            }
            do {
                if (!narrow(task, bracket, rank, inside)) return false;
            } while (bracket.low < bracket.high && inside > room - kBlock);  // one thread may see them all
            continue;
        }
        int64_t size = 0;
        for (int part = 0; part < task.parts; ++part) {  // together, in the order of their places
            if (part) {
                const int64_t from = part * room, number = seen.at[part].inside;
                std::memmove(keys.at + size, keys.at + from, number * sizeof(Key));
                std::memmove(places.at + size, places.at + from, number * sizeof(int64_t));
            }
            size += seen.at[part].inside;
        }
        const Key least = threshold(keys.at, size, bracket, rank, scratch.at);
        for (int64_t i = 0; i < size; ++i) {
            const bool tied = keys.at[i] == least && rank > 0;
            rank -= tied;
            task.chosen[places.at[i]] = tied || keys.at[i] > least;
        }
        return true;
    }
}

}  // namespace

// How many connections a mask has.
LR_EXPORT int64_t lr_count(const uint8_t* mask, int64_t size) { return lr::count_marked(mask, size); }

// The `count` highest scores among the candidates; of equal ones the first. Gives the number of candidates; if
// `count` is not from 0 to that, nothing is written. -1: no memory.
LR_EXPORT int64_t lr_top(const float* scores, const uint8_t* among, int64_t size, int64_t count, uint8_t* chosen,
                         int threads) {
    const int64_t available = lr::count_marked(among, size);
    if (count < 0 || count > available) return available;
    if (count == 0 || count == available) {
        for (int64_t i = 0; i < size; ++i) chosen[i] = count ? among[i] : 0;
        return available;
    }
    const int parts = lr::useful_threads(threads, size / kShare * 16384);
    const Task task{scores, among, size, count, chosen, parts};
    return choose(task, available) ? available : -1;
}
