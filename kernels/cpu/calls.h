// What Python passes: cpu_attention.py and cpu_linear.py have the same structures.
#pragma once

#include <cstdint>

extern "C" {

// Strides count elements. `tables` holds every sequence's blocks, from table_starts[i] on.
struct AttentionCall {
  const void* query;  // rows of all sequences, [head, row, head_dim] by its strides
  void* output;
  const void* keys;  // [num_kv_heads, num_slots, head_dim]
  const void* values;
  const void* mask;  // or null: added to the scores, [num_sequences, num_keys], as keys
  const int64_t* row_starts;  // [num_sequences], as all of these: a sequence's first row
  const int64_t* query_lens;
  const int64_t* context_lens;  // keys before the rows' own
  const int64_t* tables;
  const int64_t* table_starts;
  int64_t num_sequences, block_size;
  int64_t query_head_stride, query_row_stride, output_head_stride, output_row_stride;
  int64_t kv_head_stride;
  int64_t num_query_heads, num_kv_heads, head_dim;
  int64_t window;  // 0: none
  float scaling, softcap;  // 0: none
  int32_t num_threads;
};

struct LinearCall {
  const float* rows;  // [num_rows, num_inputs]
  const uint32_t* weight;
  const float* bias;  // or null, [num_outputs] and room for kWidth
  float* output;      // [num_rows, num_outputs]
  int64_t num_rows, num_inputs, num_outputs;
  int32_t num_threads;
};

}  // extern "C"
