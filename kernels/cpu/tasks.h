// How a call is cut into tasks: a split of one KV head's keys and a block of one sequence's rows.
#pragma once

#include <algorithm>
#include <vector>

#include "calls.h"

constexpr int64_t kSplit = 512;      // keys of a task
constexpr int64_t kFoldedRows = 96;  // of a task, unless one query row's group is more
constexpr int64_t kLeastRows = 17;   // query rows that share one reading of the keys

// One sequence's rows first_row .. first_row + num_rows - 1 (of its own) over one split.
struct Task {
  int64_t sequence, head, first_row, num_rows, begin, end;
  int64_t partial;  // offset: per folded row head_dim sums, the maximum, the sums of weights
};

// Tasks that share rows and head: first .. last - 1.
struct Group {
  int64_t first, last;
};

class Tasks {
 public:
  std::vector<Task> tasks;
  std::vector<Group> groups;
  int64_t num_partials = 0;  // floats

  Tasks(const AttentionCall& call, int64_t partial_stride) : call_(call), stride_(partial_stride) {
    const int64_t block = std::max(kLeastRows, kFoldedRows / group_size());
    for (int64_t s = 0; s < call.num_sequences; ++s)
      for (int64_t head = 0; head < call.num_kv_heads; ++head)
        for (int64_t first = 0; first < call.query_lens[s]; first += block)
          split(s, head, first, std::min(block, call.query_lens[s] - first));
  }

  int64_t group_size() const { return call_.num_query_heads / call_.num_kv_heads; }

 private:
  void split(int64_t s, int64_t head, int64_t first, int64_t num_rows) {
    const int64_t num_tasks = tasks.size(), context = call_.context_lens[s];
    const int64_t end = call_.mask ? context : context + first + num_rows;
    int64_t begin = call_.window ? std::max<int64_t>(context + first - call_.window + 1, 0) : 0;
    while (begin < end) {
      const int64_t stop = std::min((begin / kSplit + 1) * kSplit, end);
      tasks.push_back({s, head, first, num_rows, begin, stop, num_partials});
      num_partials += num_rows * group_size() * stride_;
      begin = stop;
    }
    groups.push_back({num_tasks, static_cast<int64_t>(tasks.size())});
  }

  const AttentionCall& call_;
  const int64_t stride_;
};
