// The arithmetic of a tile in products of pairs (AVX512-BF16): bfloat16 products, fp32 sums.
//
//   scores   a word of a row's two dims x words of the same two dims of kLanes keys
//   sums     a word of a row's two weights x words of the same two keys' values, kLanes dims
//
// Weights are rounded to bfloat16 on the way, as flash-attn does. All rows go this way, few or many:
// a row's result is the same beside any others.
#pragma once

#include <cstring>

#include "tiles.h"

#if defined(__AVX512BF16__)

constexpr int64_t kPairDims = 32;  // of a head: it has a multiple of them

// [head_dim / 16, kTile / 2, 16] words of two keys' values.
template <typename Ahead>
void pair_values(const BFloat16* const values[kTile], int64_t head_dim, float* packed,
                 Ahead& next_values) {
  const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i second =
      _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
  for (int64_t dim = 0; dim < head_dim; dim += kPairDims) {
    float* to = packed + dim / 2 * kTile;
    for (int64_t pair = 0; pair < kTile / 2; ++pair, to += 16) {
      const __m512i a = load<__m512i>(values[2 * pair] + dim);
      const __m512i b = load<__m512i>(values[2 * pair + 1] + dim);
      const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
      store(to, _mm512_permutex2var_epi32(low, first, high));
      store(to + 8 * kTile, _mm512_permutex2var_epi32(low, second, high));
      next_values.advance();
      next_values.advance();
    }
  }
}

// 2 * kLanes weights, rounded.
inline __m512bh rounded_weights(const float* weights) {
  return _mm512_cvtne2ps_pbh(load<__m512>(weights + kLanes), load<__m512>(weights));
}

// scores[r] = queries[r] . keys, rows one after the other. Nothing is prefetched between products:
// the branch that knows when to stop has the compiler keep sums in memory.
template <int kRows>
void score_pairs(const uint32_t* queries, const float* keys, int64_t num_words, float scaling,
                 float* scores) {
  Floats sums[kRows][kVectors] = {};
  for (int64_t word = 0; word < num_words; ++word) {
    Words key[kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) key[i] = load<Words>(keys + word * kTile + i * kLanes);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Words query = Words{} + queries[row * num_words + word];
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i) sums[row][i] = add_products(sums[row][i], query, key[i]);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i)
      store(scores + row * kTile + i * kLanes, sums[row][i] * scaling);
}

// sums[r] += weights[r] . values, over kWidth vectors of the head's dims.
template <int kRows, int kWidth>
void add_value_pairs(const uint32_t* weights, const float* values, int64_t stride, float* sums) {
  constexpr int64_t kColumn = kTile / 2 * kLanes;  // words of kLanes dims
  Floats total[kRows][kWidth];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) total[row][i] = load<Floats>(sums + row * stride + i * kLanes);
  for (int64_t pair = 0; pair < kTile / 2; ++pair) {
    Words value[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) value[i] = load<Words>(values + i * kColumn + pair * kLanes);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Words weight = Words{} + weights[row * (kTile / 2) + pair];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) total[row][i] = add_products(total[row][i], weight, value[i]);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) store(sums + row * stride + i * kLanes, total[row][i]);
}

// One task's tiles. `queries` holds the rows, `scratch` a tile's keys, values and weights.
class PairTiles {
 public:
  using Ahead = Prefetch<BFloat16>;

  PairTiles(int64_t num_rows, int64_t head_dim, float scaling, Buffer& queries, Buffer& scratch)
      : num_rows_(num_rows), head_dim_(head_dim), scaling_(scaling) {
    queries_ = reinterpret_cast<uint32_t*>(queries.reserve(num_rows * head_dim / 2));
    const int64_t size = head_dim / 2 * kTile;
    keys_ = scratch.reserve(2 * size + num_rows * kTile / 2);
    values_ = keys_ + size;
    weights_ = values_ + size;
  }

  void set_query(int64_t row, const BFloat16* query) {
    std::memcpy(queries_ + row * head_dim_ / 2, query, 2 * head_dim_);
  }

  void score(const BFloat16* const keys[kTile], float* scores, Ahead& next_keys) {
    pack_keys<1>(keys, head_dim_, keys_, next_keys);
    by_row_blocks(num_rows_, [&]<int n>(int64_t row) {
      score_pairs<n>(queries_ + row * head_dim_ / 2, keys_, head_dim_ / 2, scaling_,
                     scores + row * kTile);
    });
  }

  void add(const float* weights, const BFloat16* const values[kTile], int64_t stride, float* sums,
           Ahead& next_values) {
    pair_values(values, head_dim_, values_, next_values);
    for (int64_t i = 0; i < num_rows_ * kTile; i += 2 * kLanes)
      store(weights_ + i / 2, rounded_weights(weights + i));
    const uint32_t* words = reinterpret_cast<const uint32_t*>(weights_);
    by_row_blocks(num_rows_, [&]<int n>(int64_t row) {
      const uint32_t* own = words + row * kTile / 2;
      float* sum = sums + row * stride;
      int64_t dim = 0;
      for (; dim + 4 * kLanes <= head_dim_; dim += 4 * kLanes)
        add_value_pairs<n, 4>(own, values_ + dim / 2 * kTile, stride, sum + dim);
      for (; dim < head_dim_; dim += kPairDims)
        add_value_pairs<n, 2>(own, values_ + dim / 2 * kTile, stride, sum + dim);
    });
  }

 private:
  const int64_t num_rows_, head_dim_;
  const float scaling_;
  uint32_t* queries_;  // words of two dims, [num_rows, head_dim / 2]
  float *keys_, *values_, *weights_;
};

inline bool fit_pairs(int64_t head_dim) { return head_dim % kPairDims == 0; }

#else

inline bool fit_pairs(int64_t) { return false; }

// Named where it is never used.
class PairTiles {
 public:
  PairTiles(int64_t, int64_t, float, Buffer&, Buffer&);
  void set_query(int64_t, const BFloat16*);
};

#endif
