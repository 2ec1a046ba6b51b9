#include "codebook.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace edge_lora {
namespace {

struct Stats {
  float mean;
  float spread;
};

Stats StatsOf(const Coding& coding, uint64_t group) {
  Stats stats;
  std::memcpy(&stats, coding.stats + group * sizeof stats, sizeof stats);
  return stats;
}

float Level(float level, const Stats& stats) { return level * stats.spread + stats.mean; }

/// The code of value i.
template <uint32_t kBits>
uint32_t CodeAt(const std::byte* codes, uint64_t i) {
  constexpr uint32_t kEach = 8 / kBits;
  return static_cast<uint32_t>(codes[i / kEach]) >> i % kEach * kBits & ((1U << kBits) - 1);
}

/// Decodes a run of one group. A byte at a time: its codes are looked up side by side, which takes
/// a cycle a value on any CPU, where vector shuffles are fast on the widest only.
template <uint32_t kBits>
void DecodeRun(const std::byte* codes, uint64_t first, uint64_t count, const float* table,
               float* out) {
  constexpr uint32_t kEach = 8 / kBits;
  uint64_t i = 0;
  for (; i < count && (first + i) % kEach != 0; ++i)
    out[i] = table[CodeAt<kBits>(codes, first + i)];
  for (; i + kEach <= count; i += kEach) {
    const auto byte = static_cast<uint32_t>(codes[(first + i) / kEach]);
    for (uint32_t j = 0; j < kEach; ++j) {
      out[i + j] = table[byte >> j * kBits & ((1U << kBits) - 1)];
    }
  }
  for (; i < count; ++i) out[i] = table[CodeAt<kBits>(codes, first + i)];
}

template <uint32_t kBits>
void DecodeGroups(const Coding& coding, const std::byte* codes, uint64_t first, uint64_t count,
                  float* out) {
  constexpr uint32_t kLevels = 1U << kBits;
  const float* book = coding.book->data();
  while (count > 0) {
    const Stats stats = StatsOf(coding, first / coding.group);
    const uint64_t run = std::min(count, coding.group - first % coding.group);
    if (run < kLevels) {  // a table would take longer than the values
      for (uint64_t i = 0; i < run; ++i) {
        out[i] = Level(book[CodeAt<kBits>(codes, first + i)], stats);
      }
    } else {
      float table[kLevels];
      for (uint32_t code = 0; code < kLevels; ++code) table[code] = Level(book[code], stats);
      DecodeRun<kBits>(codes, first, run, table, out);
    }
    first += run;
    count -= run;
    out += run;
  }
}

}  // namespace

bool IsSoundBook(const std::vector<float>& levels) {
  const size_t count = levels.size();
  return (count == 2 || count == 4 || count == 16 || count == 256) &&
         std::ranges::all_of(levels, [](float level) { return std::isfinite(level); }) &&
         std::ranges::adjacent_find(levels, std::greater_equal<>()) == levels.end();
}

bool HasSoundStats(const Coding& coding, uint64_t count) {
  const uint64_t groups = coding.groups(count);
  for (uint64_t group = 0; group < groups; ++group) {
    const Stats stats = StatsOf(coding, group);
    // Levels ascend, and so do products and sums: the ends tell.
    if (!(stats.spread >= 0) || !std::isfinite(stats.spread) || !std::isfinite(stats.mean) ||
        !std::isfinite(Level(coding.book->front(), stats)) ||
        !std::isfinite(Level(coding.book->back(), stats))) {
      return false;
    }
  }
  return true;
}

bool HasCleanPadding(const Coding& coding, const std::byte* codes, uint64_t count) {
  const auto used = static_cast<uint32_t>(count * coding.bits() % 8);
  return used == 0 || (codes[coding.code_bytes(count) - 1] >> used) == std::byte{0};
}

void Decode(const Coding& coding, const std::byte* codes, uint64_t first, uint64_t count,
            float* out) {
  switch (coding.bits()) {
    case 1:
      return DecodeGroups<1>(coding, codes, first, count, out);
    case 2:
      return DecodeGroups<2>(coding, codes, first, count, out);
    case 4:
      return DecodeGroups<4>(coding, codes, first, count, out);
    default:
      return DecodeGroups<8>(coding, codes, first, count, out);
  }
}

double LargestLevel(const Coding& coding, uint64_t count) {
  const uint64_t groups = coding.groups(count);
  double largest = 0;
  for (uint64_t group = 0; group < groups; ++group) {
    const Stats stats = StatsOf(coding, group);
    for (const float level : {coding.book->front(), coding.book->back()}) {
      largest = std::max<double>(largest, std::fabs(Level(level, stats)));
    }
  }
  return largest;
}

}  // namespace edge_lora
