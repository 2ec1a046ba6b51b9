// Base + delta of a whole slot, tile by tile, straight into the packed layout.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "lines.h"
#include "patch.h"
#include "tile.h"

namespace edge_lora {

/// factor * (b @ a) on one tile.
struct Product {
  const float* a = nullptr;  // (rank, pitch)
  const float* b = nullptr;  // (rank, kLine)
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

  /// Writes the sum on one tile of the rectangle. Terms add up in order, starting from zero.
  void Sum(const Rect& part, Tile& total) const;

 private:
  struct Factors {
    uint32_t rank = 0;
    std::vector<float> a;  // (rank, inputs of the rectangle)
    std::vector<float> b;  // (lines of the rectangle, rank, kLine)
  };

  Product ProductOn(size_t term, const Rect& part) const;

  std::span<const Term> terms_;
  Shape shape_;
  Rect rect_;
  std::vector<Factors> factors_;  // (terms); empty where the term is not low-rank
  bool is_low_rank_;              // all terms are
};

/// tile += total. Returns whether all sums are finite.
bool AddTile(const Tile& total, uint64_t inputs, Tile& tile);

/// A number that no value of the sum, nor any number met on the way, exceeds in magnitude.
double BoundOf(std::span<const Term> terms);

/// Whether every number that the terms sum up is zero (true means zero, false means nothing).
bool IsZero(std::span<const Term> terms);

}  // namespace edge_lora
