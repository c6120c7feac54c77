// A linear's products in the processor's matrix units (AMX), over weights as they are packed:
//
//   register 6, 7   32 inputs' weights of 16 outputs each, words of two inputs, as they lie
//   register 4, 5   32 inputs of 16 rows each, as they lie
//   register 0..3   what they add up to
//
// All rows go this way, few or many: a row's result is the same beside any others.
#pragma once

#include <algorithm>
#include <cstring>

#include "calls.h"
#include "matrix_tiles.h"
#include "vectors.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

class MatrixLinear {
 public:
  static constexpr int64_t kWidth = 32;  // outputs of a block

  // `room` holds the rows that do not fill a block of sixteen, for as long as this is used.
  MatrixLinear(const LinearCall& call, Buffer& room)
      : call_(call), rows_(static_cast<const BFloat16*>(call.rows)) {
    const int64_t whole = call.num_rows / kMatrixRows * kMatrixRows, rest = call.num_rows - whole;
    if (rest == 0) return;
    const int64_t size = kMatrixRows * call.num_inputs;
    BFloat16* copy = reinterpret_cast<BFloat16*>(room.reserve((size + 1) / 2));
    std::memcpy(copy, rows_ + whole * call.num_inputs, 2 * rest * call.num_inputs);
    std::memset(copy + rest * call.num_inputs, 0, 2 * (size - rest * call.num_inputs));
    rest_ = copy;
  }

  // Outputs of a block of all rows; the thread's MatrixUnits are used.
  void multiply(int64_t column) const {
    alignas(64) float sums[2 * kMatrixRows * kWidth];
    int64_t row = 0;
    for (; row + kMatrixRows < call_.num_rows; row += 2 * kMatrixRows) {
      add_up<2>(row, column, sums);
      store_rows(row, std::min(2 * kMatrixRows, call_.num_rows - row), column, sums);
    }
    if (row < call_.num_rows) {
      add_up<1>(row, column, sums);
      store_rows(row, call_.num_rows - row, column, sums);
    }
  }

 private:
  const BFloat16* block(int64_t row) const {
    const bool is_whole = row + kMatrixRows <= call_.num_rows;
    return is_whole ? rows_ + row * call_.num_inputs : rest_;
  }

  template <int kBlocks>
  void add_up(int64_t row, int64_t column, float* sums) const {
    const int64_t num_inputs = call_.num_inputs, stride = 2 * num_inputs;
    const uint32_t* words = call_.weight + column * (num_inputs / 2);
    const BFloat16* first = block(row);
    const BFloat16* second = kBlocks == 2 ? block(row + kMatrixRows) : nullptr;
    settle_memory();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < num_inputs; i += kMatrixDepth, words += kStep) {
      if (row == 0)  // later rows find the weights in a cache
        for (int64_t word = 0; word < kStep; word += kLanes) __builtin_prefetch(words + kAhead + word);
      _tile_loadd(6, words, 4 * kWidth);
      _tile_loadd(7, words + kWidth / 2, 4 * kWidth);
      _tile_loadd(4, first + i, stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kBlocks == 2) {
        _tile_loadd(5, second + i, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums, 4 * kWidth);
    _tile_stored(1, sums + kWidth / 2, 4 * kWidth);
    if constexpr (kBlocks == 2) {
      _tile_stored(2, sums + kMatrixRows * kWidth, 4 * kWidth);
      _tile_stored(3, sums + kMatrixRows * kWidth + kWidth / 2, 4 * kWidth);
    }
  }

  void store_rows(int64_t row, int64_t num_rows, int64_t column, const float* sums) const {
    const int64_t count = std::min(kWidth, call_.num_outputs - column);
    for (int64_t r = 0; r < num_rows; ++r, sums += kWidth) {
      BFloat16* output = static_cast<BFloat16*>(call_.output) + (row + r) * call_.num_outputs + column;
      BFloat16 edge[kWidth];
      BFloat16* to = count < kWidth ? edge : output;
      for (int64_t i = 0; i < kWidth; i += kLanes) {
        const Floats sum = load<Floats>(sums + i);
        store_floats(to + i, call_.bias ? sum + load<Floats>(call_.bias + column + i) : sum);
      }
      if (count < kWidth) std::copy_n(edge, count, output);
    }
  }

  static constexpr int64_t kStep = kMatrixDepth / 2 * kWidth;  // words of weights
  static constexpr int64_t kAhead = 4 * kStep;

  const LinearCall& call_;
  const BFloat16* rows_;
  const BFloat16* rest_ = nullptr;  // [16, num_inputs], zeros after the last row
};

#else

// Named where it is never used.
class MatrixLinear {
 public:
  static constexpr int64_t kWidth = 32;
  MatrixLinear(const LinearCall&, Buffer&);
  void multiply(int64_t) const;
};

#endif
