// Base + delta of a whole slot, tile by tile, straight into the packed layout.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "lines.h"
#include "patch.h"
#include "tile.h"

namespace edge_lora {

/// What a low-rank or a row-scale term adds on one tile: factor * (b @ a), or, of rank 0, the base
/// times b by outputs, times a by inputs if there is no b.
struct Product {
  const float* a = nullptr;  // (rank, pitch), or (inputs)
  const float* b = nullptr;  // (rank, kLine), or (kLine)
  size_t pitch = 0;
  uint32_t rank = 0;
  float factor = 1.0F;
};

/// The sum of a slot's terms on one rectangle. Factors are converted to fp32 once, here.
class DeltaOnRect {
 public:
  DeltaOnRect(std::span<const Term> terms, Shape shape, const Rect& rect);

  /// Writes base + sum on one tile of the rectangle; `base` and `to` may be the same.
  void AddTo(const Lines& base, const Rect& part, const Lines& to) const;

  /// Writes the sum on one tile of the rectangle, where the weight is `base`. Terms add up in
  /// order, starting from zero.
  void Sum(const Lines& base, const Rect& part, Tile& total) const;

 private:
  /// Of a low-rank term; of a row scale, times its factor, in `b` by outputs or in `a` by inputs.
  struct Factors {
    uint32_t rank = 0;
    std::vector<float> a;  // (rank, inputs of the rectangle)
    std::vector<float> b;  // (lines of the rectangle, rank, kLine)
  };

  void Take(const LowRank& form, Factors& factors) const;
  void Take(const RowScale& form, float factor, Factors& factors) const;
  bool IsProduct(size_t term) const {
    return !factors_[term].a.empty() || !factors_[term].b.empty();
  }
  Product ProductOn(size_t term, const Rect& part) const;

  std::span<const Term> terms_;
  Shape shape_;
  Rect rect_;
  std::vector<Factors> factors_;  // (terms); empty where the term is no product
  bool are_products_ = true;      // all terms are
};

/// tile += total. Returns whether all sums are finite.
bool AddTile(const Tile& total, uint64_t inputs, Tile& tile);

/// A number that no value of the sum, nor any number met on the way, exceeds in magnitude, where
/// the weight does not exceed `largest`.
double BoundOf(std::span<const Term> terms, double largest);

/// Whether every number that the terms sum up is zero (true means zero, false means nothing).
bool IsZero(std::span<const Term> terms);

}  // namespace edge_lora
