// A request under way, and how its next token follows from logits.
#pragma once

#include "kernels.hpp"

#include <chrono>
#include <numeric>

namespace hasten {

using Clock = std::chrono::steady_clock;

enum Status : int32_t { WAITING = 0, RUNNING = 1, FINISHED = 2, CANCELLED = 3, NOT_FINITE = 4 };

// A number in [0, 1) that depends on the seed and the place alone (splitmix64, Steele et al. 2014).
inline double uniform(uint64_t seed, uint64_t place) {
    uint64_t z = seed + (place + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull, z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return double((z ^ (z >> 31)) >> 11) * 0x1.0p-53;
}

// Nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751): the most likely tokens that together have `top_p`.
inline int sample(const float* logits, int count, float temperature, float top_p, double chance) {
    const float largest = logits[place_of_largest(logits, count)];
    std::vector<double> weight(count);
    double total = 0;
    for (int i = 0; i < count; i++) total += weight[i] = std::exp((double(logits[i]) - largest) / temperature);
    std::vector<int> order(count);
    std::iota(order.begin(), order.end(), 0);
    auto less = [&](int a, int b) { return weight[a] != weight[b] ? weight[a] < weight[b] : a > b; };
    std::vector<int> kept;
    double mass = 0;
    if (top_p < 1) {
        std::make_heap(order.begin(), order.end(), less);
        for (auto end = order.end(); end != order.begin() && mass < double(top_p) * total; --end) {
            std::pop_heap(order.begin(), end, less);
            kept.push_back(*(end - 1)), mass += weight[*(end - 1)];
        }
    } else
        kept = order, mass = total;
    double left = chance * mass;
    for (int i : kept)
        if ((left -= weight[i]) < 0) return i;
    return kept.back();
}

struct Sequence {
    std::vector<int32_t> prompt, stops, ids, guesses;  // guesses: of what follows, for the next pass
    std::vector<double> seconds;
    int32_t most, slot = -1, status = WAITING;
    int32_t fed = 0, drafted = 0;  // tokens that the caches of the model and of its draft hold
    int32_t wanted = 0;            // guesses, at most
    float temperature, top_p;
    uint64_t seed;
    bool cancelled = false;
    Clock::time_point sent = Clock::now();

    int length() const { return int(prompt.size() + ids.size()); }

    // Token `i` of the prompt, what was written since and the guesses.
    int at(int i) const {
        const int asked = int(prompt.size());
        return i < asked ? prompt[i] : i < length() ? ids[i - asked] : guesses[i - length()];
    }

    // What comes after `ahead` tokens more, by these logits of it; -1 if they are no numbers.
    int next(const float* logits, int vocabulary, int ahead) const {
        int best = place_of_largest(logits, vocabulary);
        if (!std::isfinite(logits[best])) return -1;
        if (temperature <= 0) return best;
        return sample(logits, vocabulary, temperature, top_p, uniform(seed, ids.size() + ahead));
    }
};

}  // namespace hasten
