#include <numeric>

#include "check.h"
#include "patch.h"

using namespace edge_lora;

namespace {

/// Exchanging is right, and twice is the identity, for runs of `run` with gaps of one.
void CheckExchange(size_t runs, uint32_t run) {
  std::vector<float> block(runs * (run + 1) + 1);
  std::iota(block.begin(), block.end(), 1.0F);
  const std::vector<float> base = block;
  std::vector<uint32_t> offsets;
  std::vector<float> values;
  for (size_t i = 0; i < runs; ++i) {
    for (uint32_t j = 0; j < run; ++j) {
      offsets.push_back(static_cast<uint32_t>(i * (run + 1) + j + 1));
      values.push_back(-static_cast<float>(values.size()) - 1);
    }
  }
  ExchangePart part = MakeExchange(0, 0, offsets, values);
  CHECK(runs == 0 || part.run == (run == 16 ? 16 : run == 8 ? 8 : 1));
  Exchange(part, 0, part.offsets.size(), block.data());
  for (size_t i = 0; i < offsets.size(); ++i) {
    CHECK(block[offsets[i]] == values[i]);
    CHECK(part.values[i] == base[offsets[i]]);
  }
  CHECK(block[0] == base[0]);
  // In two pieces, as threads do it.
  const size_t middle = part.offsets.size() / 2;
  Exchange(part, middle, part.offsets.size(), block.data());
  Exchange(part, 0, middle, block.data());
  CHECK(block == base);
  CHECK(part.values == values);
}

}  // namespace

int main() {
  for (const uint32_t run : {1U, 2U, 8U, 15U, 16U, 17U}) {
    for (const size_t runs : {0U, 1U, 2U, 33U}) CheckExchange(runs, run);
  }
}
