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

// A row of logits, and what is chosen from in its place: each one's distance to the greatest over
// the temperature, rounded as the two operations are; at temperature 0, or without one, itself.
template <typename Logit>
struct Row {
  const Logit* logits;
  int64_t size;
  float shift = 0.0f, scale = 1.0f;

  float score(int64_t entry) const { return (to_float(logits[entry]) - shift) / scale; }

  // No logit below it has a score of `least`.
  float bound(double least) const {
    const double distance = least * scale;
    const double slack = 1e-6 * (std::abs(distance) + std::abs(shift)) + 1e-30;
    return std::nextafter(static_cast<float>(distance + shift - slack), -kInfinity);
  }
};

// Of the logits. Without an entry: a NaN is among them, or none above -inf, as the value says.
template <typename Logit>
Best largest_entry(const Row<Logit>& row) {
  Floats top = splat(-kInfinity);
  Ints ordered = ~Ints{};
  int64_t i = 0;
  for (; i + kLanes <= row.size; i += kLanes) {
    const Floats value = load_floats(row.logits + i);
    ordered &= value == value;
    top = larger(top, value);
  }
  float most = largest(top);
  bool all_ordered = true;
  for (int lane = 0; lane < kLanes; ++lane) all_ordered &= ordered[lane] != 0;
  for (; i < row.size; ++i) {
    const float value = to_float(row.logits[i]);
    all_ordered &= value == value;
    most = std::fmax(most, value);
  }
  if (!all_ordered) return {NAN, -1};
  if (most == -kInfinity) return {};
  for (i = 0; i + kLanes <= row.size; i += kLanes)
    if (largest(load_floats(row.logits + i)) == most) break;
  while (to_float(row.logits[i]) != most) ++i;
  return {most, i};
}

template <typename Logit>
Best choose(const Row<Logit>& row, int64_t first_block, const DrawKey& key) {
  static_assert(kLanes % kBlock == 0);
  const Best top = largest_entry(row);
  if (!key.is_random) return top;
  if (!std::isfinite(row.shift)) return {NAN, -1};  // distances to it order nothing
  if (top.entry < 0) return top;
  Best best;
  float needed = 0.0f;
  const auto consider_block = [&](int64_t first) {
    uint32_t words[kBlock];
    philox(first_block + first / kBlock + 1, key, words);
    for (int64_t i = first; i < std::min(first + kBlock, row.size); ++i)
      best.consider(row.score(i), words[i - first], i);
    needed = row.bound(best.value - kMostNoise);
  };
  consider_block(top.entry / kBlock * kBlock);
  int64_t first = 0;
  for (; first + kLanes <= row.size; first += kLanes)
    if (any_above(load_floats(row.logits + first), needed))
      for (int64_t block = first; block < first + kLanes; block += kBlock) consider_block(block);
  for (; first < row.size; first += kBlock) consider_block(first);
  return best;
}

template <typename Logit>
void choose_each(const ChoiceCall* call) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(call->num_threads)
  for (int64_t i = 0; i < call->num_rows; ++i) {
    Row<Logit> row{static_cast<const Logit*>(call->scores) + i * call->num_entries,
                   call->num_entries};
    if (call->temperatures && call->temperatures[i] > 0.0f) {
      row.shift = call->greatest[i];
      row.scale = call->temperatures[i];
    }
    const Best best = choose(row, call->first_entry / kBlock, call->keys[i]);
    call->values[i] = best.value;
    call->entries[i] = call->first_entry + best.entry;
  }
}

}  // namespace

extern "C" {

void gumbel_argmax_float32(const ChoiceCall* call) { choose_each<float>(call); }

void gumbel_argmax_bfloat16(const ChoiceCall* call) { choose_each<BFloat16>(call); }

}  // extern "C"
