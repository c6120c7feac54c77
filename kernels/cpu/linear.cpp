// x @ weight.T + bias over bfloat16 weights, which are read once for all rows.
//
//   packed weight   [num_outputs / kWidth, num_inputs / 2, kWidth, 2]
//
// so that a word holds two inputs' weights of one output, and a vector of words kLanes outputs.
// Rows are float, or bfloat16 and so the results. Every output is summed over the inputs in order,
// in float: a row's result does not depend on the rows beside it, nor on the number of threads.

#include <algorithm>

#include "calls.h"
#include "matrix_linear.h"
#include "vectors.h"

namespace {

constexpr int64_t kWidth = 2 * kLanes;
constexpr int64_t kAhead = 32 * kWidth;  // words that come from memory before they are needed
constexpr int kRowBlock = kLanes == 16 ? 12 : 5;  // rows whose sums stay in registers

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

template <int kRows, typename Row>
void multiply_rest(const LinearCall& call, int64_t row, int64_t column) {
  if constexpr (kRows > 0) {
    if (call.num_rows - row == kRows)
      multiply<kRows, Row>(call, row, column);
    else
      multiply_rest<kRows - 1, Row>(call, row, column);
  }
}

template <typename Row>
void multiply_all(const LinearCall* call) {
  const int64_t num_blocks = (call->num_outputs + kWidth - 1) / kWidth;
#pragma omp parallel for schedule(static) num_threads(call->num_threads)
  for (int64_t block = 0; block < num_blocks; ++block) {
    int64_t row = 0;
    for (; row + kRowBlock <= call->num_rows; row += kRowBlock)
      multiply<kRowBlock, Row>(*call, row, block * kWidth);
    multiply_rest<kRowBlock - 1, Row>(*call, row, block * kWidth);
  }
}

static_assert(!kHasMatrixUnits || kWidth == MatrixLinear::kWidth);

void multiply_in_matrices(const LinearCall* call) {
  thread_local Buffer room;
  const MatrixLinear linear(*call, room);
  const int64_t num_blocks = (call->num_outputs + kWidth - 1) / kWidth;
#pragma omp parallel num_threads(call->num_threads)
  {
    const MatrixUnits units(true);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < num_blocks; ++block) linear.multiply(block * kWidth);
  }
}

}  // namespace

extern "C" {

int64_t linear_width() { return kWidth; }

// Whether bfloat16 is multiplied in pairs here: not where matrix units would do it.
int64_t multiplies_pairs() { return kHasPairProducts && !kHasMatrixUnits; }

// Whether rows in bfloat16 are multiplied with these weights faster than by other libraries.
int64_t multiplies_narrow_rows() { return kHasPairProducts; }

void linear_float32(const LinearCall* call) { multiply_all<float>(call); }
void linear_bfloat16(const LinearCall* call) {
  if constexpr (kHasMatrixUnits) {
    if (fit_matrices(call->num_inputs)) return multiply_in_matrices(call);
  }
  multiply_all<BFloat16>(call);
}

}  // extern "C"
