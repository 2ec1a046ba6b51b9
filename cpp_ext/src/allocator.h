// ONNX Runtime's CPU allocator: so that packed weights are born in memory that we know.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace edge_lora {

struct LiveBlock {
  uintptr_t address = 0;
  size_t bytes = 0;
  bool reserved = false;  ///< Lives as long as its session: an initializer or a packed weight.
};

struct AllocatorStats {
  uint64_t reserved_bytes = 0;
  uint64_t runtime_bytes = 0;  ///< In use by a run.
  uint64_t cached_bytes = 0;   ///< Kept for the next run.
  uint64_t hits = 0;
  uint64_t misses = 0;
};

/// "registered", "not registered", or why the engine refused.
std::string AllocatorStatus();
/// By address.
std::vector<LiveBlock> LiveBlocks();
AllocatorStats GetAllocatorStats();

/// The memory itself, as the engine asks for it; exposed for tests.
void* AllocateBlock(size_t bytes, bool reserved);
void FreeBlock(void* block);

}  // namespace edge_lora
