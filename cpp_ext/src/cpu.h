// What the kernels may use on this CPU.
#pragma once

#include <string>

namespace edge_lora {

/// A stable name, for cache keys: "x86_64 avx2 avx512f".
std::string CpuFeatures();

}  // namespace edge_lora
