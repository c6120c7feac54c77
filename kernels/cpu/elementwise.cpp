// The passes of elementwise.h, a call each.

#include "elementwise.h"

namespace {

constexpr int64_t kAlone = 1 << 15;  // elements below which one thread is done sooner

template <typename Value>
void normalize_all(const NormCall* call) {
#pragma omp parallel num_threads(call->num_threads) if (call->num_rows * call->num_dims > kAlone)
  normalize_rows<Value>(call);
}

template <typename Value>
void rotate_all(const RotateCall* call) {
#pragma omp parallel num_threads(call->num_threads) if (call->num_rows * call->row_stride > kAlone)
  rotate_rows<Value>(call);
}

template <typename Value>
void gate_all(const GateCall* call) {
#pragma omp parallel num_threads(call->num_threads) if (call->num_rows * call->num_dims > kAlone)
  gate_rows<Value>(call);
}

}  // namespace

extern "C" {

void rms_norm_float32(const NormCall* call) { normalize_all<float>(call); }

void rms_norm_bfloat16(const NormCall* call) { normalize_all<BFloat16>(call); }

void rotate_float32(const RotateCall* call) { rotate_all<float>(call); }

void rotate_bfloat16(const RotateCall* call) { rotate_all<BFloat16>(call); }

void silu_product_float32(const GateCall* call) { gate_all<float>(call); }

void silu_product_bfloat16(const GateCall* call) { gate_all<BFloat16>(call); }

}  // extern "C"
