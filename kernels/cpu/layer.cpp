// A decoder layer before and after its attention, a parallel region each:
//
//   start   norm -> query, key and value -> rotation
//   end     output projection -> sum and norm -> gates and up -> silu product -> down -> sum
//
// Each step is the one of linear.h or elementwise.h, and rounds as it does by itself.

#include "elementwise.h"
#include "linear.h"

namespace {

// Rows of the steps in between, call after call.
thread_local Buffer room;

template <typename Value>
class Room {
 public:
  explicit Room(int64_t num_values)
      : next_(reinterpret_cast<Value*>(room.reserve(num_values * sizeof(Value) / 4 + 1))) {}

  Value* take(int64_t num_values) {
    next_ += num_values;
    return next_ - num_values;
  }

 private:
  Value* next_;
};

template <typename Value>
void start(const LayerWeights& layer, const LayerStartCall& call) {
  const int64_t rows = call.num_rows, hidden = layer.hidden_size;
  const int64_t width = layer.num_heads * layer.head_dim;
  const int32_t threads = call.num_threads;
  Value* normed = Room<Value>(rows * hidden).take(rows * hidden);
  const NormCall norm{call.rows, nullptr, nullptr,         layer.input_norm, normed, rows,
                      hidden,    layer.input_epsilon, threads};
  const LinearCall qkv{normed, layer.qkv, layer.qkv_bias, call.output, rows, hidden, width, threads};
  const RotateCall rotation{call.output, call.cos, call.sin,         layer.head_norms,
                            rows,        width,    layer.num_turned, layer.head_dim,
                            layer.head_epsilon, threads};
#pragma omp parallel num_threads(threads)
  {
    const MatrixUnits units(in_matrices<Value>());
    normalize_rows<Value>(&norm);
    multiply_all<Value>(qkv);
    rotate_rows<Value>(&rotation);
  }
}

template <typename Value>
void end(const LayerWeights& layer, const LayerEndCall& call) {
  const int64_t rows = call.num_rows, hidden = layer.hidden_size, gates = layer.gate_size;
  const int32_t threads = call.num_threads;
  Room<Value> own(rows * (4 * hidden + 3 * gates));
  Value *attended = own.take(rows * hidden), *summed = own.take(rows * hidden);
  Value *normed = own.take(rows * hidden), *both = own.take(rows * 2 * gates);
  Value *gated = own.take(rows * gates), *down = own.take(rows * hidden);
  const LinearCall first{call.rows, layer.attended,      layer.attended_bias, attended,
                         rows,      layer.attended_size, hidden,              threads};
  const NormCall norm{attended, call.residual, summed, layer.attention_norm,
                      normed,   rows,          hidden, layer.attention_epsilon,
                      threads};
  const LinearCall second{normed, layer.gate_up, layer.gate_up_bias, both, rows, hidden, 2 * gates,
                          threads};
  const GateCall gate{both, gated, rows, gates, threads};
  const LinearCall third{gated, layer.down, layer.down_bias, down, rows, gates, hidden, threads};
#pragma omp parallel num_threads(threads)
  {
    const MatrixUnits units(in_matrices<Value>());
    multiply_all<Value>(first);
    normalize_rows<Value>(&norm);
    multiply_all<Value>(second);
    gate_rows<Value>(&gate);
    multiply_all<Value>(third);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row)
      add(down + row * hidden, summed + row * hidden, hidden,
          static_cast<Value*>(call.output) + row * hidden);
  }
}

}  // namespace

extern "C" {

void start_layer_float32(const LayerWeights* layer, const LayerStartCall* call) {
  start<float>(*layer, *call);
}

void start_layer_bfloat16(const LayerWeights* layer, const LayerStartCall* call) {
  start<BFloat16>(*layer, *call);
}

void end_layer_float32(const LayerWeights* layer, const LayerEndCall* call) {
  end<float>(*layer, *call);
}

void end_layer_bfloat16(const LayerWeights* layer, const LayerEndCall* call) {
  end<BFloat16>(*layer, *call);
}

}  // extern "C"
