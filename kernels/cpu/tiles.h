// The arithmetic of one tile: kTile keys of a KV head against rows of its group.
//
//   packed keys   [head_dim, kTile]     so that a vector holds one dim of several keys
//   scores        [num_rows, kTile]
//   sums          [num_rows, head_dim]  weighted values
#pragma once

#include <algorithm>

#include "buffer.h"
#include "vectors.h"

constexpr int64_t kTile = 64;  // keys whose scores are worked out together
constexpr int kVectors = kTile / kLanes;
constexpr int kRowBlock = 6;  // rows whose sums stay in registers

// Where the keys and values of a tile lie; beyond the sequence, those of its last key.
template <typename Cache>
struct Rows {
  const Cache* keys[kTile];
  const Cache* values[kTile];
};

// The next tile comes from memory while this one is worked on: a line at a time throughout, since
// a burst would fill the core's line buffers and be waited for. kNear: into the first cache, which
// matrix units load from; vectors gain nothing by it.
template <typename Cache, bool kNear = false>
class Prefetch {
 public:
  Prefetch(const Cache* const rows[kTile], int64_t head_dim)
      : rows_(rows), num_lines_(kTile * (head_dim * sizeof(Cache) / kLine)) {}

  void advance() {
    if (line_ >= num_lines_) return;
    __builtin_prefetch(rows_[line_ % kTile] + line_ / kTile * (kLine / sizeof(Cache)), 0,
                       kNear ? 3 : 2);
    ++line_;
  }

 private:
  static constexpr uint64_t kLine = 64;  // bytes
  const Cache* const* rows_;
  const uint64_t num_lines_;
  uint64_t line_ = 0;
};

// Keys side by side, [head_dim, kTile]; of bfloat16 ones, words of two dims, [head_dim / 2, kTile].
// `ask` is called every kEvery loads, for what comes next.
template <int kEvery, typename Cache, typename Ask>
void pack_keys(const Cache* const rows[kTile], int64_t head_dim, float* packed, Ask ask) {
  constexpr int64_t dims_a_word = 4 / sizeof(Cache);
  const int64_t num_words = head_dim / dims_a_word;
  for (int64_t key = 0; key < kTile; key += kLanes)
    for (int64_t first = 0; first < num_words; first += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, num_words - first);
      const auto pack = [&](auto load_row) {
        Words block[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          block[i] = load_row(rows[key + i] + first * dims_a_word);
          if (i % kEvery == kEvery - 1) ask();
        }
        transpose(block);
        for (int i = 0; i < count; ++i) store(packed + (first + i) * kTile + key, block[i]);
      };
      if (count == kLanes)
        pack([](const Cache* row) { return load<Words>(row); });
      else
        pack([&](const Cache* row) { return load_some<Words>(row, 4 * count); });
    }
}

// scores[r] = queries[r] . keys, rows one after the other.
template <int kRows, typename Cache>
void score_rows(const float* queries, const float* keys, int64_t head_dim, float* scores,
                Prefetch<Cache>& prefetch) {
  Floats sums[kRows][kVectors] = {};
  if constexpr (sizeof(Cache) == 2) {
    for (int64_t dim = 0; dim < head_dim; dim += 2) {
      Words words[kVectors];
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i)
        words[i] = load<Words>(keys + dim / 2 * kTile + i * kLanes);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        Floats key[kVectors];
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; ++i)
          key[i] = as_floats(half ? words[i] & 0xFFFF0000u : words[i] << 16);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
          const Floats query = splat(queries[row * head_dim + dim + half]);
#pragma GCC unroll 16
          for (int i = 0; i < kVectors; ++i) sums[row][i] += query * key[i];
        }
      }
      prefetch.advance();
      prefetch.advance();
    }
  } else {
    for (int64_t dim = 0; dim < head_dim; ++dim) {
      Floats key[kVectors];
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i) key[i] = load<Floats>(keys + dim * kTile + i * kLanes);
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const Floats query = splat(queries[row * head_dim + dim]);
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; ++i) sums[row][i] += query * key[i];
      }
      prefetch.advance();
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) store(scores + row * kTile + i * kLanes, sums[row][i]);
}

// sums[r] += weights[r] . values, over kWidth vectors of the head's dims.
template <int kRows, int kWidth, typename Cache>
void add_values(const float* weights, const Cache* const values[kTile], int64_t dim, int64_t stride,
                float* sums, Prefetch<Cache>& prefetch) {
  Floats total[kRows][kWidth];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) total[row][i] = load<Floats>(sums + row * stride + i * kLanes);
  for (int64_t key = 0; key < kTile; ++key) {
    Floats value[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) value[i] = load_floats(values[key] + dim + i * kLanes);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Floats weight = splat(weights[row * kTile + key]);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) total[row][i] += weight * value[i];
    }
    prefetch.advance();
    prefetch.advance();
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) store(sums + row * stride + i * kLanes, total[row][i]);
}

template <int kRows, typename Cache>
void add_all_values(const float* weights, const Cache* const values[kTile], int64_t head_dim,
                    int64_t stride, float* sums, Prefetch<Cache>& prefetch) {
  int64_t dim = 0;
  for (; dim + 4 * kLanes <= head_dim; dim += 4 * kLanes)
    add_values<kRows, 4>(weights, values, dim, stride, sums + dim, prefetch);
  for (; dim < head_dim; dim += kLanes)
    add_values<kRows, 1>(weights, values, dim, stride, sums + dim, prefetch);
}

// Calls work.template operator()<n>(row) over all rows, n at a time.
template <typename Work>
void by_row_blocks(int64_t num_rows, Work work) {
  int64_t row = 0;
  for (; row + kRowBlock <= num_rows; row += kRowBlock) work.template operator()<kRowBlock>(row);
  switch (num_rows - row) {
    case 5: work.template operator()<5>(row); break;
    case 4: work.template operator()<4>(row); break;
    case 3: work.template operator()<3>(row); break;
    case 2: work.template operator()<2>(row); break;
    case 1: work.template operator()<1>(row); break;
  }
}

// One task's tiles, row by row of vectors. `scratch` holds a tile's packed keys.
template <typename Cache>
class VectorTiles {
  using Ahead = Prefetch<Cache>;

 public:
  VectorTiles(const float* queries, int64_t num_rows, int64_t head_dim, Buffer& scratch)
      : queries_(queries),
        num_rows_(num_rows),
        head_dim_(head_dim),
        packed_(scratch.reserve(head_dim * kTile)) {}

  void score(const Rows<Cache>& own, const Rows<Cache>& next, float* scores) {
    Ahead next_keys(next.keys, head_dim_);
    pack_keys<2>(own.keys, head_dim_, packed_, [&] { next_keys.advance(); });
    by_row_blocks(num_rows_, [&]<int n>(int64_t row) {
      score_rows<n>(queries_ + row * head_dim_, packed_, head_dim_, scores + row * kTile,
                    next_keys);
    });
  }

  void add(const float* weights, const Rows<Cache>& own, const Rows<Cache>& next, int64_t stride,
           float* sums) {
    Ahead next_values(next.values, head_dim_);
    by_row_blocks(num_rows_, [&]<int n>(int64_t row) {
      add_all_values<n>(weights + row * kTile, own.values, head_dim_, stride, sums + row * stride,
                        next_values);
    });
  }

 private:
  const float* queries_;  // [num_rows, head_dim], scaled
  const int64_t num_rows_, head_dim_;
  float* packed_;
};
