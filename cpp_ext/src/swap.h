// Writing patches into blocks.
#pragma once

#include <cstdint>
#include <vector>

#include "image.h"

namespace edge_lora {

/// Swaps all exchange parts of a patch with the blocks. Cannot fail half way.
/// Returns the bytes written.
uint64_t ExchangeAll(Patch& patch, const std::vector<Slot>& slots, int threads);

/// What to write over all values of a slot.
struct DenseJob {
  const Slot* slot = nullptr;
  const DensePart* part = nullptr;  ///< Null: the pristine weight.
  bool in_place = false;            ///< The blocks hold the base: add to it where it lies.
};

/// Writes pristine + delta. On an error some slots are written and some are not.
/// Returns the bytes written.
uint64_t WriteDense(const std::vector<DenseJob>& jobs, int threads);

}  // namespace edge_lora
