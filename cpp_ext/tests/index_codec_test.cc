#include "index_codec.h"

#include <random>
#include <set>

#include "check.h"
#include "status.h"

using namespace edge_lora;

namespace {

/// The format's definition, bit by bit.
std::vector<std::byte> Encode(const std::vector<uint32_t>& indices, int k) {
  std::vector<bool> low;
  std::vector<bool> unary;
  uint64_t next = 0;
  for (const uint32_t index : indices) {
    const uint64_t gap = index - next;
    for (int b = 0; b < k; ++b) low.push_back(gap >> b & 1);
    for (uint64_t q = gap >> k; q > 0; --q) unary.push_back(false);
    unary.push_back(true);
    next = uint64_t{index} + 1;
  }
  std::vector<std::byte> bytes;
  for (const auto& bits : {low, unary}) {
    const size_t first = bytes.size();
    bytes.resize(first + (bits.size() + 7) / 8);
    for (size_t i = 0; i < bits.size(); ++i) {
      if (bits[i]) bytes[first + i / 8] |= std::byte{1} << (i % 8);
    }
  }
  return bytes;
}

std::string Refusal(const std::vector<std::byte>& stream, uint64_t count, int64_t k,
                    uint64_t limit) {
  return MessageOf([&] { RiceDecode(stream, count, k, limit); });
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (const uint64_t limit : {1U, 2U, 17U, 1000U, 9999U}) {
    for (int k = 0; k <= 31; k += k < 10 ? 1 : 7) {
      for (const size_t wanted : {size_t{0}, size_t{1}, size_t{limit / 3}, size_t{limit}}) {
        std::set<uint32_t> chosen;
        while (chosen.size() < std::min<size_t>(wanted, limit)) {
          chosen.insert(static_cast<uint32_t>(random() % limit));
        }
        const std::vector<uint32_t> indices(chosen.begin(), chosen.end());
        auto stream = Encode(indices, k);
        CHECK(RiceDecode(stream, indices.size(), k, limit) == indices);
        if (indices.empty()) continue;
        CHECK(!Refusal(stream, indices.size() + 1, k, limit + 1).empty());
        CHECK(!Refusal(stream, indices.size() - 1, k, limit).empty());
        CHECK(!Refusal(stream, indices.size(), k, indices.back()).empty());
        stream.push_back(std::byte{0});
        CHECK(!Refusal(stream, indices.size(), k, limit).empty());
      }
    }
  }
  CHECK(!Refusal({}, 1, 0, 10).empty());
  CHECK(!Refusal({}, uint64_t{1} << 63, 0, 10).empty());
  CHECK(!Refusal({}, 0, -1, 10).empty());
  CHECK(!Refusal({}, 0, 32, 10).empty());
  CHECK(!Refusal({}, 0, 0, (uint64_t{1} << 32) + 1).empty());

  // Lines 1 and 4 of a (32, 3) slot: columns 1 of both groups of 16 outputs.
  const std::vector<uint32_t> lines = {1, 4};
  const auto flat = ExpandLines(lines, 3);
  CHECK(flat.size() == 32);
  for (uint32_t n = 0; n < 32; ++n) CHECK(flat[n] == n * 3 + 1);
}
