// The argmax of scores plus counter-based Gumbel noise: kernels/gumbel.py in C++.

#include <algorithm>
#include <bit>
#include <cmath>

#include "calls.h"
#include "vectors.h"

namespace {

constexpr int64_t kBlock = 8;  // words of one counter
constexpr double kMostNoise = 23.0;  // of any word, and room for a float's rounding

// Salmon et al., SC 2011: Philox4x64-10 with key (seed, 0).
void philox(uint64_t block, const DrawKey& key, uint32_t words[kBlock]) {
  uint64_t c0 = block, c1 = key.position, c2 = key.role, c3 = key.step;
  uint64_t k0 = key.seed, k1 = 0;
  for (int round = 0; round < 10; ++round) {
    const auto first = static_cast<unsigned __int128>(0xD2E7470EE14C6C93u) * c0;
    const auto second = static_cast<unsigned __int128>(0xCA5A826395121157u) * c2;
    c0 = static_cast<uint64_t>(second >> 64) ^ c1 ^ k0;
    c1 = static_cast<uint64_t>(second);
    c2 = static_cast<uint64_t>(first >> 64) ^ c3 ^ k1;
    c3 = static_cast<uint64_t>(first);
    k0 += 0x9E3779B97F4A7C15u;
    k1 += 0xBB67AE8584CAA73Bu;
  }
  const uint64_t state[] = {c0, c1, c2, c3};
  for (int i = 0; i < kBlock; ++i) words[i] = static_cast<uint32_t>(state[i / 2] >> 32 * (i % 2));
}

double noise_of(uint32_t word) { return -std::log(-std::log((word + 0.5) * 0x1p-32)); }

// No less than the word's noise: -log(u) >= 1 - u, and 1 - u >= 2^-(ones + 1).
double noise_bound(uint32_t word) { return (std::countl_one(word) + 1) * 0.69314719; }

// The best entry so far, counted from the first of the scores; of equal ones the first.
struct Best {
  double value = -INFINITY;
  int64_t entry = -1;

  void consider(double score, uint32_t word, int64_t candidate) {
    if (score + noise_bound(word) < value) return;
    const double perturbed = score + noise_of(word);
    if (perturbed > value || (perturbed == value && candidate < entry)) {
      value = perturbed;
      entry = candidate;
    }
  }
};

// Without an entry: a NaN among the scores, or none above -inf, as the value says.
Best largest_entry(const float* scores, int64_t size) {
  Floats top = splat(-kInfinity);
  Ints ordered = ~Ints{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Floats value = load<Floats>(scores + i);
    ordered &= value == value;
    top = larger(top, value);
  }
  float most = largest(top);
  bool all_ordered = true;
  for (int lane = 0; lane < kLanes; ++lane) all_ordered &= ordered[lane] != 0;
  for (; i < size; ++i) {
    all_ordered &= scores[i] == scores[i];
    most = std::fmax(most, scores[i]);
  }
  if (!all_ordered) return {NAN, -1};
  if (most == -kInfinity) return {};
  for (i = 0; i + kLanes <= size; i += kLanes)
    if (largest(load<Floats>(scores + i)) == most) break;
  while (scores[i] != most) ++i;
  return {most, i};
}

Best choose(const float* scores, int64_t size, int64_t first_block, const DrawKey& key) {
  const Best top = largest_entry(scores, size);
  if (top.entry < 0 || !key.is_random) return top;
  uint32_t words[kBlock];
  Best best;
  philox(first_block + top.entry / kBlock + 1, key, words);
  best.consider(scores[top.entry], words[top.entry % kBlock], top.entry);
  for (int64_t first = 0; first < size; first += kBlock) {
    const int64_t count = std::min(kBlock, size - first);
    const auto needed = static_cast<float>(best.value - kMostNoise);
    int num_candidates = 0;
    for (int64_t i = 0; i < count; ++i) num_candidates += scores[first + i] >= needed;
    if (num_candidates == 0) continue;
    philox(first_block + first / kBlock + 1, key, words);
    for (int64_t i = 0; i < count; ++i) best.consider(scores[first + i], words[i], first + i);
  }
  return best;
}

}  // namespace

extern "C" void gumbel_argmax(const ChoiceCall* call) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(call->num_threads)
  for (int64_t row = 0; row < call->num_rows; ++row) {
    const Best best = choose(call->scores + row * call->num_entries, call->num_entries,
                             call->first_entry / kBlock, call->keys[row]);
    call->values[row] = best.value;
    call->entries[row] = call->first_entry + best.entry;
  }
}
