// x @ weight.T + bias of float rows over bfloat16 weights, which are read once for all rows.
//
//   packed weight   [num_outputs / kWidth, num_inputs / 2, kWidth, 2]
//
// so that a word holds two inputs' weights of one output, and a vector of words kLanes outputs.
// Every output is summed over the inputs in order, in float: a row's result does not depend on the
// rows beside it, nor on the number of threads.

#include <algorithm>

#include "calls.h"
#include "vectors.h"

namespace {

constexpr int64_t kWidth = 2 * kLanes;
constexpr int64_t kAhead = 32 * kWidth;  // words that come from memory before they are needed
constexpr int kRowBlock = kLanes == 16 ? 12 : 5;  // rows whose sums stay in registers

// Up to kWidth outputs of kRows rows.
template <int kRows>
void multiply(const LinearCall& call, int64_t row, int64_t column) {
  const int64_t inputs = call.num_inputs;
  const float* rows = call.rows + row * inputs;
  const uint32_t* weight = call.weight + column * (inputs / 2);
  Floats sums[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
    for (int half = 0; half < 2; ++half)
      sums[r][half] = call.bias ? load<Floats>(call.bias + column + half * kLanes) : Floats{};
  for (int64_t i = 0; i < inputs; i += 2, weight += kWidth) {
    __builtin_prefetch(weight + kAhead);
    __builtin_prefetch(weight + kAhead + kLanes);
    const Words first = load<Words>(weight), second = load<Words>(weight + kLanes);
    const Floats even[2] = {as_floats(first << 16), as_floats(second << 16)};
    const Floats odd[2] = {as_floats(first & 0xFFFF0000u), as_floats(second & 0xFFFF0000u)};
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Floats a = splat(rows[r * inputs + i]), b = splat(rows[r * inputs + i + 1]);
#pragma GCC unroll 16
      for (int half = 0; half < 2; ++half) {
        sums[r][half] += a * even[half];
        sums[r][half] += b * odd[half];
      }
    }
  }
  const int64_t count = call.num_outputs - column;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    float* output = call.output + (row + r) * call.num_outputs + column;
    float edge[kWidth];
    float* to = count < kWidth ? edge : output;
    store(to, sums[r][0]);
    store(to + kLanes, sums[r][1]);
    if (count < kWidth) std::copy_n(edge, count, output);
  }
}

template <int kRows>
void multiply_rest(const LinearCall& call, int64_t row, int64_t column) {
  if constexpr (kRows > 0) {
    if (call.num_rows - row == kRows)
      multiply<kRows>(call, row, column);
    else
      multiply_rest<kRows - 1>(call, row, column);
  }
}

}  // namespace

extern "C" {

int64_t linear_width() { return kWidth; }

void linear(const LinearCall* call) {
  const int64_t num_blocks = (call->num_outputs + kWidth - 1) / kWidth;
#pragma omp parallel for schedule(static) num_threads(call->num_threads)
  for (int64_t block = 0; block < num_blocks; ++block) {
    int64_t row = 0;
    for (; row + kRowBlock <= call->num_rows; row += kRowBlock)
      multiply<kRowBlock>(*call, row, block * kWidth);
    multiply_rest<kRowBlock - 1>(*call, row, block * kWidth);
  }
}

}  // extern "C"
