// The container of an adapter file, as a stranger may have made it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "values.h"

namespace edge_lora {

struct Tensor {
  Dtype dtype = Dtype::kF32;
  std::vector<uint64_t> shape;
  const std::byte* data = nullptr;
  size_t count = 0;

  size_t bytes() const { return count * SizeOf(dtype); }
  Values values() const { return {dtype, data, count}; }
};

/// One whole safetensors file in memory, validated on the way in.
///
/// The file is read, not mapped: what was checked cannot change or vanish afterwards.
struct Safetensors {
  std::vector<std::byte> blob;
  size_t data_begin = 0;  ///< Where the data section starts in `blob`.
  std::map<std::string, std::string> metadata;
  std::map<std::string, Tensor> tensors;  ///< Point into `blob`.
};

/// Reads a plain file of 10 bytes to 4 GiB.
/// Throws Error(kAdapterFile) unless every byte is accounted for by exactly one tensor.
Safetensors ReadSafetensors(const std::string& path);

}  // namespace edge_lora
