// Writing patches into blocks.
#pragma once

#include <cstdint>
#include <vector>

#include "image.h"

namespace edge_lora {

/// All exchange parts of a patch, cut into pieces of work.
struct ExchangePlan {
  struct Chunk {
    ExchangePart* part;
    size_t begin;
    size_t end;
  };
  std::vector<Chunk> chunks;
  uint64_t bytes = 0;  ///< Of weights that it writes.
};

/// `patch` may be null: then there is nothing to exchange.
ExchangePlan PlanExchange(Patch* patch);

/// Swaps all parts with the blocks; twice is the identity. Takes no memory, so it cannot fail.
void ExchangeAll(const ExchangePlan& plan, const std::vector<Slot>& slots, int threads);

/// What to write over all values of a slot.
struct DenseJob {
  const Slot* slot = nullptr;
  const DensePart* part = nullptr;  ///< Null: the pristine weight.
  bool in_place = false;            ///< The blocks hold the base: add to it where it lies.
};

/// Jobs, cut into pieces of work.
struct DensePlan {
  struct Piece {
    DenseJob job;
    Rect rect;
  };
  std::vector<Piece> pieces;
  uint64_t bytes = 0;  ///< Of weights that it writes.
};

DensePlan PlanDense(const std::vector<DenseJob>& jobs);

/// Writes pristine + delta. On an error some slots are written and some are not.
void WriteDense(const DensePlan& plan, int threads);

}  // namespace edge_lora
