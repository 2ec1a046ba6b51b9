#include "index_codec.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>

#include "status.h"

namespace edge_lora {
namespace {

constexpr int64_t kMaxK = 31;

[[noreturn]] void Refuse(const std::string& reason) { throw Error(Code::kAdapterFile, reason); }

/// Up to 8 bytes from `offset`, low byte first, zero past the end.
uint64_t LoadWord(std::span<const std::byte> bytes, size_t offset) {
  uint64_t word = 0;
  if (offset < bytes.size()) {
    std::memcpy(&word, bytes.data() + offset, std::min<size_t>(8, bytes.size() - offset));
  }
  return word;
}

/// The unary half of the stream: quotients, each as zeros up to a one.
class Unary {
 public:
  explicit Unary(std::span<const std::byte> bytes) : bytes_(bytes), word_(LoadWord(bytes, 0)) {}

  /// Position of the next one bit, counted from the start; -1 at the end.
  int64_t NextOne() {
    while (word_ == 0) {
      offset_ += 8;
      if (offset_ >= bytes_.size()) return -1;
      word_ = LoadWord(bytes_, offset_);
    }
    const int64_t position = static_cast<int64_t>(offset_ * 8) + std::countr_zero(word_);
    word_ &= word_ - 1;
    return position;
  }

 private:
  std::span<const std::byte> bytes_;
  size_t offset_ = 0;
  uint64_t word_;
};

}  // namespace

std::vector<uint32_t> RiceDecode(std::span<const std::byte> stream, uint64_t count, int64_t k,
                                 uint64_t limit) {
  const std::string what = "index stream of " + std::to_string(stream.size()) + " bytes";
  if (k < 0 || k > kMaxK || count > limit || limit > uint64_t{1} << 32) {
    Refuse(what + " cannot hold " + std::to_string(count) + " indices");
  }
  const size_t low_bits = count * static_cast<uint64_t>(k);  // below 2^37
  const size_t low_bytes = (low_bits + 7) / 8;
  if (stream.size() < low_bytes) {
    Refuse(what + " cannot hold " + std::to_string(count) + " indices");
  }
  const auto low = stream.first(low_bytes);
  Unary unary(stream.subspan(low_bytes));
  const uint64_t mask = (uint64_t{1} << k) - 1;
  std::vector<uint32_t> indices(count);
  int64_t last_one = -1;
  uint64_t next = 0;  // the smallest index that may follow
  for (size_t i = 0; i < count; ++i) {
    const int64_t one = unary.NextOne();
    if (one < 0)
      Refuse(what + " holds " + std::to_string(i) + " indices, header says " +
             std::to_string(count));
    const auto quotient = static_cast<uint64_t>(one - last_one - 1);
    last_one = one;
    const size_t bit = i * static_cast<size_t>(k);
    const uint64_t remainder = LoadWord(low, bit / 8) >> (bit % 8) & mask;
    if (quotient > limit >> k || next + (quotient << k) + remainder >= limit) {
      Refuse("an index is out of range, slot has " + std::to_string(limit));
    }
    next += (quotient << k) + remainder;
    indices[i] = static_cast<uint32_t>(next++);
  }
  if (unary.NextOne() >= 0) Refuse(what + " holds more indices than " + std::to_string(count));
  const bool low_padding = low_bits % 8 != 0 && std::to_integer<int>(low.back()) >> (low_bits % 8);
  if (low_padding || static_cast<size_t>(last_one + 1 + 7) / 8 != stream.size() - low_bytes) {
    Refuse("index stream has padding bits set or trailing bytes");
  }
  return indices;
}

std::vector<uint32_t> ExpandLines(std::span<const uint32_t> lines, uint64_t in_features) {
  std::vector<uint32_t> indices(lines.size() * kFileLine);
  auto out = indices.begin();
  for (auto group = lines.begin(); group != lines.end();) {
    const uint64_t row = *group / in_features * kFileLine;
    const uint64_t end = (*group / in_features + 1) * in_features;
    const auto next = std::find_if(group, lines.end(), [end](uint32_t l) { return l >= end; });
    for (uint64_t r = row; r < row + kFileLine; ++r) {
      for (auto line = group; line != next; ++line) {
        *out++ = static_cast<uint32_t>(r * in_features + *line % in_features);
      }
    }
    group = next;
  }
  return indices;
}

}  // namespace edge_lora
