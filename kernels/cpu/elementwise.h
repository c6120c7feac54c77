// What stands between a layer's linears, a pass over memory each; every row by itself.
//
// bfloat16 values are rounded where transformers' modules round them. What works on rows shares them
// among the threads of the parallel region that it is called in, which wait for each other after it.
#pragma once

#include "calls.h"
#include "vectors.h"

template <typename Value>
void add(const Value* row, const Value* residual, int64_t num_dims, Value* summed) {
  for (int64_t i = 0; i < num_dims; i += kLanes)
    store_floats(summed + i, load_floats(row + i) + load_floats(residual + i));
}

// The output may be the row itself.
template <typename Value>
void normalize(const Value* row, const Value* weight, int64_t num_dims, float epsilon,
               Value* output) {
  Floats squares = {};
  for (int64_t i = 0; i < num_dims; i += kLanes) {
    const Floats value = load_floats(row + i);
    squares += value * value;
  }
  const float scale = 1.0f / std::sqrt(sum(squares) / num_dims + epsilon);
  for (int64_t i = 0; i < num_dims; i += kLanes)
    store_floats(output + i, load_floats(weight + i) * rounded<Value>(load_floats(row + i) * scale));
}

template <typename Value>
void normalize_rows(const NormCall* call) {
  const int64_t dims = call->num_dims;
  const Value* residual = static_cast<const Value*>(call->residual);
#pragma omp for schedule(static)
  for (int64_t row = 0; row < call->num_rows; ++row) {
    const Value* entries = static_cast<const Value*>(call->rows) + row * dims;
    if (residual != nullptr) {
      Value* summed = static_cast<Value*>(call->summed) + row * dims;
      add(entries, residual + row * dims, dims, summed);
      entries = summed;
    }
    normalize(entries, static_cast<const Value*>(call->weight), dims, call->epsilon,
              static_cast<Value*>(call->output) + row * dims);
  }
}

// The two halves of a head turn together, as rotate_half has them.
template <typename Value>
void rotate_head(Value* head, const Value* cos, const Value* sin, int64_t half) {
  const auto product = [](Floats a, const Value* b) { return rounded<Value>(a * load_floats(b)); };
  for (int64_t i = 0; i < half; i += kLanes) {
    const Floats first = load_floats(head + i), second = load_floats(head + half + i);
    store_floats(head + i, product(first, cos + i) - product(second, sin + i));
    store_floats(head + half + i,
                 product(second, cos + half + i) + product(first, sin + half + i));
  }
}

template <typename Value>
void rotate_rows(const RotateCall* call) {
  const int64_t dims = call->head_dim;
  const Value* cos = static_cast<const Value*>(call->cos);
  const Value* sin = static_cast<const Value*>(call->sin);
  const Value* weights = static_cast<const Value*>(call->norm_weights);
#pragma omp for schedule(static)
  for (int64_t row = 0; row < call->num_rows; ++row)
    for (int64_t head = 0; head < call->num_heads; ++head) {
      Value* entries = static_cast<Value*>(call->rows) + row * call->row_stride + head * dims;
      if (weights != nullptr)
        normalize(entries, weights + head * dims, dims, call->epsilon, entries);
      rotate_head(entries, cos + row * dims, sin + row * dims, dims / 2);
    }
}

// x * sigmoid(x), where e^-|x| cannot overflow.
inline Floats silu(Floats x) {
  const Floats e = bounded_exp(select(x > 0.0f, -x, x));
  return x * select(x > 0.0f, splat(1.0f), e) / (e + 1.0f);
}

template <typename Value>
void gate_rows(const GateCall* call) {
  const int64_t dims = call->num_dims;
#pragma omp for schedule(static)
  for (int64_t row = 0; row < call->num_rows; ++row) {
    const Value* gate = static_cast<const Value*>(call->rows) + 2 * row * dims;
    Value* output = static_cast<Value*>(call->output) + row * dims;
    for (int64_t i = 0; i < dims; i += kLanes)
      store_floats(output + i,
                   rounded<Value>(silu(load_floats(gate + i))) * load_floats(gate + dims + i));
  }
}
