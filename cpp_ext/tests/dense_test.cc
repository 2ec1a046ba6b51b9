#include "dense.h"

#include <random>

#include "check.h"

using namespace edge_lora;

namespace {

std::vector<float> Random(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

Values ViewOf(const std::vector<float>& values) {
  return {Dtype::kF32, reinterpret_cast<const std::byte*>(values.data()), values.size()};
}

/// The sum of terms of every kind, to the bit, whatever the tails.
void CheckSum(Shape shape, uint32_t rank) {
  const auto a = Random(rank * shape.in, 1);
  const auto bt = Random(rank * shape.out, 2);
  const auto all = Random(shape.size(), 3);
  const auto row = Random(shape.in, 4);
  const auto column = Random(shape.out, 5);
  const auto few = Random(2, 6);
  const auto last = static_cast<uint32_t>(shape.size() - 1);
  const std::vector<uint32_t> indices =
      last == 0 ? std::vector<uint32_t>{0} : std::vector<uint32_t>{0, last};
  std::vector<Term> terms;
  terms.push_back(MakeTerm(LowRank{rank, ViewOf(a), ViewOf(bt)}, 0.3F));
  terms.push_back(MakeTerm(Sparse{indices, {Dtype::kF32, ViewOf(few).data, indices.size()}}, 0.7F));
  const auto n_last = static_cast<uint32_t>(shape.out - 1);
  terms.push_back(MakeTerm(Block{true, {n_last}, ViewOf(row)}, 1.1F));
  terms.push_back(MakeTerm(Block{false, {0}, ViewOf(column)}, -0.9F));
  terms.push_back(MakeTerm(Dense{ViewOf(all)}, 0.5F));
  terms.push_back(MakeTerm(RowScale{true, ViewOf(column)}, 0.4F));
  terms.push_back(MakeTerm(RowScale{false, ViewOf(row)}, -1.2F));

  const Rect rect{0, shape.in, 0, shape.out};
  const DeltaOnRect delta(terms, shape, rect);
  const auto weight = Random(shape.size(), 7);
  double largest = 0;
  ForEachTile(rect, [&](const Rect& part) {
    Tile base = {};
    for (uint64_t k = part.k0; k < part.k1; ++k) {
      for (uint64_t n = part.n0; n < part.n1; ++n) {
        base.value[k - part.k0][n - part.n0] = weight[n * shape.in + k];
      }
    }
    const Lines lines = SpacedLines(base.value[0], kLine, part.k1 - part.k0);
    Tile total;
    delta.Sum(lines, part, total);
    for (uint64_t k = part.k0; k < part.k1; ++k) {
      for (uint64_t n = part.n0; n < part.n1; ++n) {
        float product = 0;
        for (uint32_t r = 0; r < rank; ++r) product += bt[r * shape.out + n] * a[r * shape.in + k];
        float wanted = 0;
        wanted += product * 0.3F;
        const uint64_t flat = n * shape.in + k;
        for (size_t i = 0; i < indices.size(); ++i) {
          if (indices[i] == flat) wanted += few[i] * 0.7F;
        }
        if (n == n_last) wanted += row[k] * 1.1F;
        if (k == 0) wanted += column[n] * -0.9F;
        wanted += all[flat] * 0.5F;
        wanted += weight[flat] * (column[n] * 0.4F);
        wanted += weight[flat] * (row[k] * -1.2F);
        CHECK(total.value[k - part.k0][n - part.n0] == wanted);
        largest = std::max<double>(largest, std::abs(wanted));
      }
    }
  });
  CHECK(largest <= BoundOf(terms, LargestOf(ViewOf(weight))));
}

}  // namespace

int main() {
  for (const uint64_t out : {1U, 15U, 16U, 17U, 32U}) {
    for (const uint64_t in : {1U, 3U, 63U, 64U, 65U, 128U}) {
      for (const uint32_t rank : {1U, 8U}) CheckSum({out, in}, rank);
    }
  }
  Tile total = {};
  Tile tile = {};
  CHECK(AddTile(total, kTileInputs, tile));
  total.value[kTileInputs - 1][kLine - 1] = 3e38F;
  tile.value[kTileInputs - 1][kLine - 1] = 3e38F;
  CHECK(!AddTile(total, kTileInputs, tile));
}
