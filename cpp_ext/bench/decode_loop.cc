// Decodes the same codes again and again, as the adapter reader does.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "codebook.h"

/// Decodes `count` values `passes` times into `out` on this thread; returns milliseconds.
extern "C" __attribute__((visibility("default"))) double el_bench_decode(
    const float* book, size_t levels, uint64_t group, const std::byte* stats,
    const std::byte* codes, uint64_t count, int passes, float* out) {
  const edge_lora::Coding coding{std::make_shared<const std::vector<float>>(book, book + levels),
                                 group, stats};
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < passes; ++i) edge_lora::Decode(coding, codes, 0, count, out);
  const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
  return took.count();
}
