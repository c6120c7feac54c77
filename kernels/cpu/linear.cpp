// The linear of linear.h, a call each.

#include "linear.h"

namespace {

template <typename Row>
void multiply_each(const LinearCall* call) {
#pragma omp parallel num_threads(call->num_threads)
  {
    const MatrixUnits units(in_matrices<Row>());
    multiply_all<Row>(*call);
  }
}

}  // namespace

extern "C" {

int64_t linear_width() { return kWidth; }

// Whether bfloat16 is multiplied in pairs here: not where matrix units would do it.
int64_t multiplies_pairs() { return kHasPairProducts && !kHasMatrixUnits; }

// Whether rows in bfloat16 are multiplied with these weights faster than by other libraries.
int64_t multiplies_narrow_rows() { return kHasPairProducts; }

void linear_float32(const LinearCall* call) { multiply_each<float>(call); }
void linear_bfloat16(const LinearCall* call) { multiply_each<BFloat16>(call); }

}  // extern "C"
