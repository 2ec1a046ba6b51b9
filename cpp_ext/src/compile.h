// Adapters + base -> the parts of a patch, one slot at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "image.h"

namespace edge_lora {

/// One form of one adapter and fp32(weight * alpha * scale).
struct WeightedForm {
  const Form* form = nullptr;
  double weight = 1.0;  ///< weight * alpha, before the form's scale
  float factor = 1.0F;
};

/// What one slot of a patch came to.
struct CompiledSlot {
  uint64_t changed = 0;
  std::vector<ExchangePart> exchanges;  // one per place, or none if dense
  std::vector<Term> dense;
};

/// Compiles the forms, in order, for a slot. `is_pristine`: the blocks hold the base right now and
/// may be read in place of the file.
/// Throws Error(kUnsupported) for what cannot be composed, Error(kInvalidArgument) if a result is
/// not finite; both name no slot: the caller does.
CompiledSlot CompileSlot(const Slot& slot, uint32_t number, const std::vector<WeightedForm>& forms,
                         bool is_pristine);

}  // namespace edge_lora
