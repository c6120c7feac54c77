// x @ weight.T + bias over bfloat16 weights, which are read once for all rows.
//
//   packed weight   [num_outputs / kWidth, num_inputs / 2, kWidth, 2]
//
// so that a word holds two inputs' weights of one output, and a vector of words kLanes outputs.
// Rows are float, or bfloat16 and so the results. Every output is summed over the inputs in order,
// in float: a row's result does not depend on the rows beside it, nor on the number of threads.
#pragma once

#include <algorithm>
#include <type_traits>

#include "calls.h"
#include "matrix_linear.h"
#include "vectors.h"

constexpr int64_t kWidth = 2 * kLanes;
constexpr int64_t kAhead = 32 * kWidth;  // words that come from memory before they are needed
constexpr int kOutputRows = kLanes == 16 ? 12 : 5;  // rows whose sums stay in registers

// Two inputs' weights of kWidth outputs, as rows are multiplied with them.
template <typename Row>
struct Weights;

template <>
struct Weights<float> {
  explicit Weights(const uint32_t* words) {
    for (int half = 0; half < 2; ++half) {
      const Words pairs = load<Words>(words + half * kLanes);
      even[half] = as_floats(pairs << 16);
      odd[half] = as_floats(pairs & 0xFFFF0000u);
    }
  }

  void add(const float* inputs, Floats sums[2]) const {
    const Floats a = splat(inputs[0]), b = splat(inputs[1]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      sums[half] += a * even[half];
      sums[half] += b * odd[half];
    }
  }

  Floats even[2], odd[2];
};

template <>
struct Weights<BFloat16> {
  explicit Weights(const uint32_t* words)
      : pairs{load<Words>(words), load<Words>(words + kLanes)} {}

  void add(const BFloat16* inputs, Floats sums[2]) const {
    const Words both = Words{} + load<uint32_t>(inputs);
    sums[0] = add_products(sums[0], both, pairs[0]);
    sums[1] = add_products(sums[1], both, pairs[1]);
  }

  Words pairs[2];
};

// Up to kWidth outputs of kRows rows.
template <int kRows, typename Row>
void multiply(const LinearCall& call, int64_t row, int64_t column) {
  const int64_t num_inputs = call.num_inputs;
  const Row* rows = static_cast<const Row*>(call.rows) + row * num_inputs;
  const uint32_t* words = call.weight + column * (num_inputs / 2);
  Floats sums[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
    for (int half = 0; half < 2; ++half)
      sums[r][half] = call.bias ? load<Floats>(call.bias + column + half * kLanes) : Floats{};
  for (int64_t i = 0; i < num_inputs; i += 2, words += kWidth) {
    __builtin_prefetch(words + kAhead);
    __builtin_prefetch(words + kAhead + kLanes);
    const Weights<Row> weights(words);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) weights.add(rows + r * num_inputs + i, sums[r]);
  }
  const int64_t count = call.num_outputs - column;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    Row* output = static_cast<Row*>(call.output) + (row + r) * call.num_outputs + column;
    Row edge[kWidth];
    Row* to = count < kWidth ? edge : output;
    store_floats(to, sums[r][0]);
    store_floats(to + kLanes, sums[r][1]);
    if (count < kWidth) std::copy_n(edge, count, output);
  }
}

template <typename Row, int kRows = kOutputRows>
void multiply_some(const LinearCall& call, int64_t row, int64_t num_rows, int64_t column) {
  if constexpr (kRows > 0) {
    if (num_rows == kRows)
      multiply<kRows, Row>(call, row, column);
    else
      multiply_some<Row, kRows - 1>(call, row, num_rows, column);
  }
}

static_assert(!kHasMatrixUnits || kWidth == MatrixLinear::kWidth);

// Whether rows of that kind are multiplied in matrix units, which a thread has to hold then.
template <typename Row>
bool in_matrices() {
  return kHasMatrixUnits && std::is_same_v<Row, BFloat16> && fit_matrices(kWidth);
}

// All outputs of all rows, shared among the threads of the parallel region that it is called in,
// which wait for each other after it.
template <typename Row>
void multiply_all(const LinearCall& call) {
  const int64_t num_blocks = (call.num_outputs + kWidth - 1) / kWidth;
  if constexpr (kHasMatrixUnits && std::is_same_v<Row, BFloat16>) {
    if (fit_matrices(call.num_inputs)) {
      thread_local Buffer room;
      const MatrixLinear linear(call, room);
#pragma omp for schedule(static)
      for (int64_t block = 0; block < num_blocks; ++block) linear.multiply(block * kWidth);
      return;
    }
  }
  const int64_t num_parts = (call.num_rows + kOutputRows - 1) / kOutputRows;  // alike in size
#pragma omp for schedule(static)
  for (int64_t block = 0; block < num_blocks; ++block)
    for (int64_t part = 0; part < num_parts; ++part) {
      const int64_t row = part * call.num_rows / num_parts;
      const int64_t stop = (part + 1) * call.num_rows / num_parts;
      multiply_some<Row>(call, row, stop - row, block * kWidth);
    }
}
