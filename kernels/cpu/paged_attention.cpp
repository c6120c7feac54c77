// Attention of packed rows over paged K/V: decoding, verification, prefill and the draft's view.
//
//   keys of a sequence   0 ........ 511 | 512 ....... 1023 | 1024 ...          splits
//   rows of a sequence   every row of a KV head's group, folded: the head's keys are read once
//
// A split of one KV head and a block of rows is one task; partial results merge by log-sum-exp
// (flash-decoding). Splits begin at fixed positions and every row is summed in the same order
// whatever lies beside it, so a row's result does not depend on the batch, the number of rows that
// are verified with it, or the number of threads.

#include <algorithm>
#include <type_traits>

#include "buffer.h"
#include "matrix_tiles.h"
#include "tasks.h"
#include "tiles.h"

namespace {

constexpr float kHeadroom = 8.0f;

// What a thread works in, call after call.
struct Scratch {
  Buffer queries, keys, scores;
};

thread_local Scratch scratch;
thread_local Buffer partial_buffer;

template <typename Query, typename Cache>
class Attention {
 public:
  explicit Attention(const AttentionCall& call)
      : call_(call),
        stride_(call.head_dim + 2 * kLanes),
        tasks_(call, stride_),
        group_(tasks_.group_size()),
        in_matrices_(kNarrow && kHasMatrixUnits && fit_matrices(call.head_dim)),
        in_pairs_(kNarrow && fit_pairs(call.head_dim)) {}

  void run() {
    partials_ = partial_buffer.reserve(tasks_.num_partials);
    const int64_t num_tasks = tasks_.tasks.size(), num_groups = tasks_.groups.size();
#pragma omp parallel num_threads(call_.num_threads)
    {
      const MatrixUnits units(in_matrices_);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < num_tasks; ++i) attend(tasks_.tasks[i]);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < num_groups; ++i) merge(tasks_.groups[i]);
    }
  }

 private:
  static constexpr bool kNarrow =
      std::is_same_v<Query, BFloat16> && std::is_same_v<Cache, BFloat16>;

  void attend(const Task& task) {
    const int64_t dims = call_.head_dim, num_rows = task.num_rows * group_;
    float* partial = partials_ + task.partial;
    for (int64_t row = 0; row < num_rows; ++row) {
      std::fill_n(partial + row * stride_, dims, 0.0f);
      partial[row * stride_ + dims] = -kInfinity;
      store(partial + row * stride_ + dims + kLanes, Floats{});
    }
    if constexpr (kNarrow && kHasMatrixUnits)
      if (in_matrices_) return attend_narrow<MatrixTiles>(task, partial);
    if constexpr (kNarrow && kHasPairProducts)
      if (in_pairs_) return attend_narrow<PairTiles>(task, partial);
    float* queries = scratch.queries.reserve(num_rows * dims);
    for (int64_t row = 0; row < num_rows; ++row)
      for (int64_t dim = 0; dim < dims; dim += kLanes)
        store(queries + row * dims + dim, load_floats(query_of(task, row) + dim) * call_.scaling);
    attend_tiles(task, VectorTiles<Cache>(queries, num_rows, dims, scratch.keys), partial);
  }

  // Folded row: query row first_row + folded / group, head head * group + folded % group.
  const Query* query_of(const Task& task, int64_t folded) const {
    const int64_t row = call_.row_starts[task.sequence] + task.first_row + folded / group_;
    return static_cast<const Query*>(call_.query) +
           (task.head * group_ + folded % group_) * call_.query_head_stride +
           row * call_.query_row_stride;
  }

  // In bfloat16 products.
  template <typename Tiles>
  void attend_narrow(const Task& task, float* partial) {
    const int64_t num_rows = task.num_rows * group_;
    Tiles tiles(num_rows, call_.head_dim, call_.scaling, scratch.queries, scratch.keys);
    for (int64_t row = 0; row < num_rows; ++row) tiles.set_query(row, query_of(task, row));
    attend_tiles(task, tiles, partial);
  }

  template <typename Tiles>
  void attend_tiles(const Task& task, Tiles tiles, float* partial) {
    // Tiles are aligned too: a window's first one may begin before the window does.
    const int64_t first = task.begin / kTile * kTile, num_rows = task.num_rows * group_;
    float* scores = scratch.scores.reserve(num_rows * kTile);
    Rows<Cache> rows[2];
    find_rows(task, first, rows[0]);
    for (int64_t tile = first, turn = 0; tile < task.end; tile += kTile, turn ^= 1) {
      const Rows<Cache>&own = rows[turn], &next = rows[turn ^ 1];
      find_rows(task, std::min(tile + kTile, task.end - 1), rows[turn ^ 1]);
      tiles.score(own, next, scores);
      if (!is_seen_by_all(task, tile)) finish_scores(task, tile, scores);
      for (int64_t row = 0; row < num_rows; ++row)
        weigh(scores + row * kTile, partial + row * stride_);
      tiles.add(scores, own, next, stride_, partial);
    }
  }

  void find_rows(const Task& task, int64_t tile, Rows<Cache>& rows) const {
    if (call_.num_own > 0) return find_listed(task, tile, rows);
    const int64_t* table = call_.tables + call_.table_starts[task.sequence];
    const int64_t size = call_.block_size, head = task.head * call_.kv_head_stride;
    int64_t block = tile / size, offset = tile % size;
    if (tile + kTile <= task.end && offset + kTile <= size) {
      const int64_t first = head + (table[block] * size + offset) * call_.head_dim;
      for (int64_t i = 0; i < kTile; ++i) {
        const int64_t at = first + i * call_.head_dim;
        rows.keys[i] = static_cast<const Cache*>(call_.keys) + at;
        rows.values[i] = static_cast<const Cache*>(call_.values) + at;
      }
      return;
    }
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t at = head + (table[block] * size + offset) * call_.head_dim;
      rows.keys[i] = static_cast<const Cache*>(call_.keys) + at;
      rows.values[i] = static_cast<const Cache*>(call_.values) + at;
      if (tile + i + 1 < task.end && ++offset == size) {
        ++block;
        offset = 0;
      }
    }
  }

  void find_listed(const Task& task, int64_t tile, Rows<Cache>& rows) const {
    const int64_t list = task.head * call_.num_sequences + task.sequence;
    const int64_t* slots = call_.slots + list * call_.num_listed;
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t key = std::min(tile + i, task.end - 1), own = key - call_.num_listed;
      const int64_t at = (own < 0 ? slots[key] : list * call_.num_own + own) * call_.head_dim;
      rows.keys[i] = static_cast<const Cache*>(own < 0 ? call_.keys : call_.own_keys) + at;
      rows.values[i] = static_cast<const Cache*>(own < 0 ? call_.values : call_.own_values) + at;
    }
  }

  // Nothing is left to do to the scores of such a tile.
  bool is_seen_by_all(const Task& task, int64_t tile) const {
    const int64_t first = call_.context_lens[task.sequence] + task.first_row;
    const int64_t last = first + task.num_rows - 1;
    return !call_.mask && call_.softcap == 0 && tile >= task.begin && tile + kTile <= task.end &&
           tile + kTile <= first + 1 && (!call_.window || tile > last - call_.window);
  }

  // Soft cap, mask, causality and window, in place.
  void finish_scores(const Task& task, int64_t tile, float* scores) {
    const int64_t context = call_.context_lens[task.sequence];
    for (int64_t folded = 0; folded < task.num_rows * group_; ++folded, scores += kTile) {
      if (call_.softcap > 0)
        for (int64_t i = 0; i < kTile; ++i)
          scores[i] = call_.softcap * std::tanh(scores[i] / call_.softcap);
      const int64_t row = task.first_row + folded / group_;
      int64_t first = task.begin, stop = task.end;
      if (call_.mask) {
        const Cache* mask = static_cast<const Cache*>(call_.mask) + task.sequence * context;
        int64_t i = 0;
        for (; i + kLanes <= std::min(kTile, stop - tile); i += kLanes)
          store(scores + i, load<Floats>(scores + i) + load_floats(mask + tile + i));
        for (; i < std::min(kTile, stop - tile); ++i) scores[i] += to_float(mask[tile + i]);
      } else {
        stop = std::min(stop, context + row + 1);
        if (call_.window) first = std::max(first, context + row + 1 - call_.window);
      }
      for (int64_t i = 0; i < std::min(kTile, first - tile); ++i) scores[i] = -kInfinity;
      for (int64_t i = std::max(stop - tile, int64_t{0}); i < kTile; ++i) scores[i] = -kInfinity;
    }
  }

  // Turns a tile's scores into weights relative to a maximum so far, and adds these up. A row keeps
  // its maximum until a score is e^kHeadroom times as much: sums have room for that.
  void weigh(float* scores, float* partial) const {
    const int64_t dims = call_.head_dim;
    Floats top = load<Floats>(scores);
    for (int i = 1; i < kVectors; ++i) top = larger(top, load<Floats>(scores + i * kLanes));
    if (any_above(top, partial[dims] + kHeadroom))
      raise(std::max(partial[dims], largest(top)), partial);
    const float highest = partial[dims];
    if (highest == -kInfinity) {  // nothing is visible yet
      std::fill_n(scores, kTile, 0.0f);
      return;
    }
    Floats total = load<Floats>(partial + dims + kLanes);
    for (int i = 0; i < kVectors; ++i) {
      const Floats weight = bounded_exp(load<Floats>(scores + i * kLanes) - highest);
      store(scores + i * kLanes, weight);
      total += weight;
    }
    store(partial + dims + kLanes, total);
  }

  // Seldom, once a row has seen a few tiles.
  void raise(float highest, float* partial) const {
    const int64_t dims = call_.head_dim;
    const float fade = std::exp(partial[dims] - highest);
    for (int64_t dim = 0; dim < dims; dim += kLanes)
      store(partial + dim, load<Floats>(partial + dim) * fade);
    store(partial + dims + kLanes, load<Floats>(partial + dims + kLanes) * fade);
    partial[dims] = highest;
  }

  void merge(const Group& group) {
    const Task& task = tasks_.tasks[group.first];
    const int64_t dims = call_.head_dim;
    float* shares = scratch.scores.reserve(group.last - group.first);
    for (int64_t folded = 0; folded < task.num_rows * group_; ++folded) {
      float top = -kInfinity, total = 0.0f;
      for (int64_t i = group.first; i < group.last; ++i) top = std::max(top, part(i, folded)[dims]);
      for (int64_t i = group.first; i < group.last; ++i) {
        shares[i - group.first] = std::exp(part(i, folded)[dims] - top);
        total += shares[i - group.first] * sum(load<Floats>(part(i, folded) + dims + kLanes));
      }
      const int64_t row = task.first_row + folded / group_, member = folded % group_;
      Query* output = static_cast<Query*>(call_.output) +
                      (task.head * group_ + member) * call_.output_head_stride +
                      (call_.row_starts[task.sequence] + row) * call_.output_row_stride;
      for (int64_t dim = 0; dim < dims; dim += kLanes) {
        Floats value = {};
        for (int64_t i = group.first; i < group.last; ++i)
          value += load<Floats>(part(i, folded) + dim) * shares[i - group.first];
        store_floats(output + dim, value / total);
      }
    }
  }

  const float* part(int64_t task, int64_t folded) const {
    return partials_ + tasks_.tasks[task].partial + folded * stride_;
  }

  const AttentionCall& call_;
  const int64_t stride_;  // of partials: sums, then the maximum and room, then a vector of weights
  const Tasks tasks_;
  const int64_t group_;
  const bool in_matrices_, in_pairs_;
  float* partials_ = nullptr;
};

}  // namespace

extern "C" {

void attend_float32(const AttentionCall* call) { Attention<float, float>(*call).run(); }

void attend_bfloat16(const AttentionCall* call) { Attention<BFloat16, BFloat16>(*call).run(); }

// fp32 rows over bfloat16 pages: where the modules compute wider than the cache.
void attend_mixed(const AttentionCall* call) { Attention<float, BFloat16>(*call).run(); }

}  // extern "C"
