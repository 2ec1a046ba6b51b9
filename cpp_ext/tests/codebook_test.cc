#include "codebook.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "check.h"
#include "values.h"

using namespace edge_lora;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// Values in codes, and what they are, one code at a time.
struct Sample {
  std::vector<float> levels;
  std::vector<float> stats;
  std::vector<uint8_t> codes;
  std::vector<float> wanted;

  Sample(uint32_t bits, uint64_t group, uint64_t count) {
    std::mt19937 random(bits);
    std::normal_distribution<float> normal;
    for (uint32_t i = 0; i < 1U << bits; ++i) levels.push_back(normal(random));
    std::ranges::sort(levels);
    codes.resize((count * bits + 7) / 8);
    for (uint64_t i = 0; i < count; ++i) {
      if (i % group == 0) {
        stats.push_back(normal(random));
        stats.push_back(std::fabs(normal(random)));
      }
      const auto code = static_cast<uint32_t>(random()) % (1U << bits);
      for (uint32_t bit = 0; bit < bits; ++bit) {
        const uint64_t at = i * bits + bit;
        codes[at / 8] = static_cast<uint8_t>(codes[at / 8] | (code >> bit & 1) << at % 8);
      }
      const float product = levels[code] * stats[stats.size() - 1];
      wanted.push_back(product + stats[stats.size() - 2]);
    }
  }

  Values View(uint64_t group) const {
    const Coding coding{std::make_shared<const std::vector<float>>(levels), group,
                        reinterpret_cast<const std::byte*>(stats.data())};
    return {Dtype::kU8, reinterpret_cast<const std::byte*>(codes.data()), wanted.size(), coding};
  }
};

/// Any range of any coding, whether or not it begins at a byte or a group.
void CheckRanges(uint32_t bits, uint64_t group) {
  constexpr uint64_t kCount = 333;
  const Sample sample(bits, group, kCount);
  const Values values = sample.View(group);
  CHECK(values.data_bytes() == sample.codes.size());
  CHECK(values.stats_bytes() == sample.stats.size() * sizeof(float));
  CHECK(AllFinite(values) && HasCleanPadding(values.coding, values.data, kCount));
  const auto largest = std::ranges::max(sample.wanted, {}, [](float v) { return std::fabs(v); });
  CHECK(LargestOf(values) >= std::fabs(largest));
  for (uint64_t first = 0; first <= kCount; ++first) {
    for (uint64_t count :
         {uint64_t{0}, uint64_t{1}, uint64_t{2}, uint64_t{9}, uint64_t{70}, kCount}) {
      count = std::min(count, kCount - first);
      std::vector<float> out(count + 1, kNan);
      ToFloat(values, first, count, out.data());
      for (uint64_t i = 0; i < count; ++i) CHECK(out[i] == sample.wanted[first + i]);
      CHECK(std::isnan(out[count]));
    }
  }
  const Values part = values.First(kCount / 2);
  CHECK(part.bytes() < values.bytes() && AllFinite(part));
}

}  // namespace

int main() {
  for (const uint32_t bits : {1U, 2U, 4U, 8U}) {
    for (const uint64_t group : {1U, 3U, 16U, 100U, 333U, 1000U}) CheckRanges(bits, group);
  }
  CHECK(IsSoundBook({-1, 1}) && IsSoundBook({-1, 0, 1, 2}));
  for (const std::vector<float>& bad : std::vector<std::vector<float>>{
           {}, {1}, {0, 1, 2}, {1, 1}, {1, -1}, {0, kInfinity}, {kNan, 1}, {-0.0F, 0.0F}}) {
    CHECK(!IsSoundBook(bad));
  }
  const Book book = std::make_shared<const std::vector<float>>(std::vector<float>{-1, 2});
  for (const auto& [mean, spread, is_sound] :
       std::vector<std::tuple<float, float, bool>>{{0, 1, true},
                                                   {0, 0, true},
                                                   {0, -0.0F, true},
                                                   {0, -1, false},
                                                   {kNan, 1, false},
                                                   {0, kNan, false},
                                                   {kInfinity, 1, false},
                                                   {0, kInfinity, false},
                                                   {0, 3e38F, false},
                                                   {-3e38F, 1e38F, false},
                                                   {-3e38F, 1e37F, true}}) {
    const float stats[] = {0, 1, mean, spread};
    const Coding coding{book, 4, reinterpret_cast<const std::byte*>(stats)};
    CHECK(HasSoundStats(coding, 5) == is_sound);
    CHECK(HasSoundStats(coding, 4));  // one group: the second pair is not looked at
  }
  const std::byte codes[] = {std::byte{0xff}, std::byte{0x08}};
  const Coding coding{book, 100, nullptr};
  CHECK(HasCleanPadding(coding, codes, 12) && HasCleanPadding(coding, codes, 8));
  CHECK(!HasCleanPadding(coding, codes, 11) && !HasCleanPadding(coding, codes, 7));
  CHECK(HasCleanPadding(coding, codes, 0) && HasCleanPadding(coding, codes, 16));
}
