// Low-rank forms as a whole: for a run beside the weights, and cut to a smaller rank.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "adapter_file.h"

namespace edge_lora {

/// All low-rank forms of a slot side by side, for an unfused run.
struct StackedLowRank {
  uint32_t rank = 0;
  std::vector<float> a;  // (in, rank)
  std::vector<float> b;  // (rank, out), with each form's scale and the adapter's alpha in it
};

/// Returns false if the slot has other forms too. Throws Error(kAdapterMismatch) for no such slot.
bool StackLowRank(const AdapterFile& adapter, const std::string& slot, StackedLowRank& stacked);

/// Cuts every low-rank form to its first `rank` rows, with the scale that it has there.
/// Throws Error(kUnsupported), with the ranks that all of them know, if `rank` is none of these.
void CutToRank(std::vector<Delta>& deltas, uint32_t rank);

}  // namespace edge_lora
