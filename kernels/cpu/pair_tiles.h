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

// 2 * kLanes weights, rounded.
inline __m512bh rounded_weights(const float* weights) {
  return _mm512_cvtne2ps_pbh(load<__m512>(weights + kLanes), load<__m512>(weights));
}

// Asks for a line of rows that are needed next: line by line of all rows, then what follows.
inline void fetch(const BFloat16* const rows[kTile], int64_t line) {
  __builtin_prefetch(rows[line % kTile] + line / kTile * kPairDims, 0, 3);
}

// scores[r] = queries[r] . keys, rows one after the other.
template <int kRows, int kFetched>
void score_pairs(const uint32_t* queries, const float* keys, int64_t num_words, float scaling,
                 const BFloat16* const next[kTile], int64_t line, float* scores) {
  Floats sums[kRows][kVectors] = {};
  for (int64_t word = 0; word < num_words; ++word) {
#pragma GCC unroll 2
    for (int i = 0; i < kFetched; ++i) fetch(next, line++);
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

// Two vectors of dims in order, and as unpacking leaves them: every other four first.
inline void part_fours(__m512& low, __m512& high) {
  const __m512i evens = _mm512_set_epi32(27, 26, 25, 24, 19, 18, 17, 16, 11, 10, 9, 8, 3, 2, 1, 0);
  const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(4));
  const __m512 first = low;
  low = _mm512_permutex2var_ps(first, evens, high);
  high = _mm512_permutex2var_ps(first, odds, high);
}

inline void join_fours(__m512& low, __m512& high) {
  const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const __m512 before = low;
  low = _mm512_permutex2var_ps(before, first, high);
  high = _mm512_permutex2var_ps(before, second, high);
}

// sums[r] += weights[r] . values, over kBlocks times kPairDims dims. Two keys' values become words
// on the way, four dims of eight in each vector. kFetches: the next tile's values are asked for.
template <int kRows, int kBlocks, int kFetched>
void add_value_pairs(const uint32_t* weights, const BFloat16* const values[kTile],
                     const BFloat16* const next[kTile], int64_t dim, int64_t line,
                     int64_t stride, float* sums) {
  __m512 total[kRows][2 * kBlocks];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
    for (int i = 0; i < 2 * kBlocks; i += 2) {
      total[row][i] = load<__m512>(sums + row * stride + i * kLanes);
      total[row][i + 1] = load<__m512>(sums + row * stride + (i + 1) * kLanes);
      part_fours(total[row][i], total[row][i + 1]);
    }
  for (int64_t pair = 0; pair < kTile / 2; ++pair) {
    __m512bh value[2 * kBlocks];
#pragma GCC unroll 16
    for (int i = 0; i < kBlocks; ++i) {
      const int64_t at = dim + i * kPairDims;
      const __m512i a = load<__m512i>(values[2 * pair] + at);
      const __m512i b = load<__m512i>(values[2 * pair + 1] + at);
      value[2 * i] = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(a, b));
      value[2 * i + 1] = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(a, b));
      if (kFetched) fetch(next, line++);
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const __m512bh weight =
          reinterpret_cast<__m512bh>(_mm512_set1_epi32(weights[row * (kTile / 2) + pair]));
#pragma GCC unroll 16
      for (int i = 0; i < 2 * kBlocks; ++i)
        total[row][i] = _mm512_dpbf16_ps(total[row][i], weight, value[i]);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
    for (int i = 0; i < 2 * kBlocks; i += 2) {
      join_fours(total[row][i], total[row][i + 1]);
      store(sums + row * stride + i * kLanes, total[row][i]);
      store(sums + row * stride + (i + 1) * kLanes, total[row][i + 1]);
    }
}

// One task's tiles. `queries` holds the rows, `scratch` a tile's keys, values and weights.
class PairTiles {
 public:
  PairTiles(int64_t num_rows, int64_t head_dim, float scaling, Buffer& queries, Buffer& scratch)
      : num_rows_(num_rows), head_dim_(head_dim), scaling_(scaling) {
    queries_ = reinterpret_cast<uint32_t*>(queries.reserve(num_rows * head_dim / 2));
    const int64_t size = head_dim / 2 * kTile;
    keys_ = scratch.reserve(size + num_rows * kTile / 2);
    weights_ = keys_ + size;
  }

  void set_query(int64_t row, const BFloat16* query) {
    std::memcpy(queries_ + row * head_dim_ / 2, query, 2 * head_dim_);
  }

  // The next tile's lines are asked for evenly: a block of rows alone asks for keys while these are
  // packed and for values then, of more blocks the first two ask for a share each.
  void score(const Rows<BFloat16>& own, const Rows<BFloat16>& next, float* scores) {
    const auto ask = [&, line = 0]() mutable { fetch(next.keys, line++); };
    if (num_rows_ <= kRowBlock) {
      pack_keys<1>(own.keys, head_dim_, keys_, ask);
      by_row_blocks(num_rows_, [&]<int n>(int64_t row) {
        score_rows<n, 2>(row, next.values, 0, scores);
      });
      return;
    }
    pack_keys<2>(own.keys, head_dim_, keys_, ask);
    by_row_blocks(num_rows_, [&]<int n>(int64_t row) {
      const int64_t line = head_dim_ + row / kRowBlock * head_dim_ / 2;
      if (row <= kRowBlock)
        score_rows<n, 1>(row, next.keys, line, scores);
      else
        score_rows<n, 0>(row, next.keys, line, scores);
    });
  }

  void add(const float* weights, const Rows<BFloat16>& own, const Rows<BFloat16>& next,
           int64_t stride, float* sums) {
    for (int64_t i = 0; i < num_rows_ * kTile; i += 2 * kLanes)
      store(weights_ + i / 2, rounded_weights(weights + i));
    const int64_t before = num_rows_ <= kRowBlock ? head_dim_ : 0;
    by_row_blocks(num_rows_, [&]<int n>(int64_t row) {
      const int64_t line = before + row / kRowBlock * head_dim_;
      if (row <= kRowBlock)
        add_rows<n, 1>(row, own, next, line, stride, sums);
      else
        add_rows<n, 0>(row, own, next, line, stride, sums);
    });
  }

 private:
  template <int kRows, int kFetched>
  void score_rows(int64_t row, const BFloat16* const next[kTile], int64_t line,
                  float* scores) const {
    const uint32_t* queries = queries_ + row * head_dim_ / 2;
    score_pairs<kRows, kFetched>(queries, keys_, head_dim_ / 2, scaling_, next, line,
                                 scores + row * kTile);
  }

  template <int kRows, int kFetched>
  void add_rows(int64_t row, const Rows<BFloat16>& own, const Rows<BFloat16>& next, int64_t line,
                int64_t stride, float* sums) const {
    const uint32_t* weights = reinterpret_cast<const uint32_t*>(weights_) + row * kTile / 2;
    float* sum = sums + row * stride;
    int64_t dim = 0;
    for (; dim + 2 * kPairDims <= head_dim_; dim += 2 * kPairDims)
      add_value_pairs<kRows, 2, kFetched>(weights, own.values, next.values, dim, line + dim, stride,
                                          sum + dim);
    for (; dim < head_dim_; dim += kPairDims)
      add_value_pairs<kRows, 1, kFetched>(weights, own.values, next.values, dim, line + dim, stride,
                                          sum + dim);
  }

  const int64_t num_rows_, head_dim_;
  const float scaling_;
  uint32_t* queries_;  // words of two dims, [num_rows, head_dim / 2]
  float *keys_, *weights_;
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
