// Memory for packed weights: many blocks side by side on huge pages.
#pragma once

#include <cstddef>
#include <map>

namespace edge_lora {

/// Carves blocks out of large chunks. A huge page of its own for every block would waste a third of
/// a small language model's weights; 4 KiB pages would make decoding 5 % slower.
/// Not safe from many threads: its user holds a lock.
class HugeMemory {
 public:
  /// Blocks from here on are worth it.
  static constexpr size_t kLeast = size_t{256} << 10;

  /// Aligned to a page; null if there is no memory.
  void* Take(size_t bytes);
  /// Takes back what Take gave. The pages of a block are returned to the system at once, a chunk
  /// when its last block goes.
  void Give(void* block, size_t bytes);

 private:
  struct Chunk {
    size_t bytes = 0;
    size_t used = 0;
    size_t live = 0;  // blocks
  };

  std::map<char*, Chunk> chunks_;  // by address
  char* open_ = nullptr;           // the chunk that new blocks come from
};

}  // namespace edge_lora
