#include "dense.h"

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace edge_lora {
namespace {

/// total[j] += (sum over r of b[r] * a[r][k + j]) * factor, r ascending, every operation rounded.
///
/// Four inputs at a time: with 16 outputs each that is 8 AVX2 accumulators, which hide the latency
/// of the additions and leave registers for b and a.
template <size_t kStep>
[[gnu::always_inline]] inline void AddProduct(const Product& product, size_t k,
                                              Line (&total)[kStep]) {
  Line sum[kStep] = {};
  for (uint32_t r = 0; r < product.rank; ++r) {
    Line b;
    Load(product.b + r * kLine, b);
    const float* a = product.a + r * product.pitch + k;
    for (size_t j = 0; j < kStep; ++j) sum[j] += b * a[j];
  }
  for (size_t j = 0; j < kStep; ++j) total[j] += sum[j] * product.factor;
}

/// total[j] += weight[j] * scale, by outputs or by inputs.
template <size_t kStep>
[[gnu::always_inline]] inline void AddScaled(const Product& product, const Lines& weight, size_t k,
                                             Line (&total)[kStep]) {
  for (size_t j = 0; j < kStep; ++j) {
    Line line;
    Load(weight.base + weight.offset[k + j], line);
    if (product.b != nullptr) {
      Line scale;
      Load(product.b, scale);
      total[j] += line * scale;
    } else {
      total[j] += line * product.a[k + j];
    }
  }
}

template <bool kScales, size_t kStep>
[[gnu::always_inline]] inline void AddProductsAt(size_t k, const Product* products, size_t count,
                                                 const Lines& weight, const Lines& from,
                                                 const Lines& to) {
  Line total[kStep] = {};
  for (size_t t = 0; t < count; ++t) {
    if (kScales && products[t].rank == 0) {
      AddScaled(products[t], weight, k, total);
    } else {
      AddProduct(products[t], k, total);
    }
  }
  for (size_t j = 0; j < kStep; ++j) {
    Line line;
    Load(from.base + from.offset[k + j], line);
    Store(line + total[j], to.base + to.offset[k + j]);
  }
}

template <bool kScales>
[[gnu::always_inline]] inline void AddAllProducts(const Product* products, size_t count,
                                                  size_t inputs, const Lines& weight,
                                                  const Lines& from, const Lines& to) {
  constexpr size_t kStep = 4;
  size_t k = 0;
  for (; k + kStep <= inputs; k += kStep) {
    AddProductsAt<kScales, kStep>(k, products, count, weight, from, to);
  }
  for (; k < inputs; ++k) AddProductsAt<kScales, 1>(k, products, count, weight, from, to);
}

/// to = from + sum of the products, held in registers from end to end.
EL_CLONES void AddProducts(const Product* products, size_t count, size_t inputs,
                           const Lines& weight, const Lines& from, const Lines& to) {
  AddAllProducts<true>(products, count, inputs, weight, from, to);
}

/// The same where none is a row scale, which is a few percent faster.
EL_CLONES void AddLowRanks(const Product* products, size_t count, size_t inputs, const Lines& from,
                           const Lines& to) {
  AddAllProducts<false>(products, count, inputs, from, from, to);
}

EL_CLONES bool AddLines(const float* total, uint64_t inputs, float* tile) {
  constexpr int kExponent = 0x7f800000;
  LineBits special = {};
  for (uint64_t k = 0; k < inputs; ++k) {
    Line sum;
    Line delta;
    Load(tile + k * kLine, sum);
    Load(total + k * kLine, delta);
    sum += delta;
    Store(sum, tile + k * kLine);
    LineBits bits;
    std::memcpy(&bits, &sum, sizeof bits);
    special |= (bits & kExponent) == kExponent;
  }
  int any = 0;
  for (int j = 0; j < kLine; ++j) any |= special[j];
  return any == 0;
}

/// Adds values[first …] * factor to output n of a tile, inputs [k0, k1).
void AddRun(const Values& values, size_t first, float factor, uint64_t k0, uint64_t k1,
            const Rect& part, uint64_t n, Tile& total) {
  float run[kTileInputs];
  ToFloat(values, first, k1 - k0, run);
  for (uint64_t k = k0; k < k1; ++k) total.value[k - part.k0][n - part.n0] += run[k - k0] * factor;
}

void AddSparse(const Sparse& sparse, float factor, Shape shape, const Rect& part, Tile& total) {
  for (uint64_t n = part.n0; n < part.n1; ++n) {
    const uint64_t row = n * shape.in;
    auto index = std::ranges::lower_bound(sparse.indices, row + part.k0);
    for (; index != sparse.indices.end() && *index < row + part.k1; ++index) {
      const uint64_t k = *index - row;
      const auto at = static_cast<size_t>(index - sparse.indices.begin());
      AddRun(sparse.values, at, factor, k, k + 1, part, n, total);
    }
  }
}

void AddBlock(const Block& block, float factor, Shape shape, const Rect& part, Tile& total) {
  const auto position = [&block](uint64_t index) {
    const auto found = std::ranges::lower_bound(block.indices, index);
    const bool has = found != block.indices.end() && *found == index;
    return has ? found - block.indices.begin() : std::ptrdiff_t{-1};
  };
  for (uint64_t n = part.n0; block.rows && n < part.n1; ++n) {
    const auto at = position(n);
    if (at < 0) continue;
    const size_t first = static_cast<size_t>(at) * shape.in + part.k0;
    AddRun(block.values, first, factor, part.k0, part.k1, part, n, total);
  }
  for (uint64_t k = part.k0; !block.rows && k < part.k1; ++k) {
    const auto at = position(k);
    if (at < 0) continue;
    const size_t first = static_cast<size_t>(at) * shape.out;
    for (uint64_t n = part.n0; n < part.n1; ++n) {
      AddRun(block.values, first + n, factor, k, k + 1, part, n, total);
    }
  }
}

void AddDense(const Dense& dense, float factor, Shape shape, const Rect& part, Tile& total) {
  for (uint64_t n = part.n0; n < part.n1; ++n) {
    AddRun(dense.values, n * shape.in + part.k0, factor, part.k0, part.k1, part, n, total);
  }
}

/// A number that no value of a delta, before its factor, exceeds in magnitude, where the weight
/// does not exceed `largest`.
double LargestDelta(const Fields& fields, double largest) {
  if (const auto* low_rank = std::get_if<LowRank>(&fields)) {
    return low_rank->rank * LargestOf(low_rank->a) * LargestOf(low_rank->bt);
  }
  double bound = 0;
  ForEachValues(fields, [&](const Values& values) { bound = LargestOf(values); });
  return std::holds_alternative<RowScale>(fields) ? bound * largest : bound;
}

}  // namespace

DeltaOnRect::DeltaOnRect(std::span<const Term> terms, Shape shape, const Rect& rect)
    : terms_(terms), shape_(shape), rect_(rect), factors_(terms.size()) {
  for (size_t t = 0; t < terms.size(); ++t) {
    if (const auto* low_rank = std::get_if<LowRank>(&terms[t].fields)) {
      Take(*low_rank, factors_[t]);
    } else if (const auto* row_scale = std::get_if<RowScale>(&terms[t].fields)) {
      Take(*row_scale, terms[t].factor, factors_[t]);
    } else {
      are_products_ = false;
    }
  }
}

void DeltaOnRect::Take(const LowRank& form, Factors& factors) const {
  const uint64_t inputs = rect_.k1 - rect_.k0;
  const uint64_t outputs = rect_.n1 - rect_.n0;
  const uint64_t lines = (outputs + kLine - 1) / kLine;
  std::vector<float> row(lines * kLine);  // zero past the last output
  factors.rank = form.rank;
  factors.a.resize(form.rank * inputs);
  factors.b.resize(lines * form.rank * kLine);
  for (uint32_t r = 0; r < form.rank; ++r) {
    ToFloat(form.a, r * shape_.in + rect_.k0, inputs, factors.a.data() + r * inputs);
    ToFloat(form.bt, r * shape_.out + rect_.n0, outputs, row.data());
    for (uint64_t i = 0; i < lines; ++i) {
      std::copy_n(&row[i * kLine], kLine, &factors.b[(i * form.rank + r) * kLine]);
    }
  }
}

void DeltaOnRect::Take(const RowScale& form, float factor, Factors& factors) const {
  const uint64_t first = form.rows ? rect_.n0 : rect_.k0;
  const uint64_t count = (form.rows ? rect_.n1 : rect_.k1) - first;
  std::vector<float>& scale = form.rows ? factors.b : factors.a;
  scale.resize((count + kLine - 1) / kLine * kLine);  // zero past the last output
  ToFloat(form.values, first, count, scale.data());
  for (float& value : scale) value *= factor;
}

Product DeltaOnRect::ProductOn(size_t term, const Rect& part) const {
  const Factors& factors = factors_[term];
  const uint64_t k = part.k0 - rect_.k0;
  const uint64_t n = part.n0 - rect_.n0;
  if (factors.rank == 0 && factors.b.empty()) return {factors.a.data() + k, nullptr, 0, 0, 1.0F};
  if (factors.rank == 0) return {nullptr, factors.b.data() + n, 0, 0, 1.0F};
  return {factors.a.data() + k, factors.b.data() + n * factors.rank, rect_.k1 - rect_.k0,
          factors.rank, terms_[term].factor};
}

void DeltaOnRect::AddTo(const Lines& base, const Rect& part, const Lines& to) const {
  const uint64_t inputs = part.k1 - part.k0;
  if (are_products_) {
    thread_local std::vector<Product> products;
    products.clear();
    for (size_t t = 0; t < terms_.size(); ++t) products.push_back(ProductOn(t, part));
    const auto is_low_rank = [](const Product& product) { return product.rank != 0; };
    if (std::ranges::all_of(products, is_low_rank)) {
      AddLowRanks(products.data(), products.size(), inputs, base, to);
    } else {
      AddProducts(products.data(), products.size(), inputs, base, base, to);
    }
    return;
  }
  Tile total;
  Sum(base, part, total);
  Tile tile;
  const Lines lines = SpacedLines(tile.value[0], kLine, inputs);
  CopyLines(base, lines, inputs);
  AddTile(total, inputs, tile);
  CopyLines(lines, to, inputs);
}

void DeltaOnRect::Sum(const Lines& base, const Rect& part, Tile& total) const {
  const uint64_t inputs = part.k1 - part.k0;
  std::fill_n(total.value[0], inputs * kLine, 0.0F);
  for (size_t t = 0; t < terms_.size(); ++t) {
    const Term& term = terms_[t];
    if (IsProduct(t)) {
      const Product product = ProductOn(t, part);
      const Lines lines = SpacedLines(total.value[0], kLine, inputs);
      AddProducts(&product, 1, inputs, base, lines, lines);
    } else if (const auto* sparse = std::get_if<Sparse>(&term.fields)) {
      AddSparse(*sparse, term.factor, shape_, part, total);
    } else if (const auto* block = std::get_if<Block>(&term.fields)) {
      AddBlock(*block, term.factor, shape_, part, total);
    } else {
      AddDense(std::get<Dense>(term.fields), term.factor, shape_, part, total);
    }
  }
}

bool AddTile(const Tile& total, uint64_t inputs, Tile& tile) {
  return AddLines(total.value[0], inputs, tile.value[0]);
}

double BoundOf(std::span<const Term> terms, double largest) {
  double bound = 0;
  for (const Term& term : terms) {
    bound += LargestDelta(term.fields, std::max(1.0, largest)) *
             std::max(1.0, std::fabs(static_cast<double>(term.factor)));
  }
  return bound;
}

bool IsZero(std::span<const Term> terms) {
  return std::ranges::all_of(terms, [](const Term& term) {
    return term.factor == 0 || LargestDelta(term.fields, 1) == 0;
  });
}

}  // namespace edge_lora
