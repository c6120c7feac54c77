// How fast threads can read memory that no cache holds: the ceiling of decoding attention.

#include <cstdint>
#include <cstring>

typedef uint64_t Words __attribute__((vector_size(64), aligned(8), may_alias));

// The exclusive or of all words; a multiple of 64 bytes a thread.
extern "C" uint64_t read_all(const void* data, int64_t num_bytes, int32_t num_threads) {
  const char* bytes = static_cast<const char*>(data);
  uint64_t result = 0;
#pragma omp parallel num_threads(num_threads) reduction(^ : result)
  {
    Words sums[4] = {};
#pragma omp for schedule(static)
    for (int64_t block = 0; block < num_bytes / 4096; ++block)
      for (int64_t at = 0; at < 4096; at += 256)
        for (int i = 0; i < 4; ++i) {
          Words words;
          std::memcpy(&words, bytes + block * 4096 + at + 64 * i, 64);
          sums[i] ^= words;
        }
    for (int i = 0; i < 4; ++i)
      for (int lane = 0; lane < 8; ++lane) result ^= sums[i][lane];
  }
  return result;
}
