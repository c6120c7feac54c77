// What Python passes: the modules cpu_*.py have the same structures.
#pragma once

#include <cstdint>

extern "C" {

// Strides count elements. Where a sequence's keys lie is told by its blocks, `tables` from
// table_starts[i] on, or, where num_own > 0, key by key: num_listed `slots`, which count rows
// of `keys` with the heads end to end, then num_own rows that are in no page.
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
  const int64_t* slots;  // [num_kv_heads, num_sequences, num_listed]
  const void* own_keys;  // [num_kv_heads, num_sequences, num_own, head_dim]
  const void* own_values;
  int64_t num_sequences, block_size, num_listed, num_own;
  int64_t query_head_stride, query_row_stride, output_head_stride, output_row_stride;
  int64_t kv_head_stride;
  int64_t num_query_heads, num_kv_heads, head_dim;
  int64_t window;  // 0: none
  float scaling, softcap;  // 0: none
  int32_t num_threads;
};

struct MassCall {
  const void* query;  // the last rows of one sequence, [head, row, head_dim] by its strides
  const void* keys;   // [num_kv_heads, num_slots, head_dim]
  float* mass;        // [num_kv_heads, num_keys]
  const int64_t* table;  // the sequence's blocks
  int64_t num_rows, num_keys, block_size;
  int64_t query_head_stride, query_row_stride, kv_head_stride;
  int64_t num_query_heads, num_kv_heads, head_dim;
  float scaling, softcap;  // 0: none
  int32_t num_threads;
};

struct LargestCall {
  const float* scores;  // [num_rows, num_entries] by row_stride
  int64_t* indices;     // [num_rows, count]
  int64_t num_rows, num_entries, row_stride, count;
  int32_t num_threads;
};

struct LinearCall {
  const void* rows;  // [num_rows, num_inputs]
  const uint32_t* weight;
  const float* bias;  // or null, [num_outputs] and room for kWidth
  void* output;       // [num_rows, num_outputs]
  int64_t num_rows, num_inputs, num_outputs;
  int32_t num_threads;
};

// What a row's noise is a function of; one that is not random takes its largest score.
struct DrawKey {
  uint64_t seed, position, role, step, is_random;
};

struct ChoiceCall {
  const void* scores;        // [num_rows, num_entries]
  const float* greatest;     // [num_rows], or null with temperatures: scores are as they are
  const float* temperatures;
  const DrawKey* keys;  // [num_rows]
  double* values;       // [num_rows]; NaN: among the scores; -inf: none is above it
  int64_t* entries;     // [num_rows], of the whole vocabulary
  int64_t num_rows, num_entries;
  int64_t first_entry;  // of these scores in the vocabulary, a multiple of a block
  int32_t num_threads;
};

struct NormCall {
  const void* rows;      // [num_rows, num_dims]
  const void* residual;  // or null: added to the rows first
  void* summed;          // or null: where the sum goes
  const void* weight;
  void* output;
  int64_t num_rows, num_dims;  // a multiple of kLanes
  float epsilon;
  int32_t num_threads;
};

struct RotateCall {
  void* rows;  // [num_rows, row_stride], of which the first num_heads * head_dim turn
  const void* cos;  // [num_rows, head_dim]
  const void* sin;
  const void* norm_weights;  // or null: [num_heads, head_dim], each head's norm comes first
  int64_t num_rows, row_stride, num_heads, head_dim;  // a multiple of 2 * kLanes
  float epsilon;
  int32_t num_threads;
};

struct GateCall {
  const void* rows;  // [num_rows, 2, num_dims]: gates, then what they let through
  void* output;      // [num_rows, num_dims]
  int64_t num_rows, num_dims;  // a multiple of kLanes
  int32_t num_threads;
};

// K/V rows into pages, [num_kv_heads, num_slots, head_dim].
struct StoreCall {
  const void* keys;  // [head, row, head_dim] by their strides
  const void* values;
  void* key_pages;
  void* value_pages;
  const int64_t* slots;  // [num_rows]
  int64_t num_kv_heads, num_rows, head_dim;
  int64_t key_head_stride, key_row_stride, value_head_stride, value_row_stride;
  int64_t page_head_stride;
};

// A decoder layer's weights, linears as LinearCall has them, biases or null.
struct LayerWeights {
  const void* input_norm;  // [hidden_size]
  const void* attention_norm;  // the one after attention
  const void* head_norms;  // or null: [num_turned, head_dim]
  const uint32_t* qkv;
  const uint32_t* attended;  // attention's output projection
  const uint32_t* gate_up;
  const uint32_t* down;
  const float* qkv_bias;
  const float* attended_bias;
  const float* gate_up_bias;
  const float* down_bias;
  int64_t hidden_size, num_heads, num_turned, head_dim;  // heads of query, key and value
  int64_t attended_size, gate_size;  // what the projections of attention and gates read
  float input_epsilon, attention_epsilon, head_epsilon;
};

struct LayerStartCall {
  const void* rows;  // [num_rows, hidden_size]
  const void* cos;   // [num_rows, head_dim]
  const void* sin;
  void* output;  // [num_rows, num_heads, head_dim]
  int64_t num_rows;
  int32_t num_threads;
};

struct LayerEndCall {
  const void* rows;      // what attention gave, [num_rows, attended_size]
  const void* residual;  // the layer's input, [num_rows, hidden_size]
  void* output;          // the layer's
  int64_t num_rows;
  int32_t num_threads;
};

}  // extern "C"
