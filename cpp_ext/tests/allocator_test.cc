#include "allocator.h"

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"

using namespace edge_lora;

int main() {
  CHECK(AllocatorStatus() == "not registered");
  CHECK(AllocateBlock(0, true) == nullptr);
  void* reserved = AllocateBlock(300 << 10, true);
  void* small = AllocateBlock(100, true);
  void* running = AllocateBlock(1000, false);
  CHECK(reinterpret_cast<uintptr_t>(reserved) % 4096 == 0);
  CHECK(reinterpret_cast<uintptr_t>(small) % 64 == 0);
  const auto live = LiveBlocks();
  CHECK(live.size() == 3);
  for (const LiveBlock& block : live) {
    CHECK(block.reserved == (block.bytes != 1000));
    CHECK(block.bytes == 1000 || block.bytes == 100 || block.bytes == 300 << 10);
  }
  FreeBlock(running);
  CHECK(LiveBlocks().size() == 2 && GetAllocatorStats().cached_bytes >= 1000);
  CHECK(AllocateBlock(1010, false) == running);  // of the same size class
  CHECK(GetAllocatorStats().hits == 1);
  FreeBlock(running);
  FreeBlock(reserved);
  FreeBlock(small);
  FreeBlock(nullptr);
  CHECK(LiveBlocks().empty() && GetAllocatorStats().reserved_bytes == 0);

  // Weights of all sizes side by side: none overlaps another, each keeps its bytes to the end.
  std::vector<std::pair<unsigned char*, size_t>> weights;
  for (size_t i = 0; i < 60; ++i) {
    const size_t bytes = (i % 9 + 1) * (200 << 10) + (i == 30 ? 70 << 20 : i);
    auto* weight = static_cast<unsigned char*>(AllocateBlock(bytes, true));
    std::memset(weight, static_cast<int>(i), bytes);
    weights.emplace_back(weight, bytes);
    if (i % 4 == 3) {  // frees one in the middle
      FreeBlock(weights[i - 2].first);
      weights[i - 2].first = nullptr;
    }
  }
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto [weight, bytes] = weights[i];
    if (weight == nullptr) continue;
    CHECK(std::all_of(weight, weight + bytes, [i](unsigned char b) { return b == i; }));
    FreeBlock(weight);
  }
  CHECK(LiveBlocks().empty());

  // Many threads at once; what one wrote stays until it frees.
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t] {
      for (int i = 0; i < 2000; ++i) {
        const size_t bytes = 1 + static_cast<size_t>(i * 7919 % 50000);
        void* block = AllocateBlock(bytes, i % 5 == 0);
        std::memset(block, t, bytes);
        CHECK(static_cast<char*>(block)[bytes - 1] == t);
        FreeBlock(block);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(LiveBlocks().empty());
  CHECK(GetAllocatorStats().cached_bytes <= 64 << 20);
}
