#pragma once

#include <cstdint>
#include <cstdlib>

// Memory on a cache line's boundary that only grows; its contents are whatever they were.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  float* reserve(int64_t size) {
    if (size > size_) {
      std::free(data_);
      size_ = size;
      data_ = static_cast<float*>(std::aligned_alloc(64, (size * 4 + 63) / 64 * 64));
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};
