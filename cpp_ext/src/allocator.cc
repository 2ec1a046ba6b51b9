#include "allocator.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <mutex>
#include <unordered_map>

#include "huge_memory.h"

namespace edge_lora {
namespace {

constexpr size_t kCacheLine = 64;
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
  HugeMemory huge;
  AllocatorStats stats;
};

State& TheState() {
  static State& state = *new State;
  return state;
}

size_t RoundUp(size_t bytes, size_t step) { return (bytes + step - 1) / step * step; }

/// Reserved blocks are as large as asked for. Others are rounded up to a quarter of a power of two:
/// few classes, at most a quarter wasted.
size_t CapacityFor(size_t bytes, bool reserved) {
  if (reserved) return RoundUp(bytes, kCacheLine);
  return RoundUp(bytes, std::max(std::bit_floor(bytes) / 4, kCacheLine));
}

bool IsHuge(const Block& block) { return block.reserved && block.capacity >= HugeMemory::kLeast; }

void* TakeMemory(State& state, const Block& block) {
  if (IsHuge(block)) return state.huge.Take(block.capacity);
  return std::aligned_alloc(kCacheLine, block.capacity);  // NOLINT(cppcoreguidelines-owning-memory)
}

void GiveMemory(State& state, void* memory, const Block& block) {
  if (IsHuge(block)) return state.huge.Give(memory, block.capacity);
  std::free(memory);  // NOLINT(cppcoreguidelines-owning-memory)
}

/// A block of that capacity that an earlier run left, or null.
void* TakeCached(State& state, size_t capacity) {
  auto& left = state.cache[capacity];
  if (left.empty()) {
    ++state.stats.misses;
    return nullptr;
  }
  void* memory = left.back();
  left.pop_back();
  ++state.stats.hits;
  state.stats.cached_bytes -= capacity;
  return memory;
}

}  // namespace

void* AllocateBlock(size_t bytes, bool reserved) {
  if (bytes == 0 || bytes > SIZE_MAX / 2) return nullptr;
  State& state = TheState();
  const Block block{bytes, CapacityFor(bytes, reserved), reserved, true};
  const std::scoped_lock hold(state.mutex);
  void* memory = reserved ? nullptr : TakeCached(state, block.capacity);
  if (memory == nullptr) memory = TakeMemory(state, block);
  if (memory == nullptr) return nullptr;
  state.blocks[memory] = block;
  (reserved ? state.stats.reserved_bytes : state.stats.runtime_bytes) += block.capacity;
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
  GiveMemory(state, memory, block);
  state.blocks.erase(found);
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
