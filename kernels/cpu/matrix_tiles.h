// The arithmetic of a tile in the processor's matrix units (AMX): bfloat16 products, fp32 sums.
//
//   register   16 rows of 64 bytes: 16 x 16 floats, or 16 x 32 bfloat16 values
//   product    sums[16, 16] += left[16, 32] x right[32, 16], the right one as words of two values
//
// Weights are rounded to bfloat16 on the way, as flash-attn does. All rows go this way, few or many:
// a row's result is the same beside any others.
#pragma once

#include <algorithm>
#include <cstring>

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

class MatrixTiles {
 public:
  MatrixTiles(int64_t num_rows, int64_t head_dim, float scaling, Buffer& queries, Buffer& scratch)
      : num_rows_(num_rows),
        num_blocks_((num_rows + kMatrixRows - 1) / kMatrixRows),
        head_dim_(head_dim),
        scaling_(scaling) {
    const int64_t query_words = num_blocks_ * kMatrixRows * head_dim / 2;
    float* query_room = queries.reserve(query_words);
    std::memset(query_room, 0, 4 * query_words);  // rows that a last block lacks
    queries_ = reinterpret_cast<BFloat16*>(query_room);
    // A tile's keys, then its values; the weights of a block of rows, and the sums they make.
    packed_ = scratch.reserve(head_dim * kTile + kMatrixRows * (kTile / 2 + head_dim));
    packed_values_ = packed_ + head_dim / 2 * kTile;
    weights_ = packed_values_ + head_dim / 2 * kTile;
    sums_ = weights_ + kMatrixRows * kTile / 2;
    std::memset(weights_, 0, 2 * kMatrixRows * kTile);
  }

  // Rows of scores that `score` may write: whole blocks.
  int64_t room() const { return num_blocks_ * kMatrixRows; }

  // [blocks, head_dim / 32, 16, 32]
  void set_query(int64_t row, const BFloat16* query) {
    BFloat16* block = queries_ + row / kMatrixRows * kMatrixRows * head_dim_;
    for (int64_t dim = 0; dim < head_dim_; dim += kMatrixDepth)
      std::memcpy(block + dim * kMatrixRows + row % kMatrixRows * kMatrixDepth, query + dim,
                  2 * kMatrixDepth);
  }

  void score(const BFloat16* const keys[kTile], float* scores, Prefetch<BFloat16>& next_keys) {
    pack_keys(keys, head_dim_, packed_, next_keys);
    for (int64_t block = 0; block < num_blocks_; ++block)
      multiply_keys(queries_ + block * kMatrixRows * head_dim_,
                    scores + block * kMatrixRows * kTile);
    for (int64_t i = 0; i < num_rows_ * kTile; i += kLanes)
      store(scores + i, load<Floats>(scores + i) * scaling_);
    for (int64_t i = 0; i < head_dim_; ++i) next_keys.advance();
  }

  void add(const float* weights, const BFloat16* const values[kTile], int64_t stride, float* sums,
           Prefetch<BFloat16>& next_values) {
    pack_values(values, next_values);
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
  void multiply_keys(const BFloat16* queries, float* scores) const {
    settle_memory();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const float* keys = packed_;
    for (int64_t dim = 0; dim < head_dim_; dim += kMatrixDepth, keys += kMatrixRows * kTile) {
      _tile_loadd(4, queries + dim * kMatrixRows, 64);
      _tile_loadd(5, keys, 4 * kTile);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, keys + 16, 4 * kTile);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(7, keys + 32, 4 * kTile);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, keys + 48, 4 * kTile);
      _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, scores, 4 * kTile);
    _tile_stored(1, scores + 16, 4 * kTile);
    _tile_stored(2, scores + 32, 4 * kTile);
    _tile_stored(3, scores + 48, 4 * kTile);
  }

  // [head_dim / 16, kTile / 2, 16] words of two keys' values.
  void pack_values(const BFloat16* const values[kTile], Prefetch<BFloat16>& next_values) const {
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second =
        _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    for (int64_t dim = 0; dim < head_dim_; dim += kMatrixDepth) {
      float* to = packed_values_ + dim / 2 * kTile;
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

  // A block's weights as [kTile / 32, 16, 32] bfloat16; rows that it lacks keep what they had.
  void narrow(const float* weights, int64_t num_rows) const {
    for (int64_t row = 0; row < num_rows; ++row)
      for (int64_t key = 0; key < kTile; key += kMatrixDepth) {
        const float* from = weights + row * kTile + key;
        const __m512bh pair =
            _mm512_cvtne2ps_pbh(load<__m512>(from + kLanes), load<__m512>(from));
        store(weights_ + key / 2 * kMatrixRows + row * 16, pair);
      }
  }

  // sums [16, head_dim], two columns of 16 dims at a time.
  void multiply_values() const {
    constexpr int64_t kColumn = kTile / 2 * 16;  // words
    settle_memory();
    for (int64_t dim = 0; dim < head_dim_; dim += kMatrixDepth) {
      const float* column = packed_values_ + dim / 16 * kColumn;
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

  const int64_t num_rows_, num_blocks_, head_dim_;
  const float scaling_;
  BFloat16* queries_;
  float *packed_, *packed_values_, *weights_, *sums_;
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
