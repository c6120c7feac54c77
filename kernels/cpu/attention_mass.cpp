// The attention that one sequence's last rows give to each of its keys, summed over rows and the
// group of a KV head: what views are chosen by.
//
//   scores   [num_kv_heads, num_tiles, rows of the group, kTile]
//
// worked out once, then weighed by each row's maximum and sum over all keys.

#include <algorithm>
#include <vector>

#include "buffer.h"
#include "calls.h"
#include "tiles.h"

namespace {

constexpr int64_t kTilesATask = 8;

thread_local Buffer score_buffer, mass_queries, mass_keys;

template <typename Query, typename Cache>
class AttentionMass {
 public:
  explicit AttentionMass(const MassCall& call)
      : call_(call),
        group_(call.num_query_heads / call.num_kv_heads),
        rows_(call.num_rows * group_),
        num_tiles_((call.num_keys + kTile - 1) / kTile),
        num_tasks_((num_tiles_ + kTilesATask - 1) / kTilesATask),
        tops_(call.num_kv_heads * num_tasks_ * rows_),
        totals_(tops_.size()) {}

  void run() {
    scores_ = score_buffer.reserve(call_.num_kv_heads * num_tiles_ * rows_ * kTile);
    const int64_t count = call_.num_kv_heads * num_tasks_;
#pragma omp parallel num_threads(call_.num_threads)
    {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < count; ++i) score(i / num_tasks_, i % num_tasks_);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count; ++i) weigh(i / num_tasks_, i % num_tasks_);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count; ++i) add(i / num_tasks_, i % num_tasks_);
    }
  }

 private:
  int64_t last_tile(int64_t task) const {
    return std::min((task + 1) * kTilesATask, num_tiles_);
  }

  float* scores_of(int64_t head, int64_t tile) const {
    return scores_ + (head * num_tiles_ + tile) * rows_ * kTile;
  }

  void score(int64_t head, int64_t task) {
    const int64_t dims = call_.head_dim;
    float* queries = mass_queries.reserve(rows_ * dims);
    float* packed = mass_keys.reserve(dims * kTile);
    fold_queries(head, queries);
    float* tops = &tops_[(head * num_tasks_ + task) * rows_];
    std::fill_n(tops, rows_, -kInfinity);
    const Cache* own[kTile];
    const Cache* next[kTile];
    find_keys(head, task * kTilesATask, own);
    for (int64_t tile = task * kTilesATask; tile < last_tile(task); ++tile) {
      find_keys(head, std::min(tile + 1, num_tiles_ - 1), next);
      Prefetch<Cache> prefetch(next, dims);
      float* scores = scores_of(head, tile);
      pack_keys<2>(own, dims, packed, [&] { prefetch.advance(); });
      by_row_blocks(rows_, [&]<int n>(int64_t row) {
        score_rows<n>(queries + row * dims, packed, dims, scores + row * kTile, prefetch);
      });
      finish_scores(tile, scores);
      for (int64_t row = 0; row < rows_; ++row) {
        Floats top = load<Floats>(scores + row * kTile);
        for (int i = 1; i < kVectors; ++i)
          top = larger(top, load<Floats>(scores + row * kTile + i * kLanes));
        tops[row] = std::max(tops[row], largest(top));
      }
      std::copy_n(next, kTile, own);
    }
  }

  void fold_queries(int64_t head, float* queries) const {
    const Query* from = static_cast<const Query*>(call_.query);
    for (int64_t row = 0; row < call_.num_rows; ++row)
      for (int64_t member = 0; member < group_; ++member) {
        const Query* query = from + (head * group_ + member) * call_.query_head_stride +
                             row * call_.query_row_stride;
        for (int64_t dim = 0; dim < call_.head_dim; dim += kLanes, queries += kLanes)
          store(queries, load_floats(query + dim) * call_.scaling);
      }
  }

  // Beyond the sequence, its last key.
  void find_keys(int64_t head, int64_t tile, const Cache* keys[kTile]) const {
    const Cache* from = static_cast<const Cache*>(call_.keys) + head * call_.kv_head_stride;
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t key = std::min(tile * kTile + i, call_.num_keys - 1);
      const int64_t slot = call_.table[key / call_.block_size] * call_.block_size;
      keys[i] = from + (slot + key % call_.block_size) * call_.head_dim;
    }
  }

  // Only the rows' own keys are hidden from some of them.
  void finish_scores(int64_t tile, float* scores) const {
    const int64_t first = tile * kTile, context = call_.num_keys - call_.num_rows;
    for (int64_t folded = 0; folded < rows_; ++folded, scores += kTile) {
      if (call_.softcap > 0)
        for (int64_t i = 0; i < kTile; ++i)
          scores[i] = call_.softcap * std::tanh(scores[i] / call_.softcap);
      const int64_t seen = context + folded / group_ + 1 - first;
      for (int64_t i = std::max(seen, int64_t{0}); i < kTile; ++i) scores[i] = -kInfinity;
    }
  }

  void weigh(int64_t head, int64_t task) {
    for (int64_t row = 0; row < rows_; ++row) {
      float top = -kInfinity;
      for (int64_t other = 0; other < num_tasks_; ++other)
        top = std::max(top, tops_[(head * num_tasks_ + other) * rows_ + row]);
      Floats total = {};
      for (int64_t tile = task * kTilesATask; tile < last_tile(task); ++tile) {
        float* scores = scores_of(head, tile) + row * kTile;
        for (int i = 0; i < kVectors; ++i) {
          const Floats weight = bounded_exp(load<Floats>(scores + i * kLanes) - top);
          store(scores + i * kLanes, weight);
          total += weight;
        }
      }
      totals_[(head * num_tasks_ + task) * rows_ + row] = sum(total);
    }
  }

  void add(int64_t head, int64_t task) {
    for (int64_t tile = task * kTilesATask; tile < last_tile(task); ++tile) {
      float masses[kTile] = {};
      for (int64_t row = 0; row < rows_; ++row) {
        float total = 0.0f;
        for (int64_t other = 0; other < num_tasks_; ++other)
          total += totals_[(head * num_tasks_ + other) * rows_ + row];
        const float* weights = scores_of(head, tile) + row * kTile;
        for (int64_t i = 0; i < kTile; ++i) masses[i] += weights[i] / total;
      }
      const int64_t count = std::min(kTile, call_.num_keys - tile * kTile);
      std::copy_n(masses, count, call_.mass + head * call_.num_keys + tile * kTile);
    }
  }

  const MassCall& call_;
  const int64_t group_, rows_, num_tiles_, num_tasks_;
  std::vector<float> tops_, totals_;  // [num_kv_heads, num_tasks, rows of the group]
  float* scores_ = nullptr;
};

}  // namespace

extern "C" {

void attention_mass_float32(const MassCall* call) { AttentionMass<float, float>(*call).run(); }

void attention_mass_bfloat16(const MassCall* call) {
  AttentionMass<BFloat16, BFloat16>(*call).run();
}

void attention_mass_mixed(const MassCall* call) { AttentionMass<float, BFloat16>(*call).run(); }

}  // extern "C"
