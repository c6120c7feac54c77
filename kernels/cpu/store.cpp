// K/V rows into pages, rounded where pages are narrower.

#include "calls.h"
#include "vectors.h"

namespace {

template <typename Row, typename Cache>
void store_rows(const StoreCall& call) {
  const int64_t dims = call.head_dim;
  const auto move = [&](const void* rows, void* pages, int64_t head_stride, int64_t row_stride) {
    for (int64_t head = 0; head < call.num_kv_heads; ++head)
      for (int64_t row = 0; row < call.num_rows; ++row) {
        const Row* from = static_cast<const Row*>(rows) + head * head_stride + row * row_stride;
        Cache* to = static_cast<Cache*>(pages) + head * call.page_head_stride +
                    call.slots[row] * dims;
        for (int64_t dim = 0; dim < dims; dim += kLanes)
          store_floats(to + dim, load_floats(from + dim));
      }
  };
  move(call.keys, call.key_pages, call.key_head_stride, call.key_row_stride);
  move(call.values, call.value_pages, call.value_head_stride, call.value_row_stride);
}

}  // namespace

extern "C" {

void store_float32(const StoreCall* call) { store_rows<float, float>(*call); }

void store_bfloat16(const StoreCall* call) { store_rows<BFloat16, BFloat16>(*call); }

// fp32 rows into bfloat16 pages.
void store_mixed(const StoreCall* call) { store_rows<float, BFloat16>(*call); }

}  // extern "C"
