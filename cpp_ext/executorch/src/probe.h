// Where XNNPACK puts each value of a weight when it packs it on this CPU.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "layout.h"
#include "program.h"

namespace edge_lora {

/// A weight whose layout is wanted: raw fp32 values of shape (out, in) at `offset` in the program,
/// packed under `key`, the name of its entry.
struct ProbeSlot {
  std::string key;
  uint64_t offset = 0;
  Shape shape;
};

struct ProbedProgram {
  std::unique_ptr<Program> program;
  std::vector<std::shared_ptr<const Layout>> layouts;  ///< One per slot asked for.
};

/// Loads a program and learns on the way how its weights are packed.
///
/// While it is loaded the wanted weights hold values that name their own positions (see
/// Layout::ProbeValues); afterwards the real ones are written to where these were found. So the
/// probe costs no second load, and what the program then computes with is what it would have
/// packed itself. `pte` is written to and is as before when this returns or throws.
///
/// Throws Error(kUnsupported) if a weight was not packed or not as a permutation: open the program
/// anew, with another file. Throws Error(kInvalidArgument) if a slot does not lie in the program
/// or the file holds packed weights already.
ProbedProgram OpenProbed(std::span<uint8_t> pte, const std::shared_ptr<const PackedFile>& packed,
                         int threads, const std::vector<ProbeSlot>& slots);

}  // namespace edge_lora
