// The arithmetic of a tile in the processor's matrix units (AMX): bfloat16 products, fp32 sums.
//
//   register   16 rows of 64 bytes: 16 x 16 floats, or 16 x 32 bfloat16 values
//   product    sums[16, 16] += left[16, 32] x right[32, 16], the right one as words of two values
//
//   scores     keys [16, dims] x queries [dims, 16], keys as they lie in their page; then turned
//   sums       weights [16, keys] x values [keys, 16], words of two keys
//
// Weights are rounded to bfloat16 on the way, as flash-attn does. All rows go this way, few or many:
// a row's result is the same beside any others.
#pragma once

#include <algorithm>
#include <cstring>

#include "pair_tiles.h"
#include "tiles.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

#include <sys/syscall.h>
#include <unistd.h>

constexpr bool kHasMatrixUnits = true;
constexpr int64_t kMatrixRows = 16;
constexpr int64_t kMatrixDepth = 32;  // values that one product sums over

// Whether heads of so many dims can be multiplied so; the operating system is asked once.
inline bool fit_matrices(int64_t head_dim) {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted && head_dim % kMatrixDepth == 0;
}

// This thread's registers while it lives; other libraries find theirs as they had left them.
class MatrixUnits {
 public:
  explicit MatrixUnits(bool used) : used_(used) {
    if (!used_) return;
    _tile_storeconfig(before_);
    alignas(64) uint8_t own[64] = {1};  // palette 1; from byte 16 bytes a row, from 48 rows
    for (int i = 0; i < 8; ++i) {
      own[16 + 2 * i] = 64;
      own[48 + i] = kMatrixRows;
    }
    _tile_loadconfig(own);
  }

  MatrixUnits(const MatrixUnits&) = delete;

  ~MatrixUnits() {
    if (!used_) return;
    if (before_[0])
      _tile_loadconfig(before_);
    else
      _tile_release();
  }

 private:
  const bool used_;
  alignas(64) uint8_t before_[64];
};

// GCC does not know that a register is loaded from memory, and would store there later.
inline void settle_memory() { asm volatile("" ::: "memory"); }

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

class MatrixTiles {
  using Ahead = Prefetch<BFloat16, true>;

 public:
  MatrixTiles(int64_t num_rows, int64_t head_dim, float scaling, Buffer& queries, Buffer& scratch)
      : num_rows_(num_rows), head_dim_(head_dim), scaling_(scaling) {
    const int64_t num_blocks = (num_rows + kMatrixRows - 1) / kMatrixRows;
    const int64_t query_words = num_blocks * kMatrixRows * head_dim / 2;
    float* query_room = queries.reserve(query_words);
    std::memset(query_room, 0, 4 * query_words);  // rows that a last block lacks
    queries_ = reinterpret_cast<uint32_t*>(query_room);
    // Keys that lie apart and a tile's values; a block of rows' weights, and what they add up to.
    const int64_t sizes[] = {head_dim / 2 * kTile, head_dim / 2 * kTile, kMatrixRows * kTile / 2,
                             kMatrixRows * std::max(head_dim, kTile)};
    keys_ = scratch.reserve(sizes[0] + sizes[1] + sizes[2] + sizes[3]);
    values_ = keys_ + sizes[0];
    weights_ = values_ + sizes[1];
    sums_ = weights_ + sizes[2];
    std::memset(weights_, 0, 2 * kMatrixRows * kTile);
  }

  // Words of two dims: [blocks, head_dim / 2, 16].
  void set_query(int64_t row, const BFloat16* query) {
    uint32_t* block = queries_ + row / kMatrixRows * kMatrixRows * head_dim_ / 2;
    for (int64_t dim = 0; dim < head_dim_; dim += 2)
      std::memcpy(block + dim / 2 * kMatrixRows + row % kMatrixRows, query + dim, 4);
  }

  void score(const Rows<BFloat16>& own, const Rows<BFloat16>& next, float* scores) {
    Ahead next_keys(next.keys, head_dim_);
    const BFloat16* groups[kTile / kMatrixRows];
    for (int64_t i = 0; i < kTile / kMatrixRows; ++i) {
      groups[i] = side_by_side(own.keys + i * kMatrixRows, i);
      advance(next_keys, head_dim_ / 8);
    }
    for (int64_t first = 0; first < num_rows_; first += kMatrixRows) {
      multiply_keys(groups, queries_ + first * head_dim_ / 2, next_keys);
      turn(std::min(kMatrixRows, num_rows_ - first), scores + first * kTile, next_keys);
    }
  }

  void add(const float* weights, const Rows<BFloat16>& own, const Rows<BFloat16>& next,
           int64_t stride, float* sums) {
    Ahead next_values(next.values, head_dim_);
    pair_values(own.values, head_dim_, values_, next_values);
    for (int64_t first = 0; first < num_rows_; first += kMatrixRows) {
      const int64_t count = std::min(kMatrixRows, num_rows_ - first);
      narrow(weights + first * kTile, count);
      multiply_values();
      for (int64_t row = 0; row < count; ++row) {
        float* sum = sums + (first + row) * stride;
        for (int64_t dim = 0; dim < head_dim_; dim += kLanes)
          store(sum + dim, load<Floats>(sum + dim) + load<Floats>(sums_ + row * head_dim_ + dim));
      }
    }
  }

 private:
  static void advance(Ahead& prefetch, int64_t num_lines) {
    for (int64_t i = 0; i < num_lines; ++i) prefetch.advance();
  }

  // Sixteen keys, copied unless they lie so.
  const BFloat16* side_by_side(const BFloat16* const keys[kMatrixRows], int64_t group) const {
    bool together = true;
    for (int64_t i = 1; i < kMatrixRows; ++i) together &= keys[i] == keys[0] + i * head_dim_;
    if (together) return keys[0];
    BFloat16* copy = reinterpret_cast<BFloat16*>(keys_) + group * kMatrixRows * head_dim_;
    for (int64_t i = 0; i < kMatrixRows; ++i)
      std::memcpy(copy + i * head_dim_, keys[i], 2 * head_dim_);
    return copy;
  }

  // sums [kTile, 16]: a key's scores with sixteen queries.
  void multiply_keys(const BFloat16* const groups[], const uint32_t* queries,
                     Ahead& next_keys) const {
    const int64_t stride = 2 * head_dim_;
    settle_memory();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t dim = 0; dim < head_dim_; dim += kMatrixDepth) {
      _tile_loadd(7, queries + dim / 2 * kMatrixRows, 64);
      _tile_loadd(4, groups[0] + dim, stride);
      _tile_dpbf16ps(0, 4, 7);
      advance(next_keys, 8);
      _tile_loadd(5, groups[1] + dim, stride);
      _tile_dpbf16ps(1, 5, 7);
      advance(next_keys, 8);
      _tile_loadd(6, groups[2] + dim, stride);
      _tile_dpbf16ps(2, 6, 7);
      advance(next_keys, 8);
      _tile_loadd(4, groups[3] + dim, stride);
      _tile_dpbf16ps(3, 4, 7);
    }
    _tile_stored(0, sums_, 64);
    _tile_stored(1, sums_ + 16 * 16, 64);
    _tile_stored(2, sums_ + 32 * 16, 64);
    _tile_stored(3, sums_ + 48 * 16, 64);
  }

  // scores[row] of the sums, scaled.
  void turn(int64_t num_rows, float* scores, Ahead& next_keys) const {
    for (int64_t key = 0; key < kTile; key += kLanes) {
      Words block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load<Words>(sums_ + (key + i) * kMatrixRows);
      transpose(block);
      advance(next_keys, 8);
      for (int64_t row = 0; row < num_rows; ++row)
        store(scores + row * kTile + key, as_floats(block[row]) * scaling_);
    }
  }

  // A block's weights as [kTile / 32, 16, 32] bfloat16; rows that it lacks keep what they had.
  void narrow(const float* weights, int64_t num_rows) const {
    for (int64_t row = 0; row < num_rows; ++row)
      for (int64_t key = 0; key < kTile; key += kMatrixDepth) {
        store(weights_ + key / 2 * kMatrixRows + row * 16,
              rounded_weights(weights + row * kTile + key));
      }
  }

  // sums [16, head_dim], two columns of 16 dims at a time.
  void multiply_values() const {
    constexpr int64_t kColumn = kTile / 2 * 16;  // words
    settle_memory();
    for (int64_t dim = 0; dim < head_dim_; dim += kMatrixDepth) {
      const float* column = values_ + dim / 16 * kColumn;
      _tile_zero(0);
      _tile_zero(1);
      _tile_loadd(4, weights_, 64);
      _tile_loadd(5, weights_ + kMatrixRows * 16, 64);
      _tile_loadd(6, column, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, column + kColumn, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(6, column + kColumn / 2, 64);
      _tile_dpbf16ps(0, 5, 6);
      _tile_loadd(7, column + kColumn + kColumn / 2, 64);
      _tile_dpbf16ps(1, 5, 7);
      _tile_stored(0, sums_ + dim, 4 * head_dim_);
      _tile_stored(1, sums_ + dim + 16, 4 * head_dim_);
    }
  }

  const int64_t num_rows_, head_dim_;
  const float scaling_;
  uint32_t* queries_;
  float *keys_, *values_, *weights_, *sums_;
};

#else

constexpr bool kHasMatrixUnits = false;

inline bool fit_matrices(int64_t) { return false; }

class MatrixUnits {
 public:
  explicit MatrixUnits(bool) {}
};

// Named where it is never used.
class MatrixTiles {
 public:
  MatrixTiles(int64_t, int64_t, float, Buffer&, Buffer&);
  void set_query(int64_t, const BFloat16*);
};

#endif
