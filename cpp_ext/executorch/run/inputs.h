// Something to run a program on: its canary, or numbers of the right shape.
#pragma once

#include <cstdint>
#include <vector>

#include "bundle.h"
#include "program.h"

namespace edge_lora {

/// One input and the memory that it lies in.
struct MadeInput {
  std::vector<int32_t> sizes;
  std::vector<uint8_t> values;
  ScalarType type = ScalarType::Undefined;
};

/// What a causal language model is fed: so many tokens, from a position on.
struct Window {
  uint64_t tokens = 1;
  uint64_t start = 0;
};

/// Every input of the method, by position. Inputs of slots get adapters of rank 1 without effect.
/// Throws Error(kBundle) if manifest and program disagree.
std::vector<MadeInput> MakeInputs(const Bundle& bundle, const Program& program,
                                  const Window& window);

std::vector<InputTensor> Views(const std::vector<MadeInput>& inputs);

}  // namespace edge_lora
