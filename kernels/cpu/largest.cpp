// The largest entries of rows, in order: what a view keeps of its scores.
//
// A histogram of the upper bits tells which entries can be among them; only these are sorted, by
// radix. Among equals the first one comes first.

#include <algorithm>
#include <vector>

#include "calls.h"
#include "vectors.h"

namespace {

constexpr int kDigit = 11;  // bits that a pass sorts by; three passes make 32
constexpr int64_t kBins = 1 << kDigit;

struct Entry {
  uint32_t key, index;
};

thread_local std::vector<Entry> entries, sorted;

// Ascending keys are descending floats; minus infinity comes last, and zeros are equal.
inline uint32_t descending_key(float value) {
  value += 0.0f;  // of minus zero, zero
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits & 0x80000000u ? bits : ~bits & 0x7FFFFFFFu;
}

// The entries whose upper bits are among those of the `count` first ones, as they stand.
void gather_candidates(const float* row, int64_t num_entries, int64_t count) {
  int64_t sizes[kBins] = {};
  for (int64_t i = 0; i < num_entries; ++i) ++sizes[descending_key(row[i]) >> (32 - kDigit)];
  uint32_t last = 0;
  for (int64_t found = sizes[0]; found < count; found += sizes[last]) ++last;
  entries.clear();
  for (int64_t i = 0; i < num_entries; ++i) {
    const uint32_t key = descending_key(row[i]);
    if (key >> (32 - kDigit) <= last) entries.push_back({key, static_cast<uint32_t>(i)});
  }
}

void sort_entries() {
  sorted.resize(entries.size());
  for (int shift = 0; shift < 32; shift += kDigit) {
    int64_t ends[kBins + 1] = {};
    for (const Entry& entry : entries) ++ends[(entry.key >> shift) % kBins + 1];
    for (int64_t bin = 0; bin < kBins; ++bin) ends[bin + 1] += ends[bin];
    for (const Entry& entry : entries) sorted[ends[(entry.key >> shift) % kBins]++] = entry;
    std::swap(entries, sorted);
  }
}

}  // namespace

extern "C" void largest_indices(const LargestCall* call) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(call->num_threads)
  for (int64_t row = 0; row < call->num_rows; ++row) {
    gather_candidates(call->scores + row * call->row_stride, call->num_entries, call->count);
    sort_entries();
    for (int64_t i = 0; i < call->count; ++i)
      call->indices[row * call->count + i] = entries[i].index;
  }
}
