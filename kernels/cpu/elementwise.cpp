// What stands between a layer's linears, a pass over memory each; every row by itself.

#include "calls.h"
#include "vectors.h"

namespace {

constexpr int64_t kAlone = 1 << 15;  // elements below which one thread is done sooner

void normalize(const float* row, const NormCall& call, float* output) {
  Floats squares = {};
  for (int64_t i = 0; i < call.num_dims; i += kLanes) {
    const Floats value = load<Floats>(row + i);
    squares += value * value;
  }
  const float scale = 1.0f / std::sqrt(sum(squares) / call.num_dims + call.epsilon);
  for (int64_t i = 0; i < call.num_dims; i += kLanes)
    store(output + i, load<Floats>(call.weight + i) * (load<Floats>(row + i) * scale));
}

// The two halves of a head turn together, as rotate_half has them.
void rotate_head(float* head, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const Floats first = load<Floats>(head + i), second = load<Floats>(head + half + i);
    store(head + i, first * load<Floats>(cos + i) - second * load<Floats>(sin + i));
    store(head + half + i,
          second * load<Floats>(cos + half + i) + first * load<Floats>(sin + half + i));
  }
}

// x * sigmoid(x), where e^-|x| cannot overflow.
Floats silu(Floats x) {
  const Floats e = exp_of_negative(select(x > 0.0f, -x, x));
  return x * select(x > 0.0f, splat(1.0f), e) / (e + 1.0f);
}

}  // namespace

extern "C" {

void rms_norm(const NormCall* call) {
  const int64_t dims = call->num_dims;
#pragma omp parallel for num_threads(call->num_threads) if (call->num_rows * dims > kAlone)
  for (int64_t row = 0; row < call->num_rows; ++row)
    normalize(call->rows + row * dims, *call, call->output + row * dims);
}

void rotate(const RotateCall* call) {
  const int64_t dims = call->head_dim;
  const bool is_large = call->num_rows * call->row_stride > kAlone;
#pragma omp parallel for num_threads(call->num_threads) if (is_large)
  for (int64_t row = 0; row < call->num_rows; ++row)
    for (int64_t head = 0; head < call->num_heads; ++head)
      rotate_head(call->rows + row * call->row_stride + head * dims, call->cos + row * dims,
                  call->sin + row * dims, dims / 2);
}

void silu_product(const GateCall* call) {
  const int64_t dims = call->num_dims;
#pragma omp parallel for num_threads(call->num_threads) if (call->num_rows * dims > kAlone)
  for (int64_t row = 0; row < call->num_rows; ++row) {
    const float* gate = call->rows + 2 * row * dims;
    for (int64_t i = 0; i < dims; i += kLanes)
      store(call->output + row * dims + i,
            silu(load<Floats>(gate + i)) * load<Floats>(gate + dims + i));
  }
}

}  // extern "C"
