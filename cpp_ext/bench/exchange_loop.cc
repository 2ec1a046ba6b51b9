// The yardstick of a swap: the shortest loop that exchanges the same values with the same blocks.
//
// No patches, checks, locks or stealing of work: every thread walks its share and is done.
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

/// Exchanges values[p][i * run + j] with blocks[p][offsets[p][i] + j] for all p < parts,
/// i < counts[p], j < run, on `threads` threads; returns milliseconds. `run` is 1, 8 or 16.
extern "C" __attribute__((visibility("default"))) double el_bench_exchange(
    size_t parts, float* const* blocks, const uint32_t* const* offsets, float* const* values,
    const size_t* counts, size_t run, int threads) {
  const auto start = std::chrono::steady_clock::now();
  const auto walk = [=](size_t share) {
    for (size_t p = 0; p < parts; ++p) {
      const size_t begin = counts[p] * share / static_cast<size_t>(threads);
      const size_t end = counts[p] * (share + 1) / static_cast<size_t>(threads);
      float* block = blocks[p];
      float* value = values[p];
      const uint32_t* offset = offsets[p];
      if (run == 1) {
        for (size_t i = begin; i < end; ++i) std::swap(block[offset[i]], value[i]);
        continue;
      }
      for (size_t i = begin; i < end; ++i) {
        std::swap_ranges(block + offset[i], block + offset[i] + run, value + i * run);
      }
    }
  };
  {
    std::vector<std::jthread> helpers;
    for (int t = 1; t < threads; ++t) helpers.emplace_back(walk, t);
    walk(0);
  }
  const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
  return took.count();
}
