#include "huge_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>

namespace edge_lora {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kHugePage = size_t{2} << 20;
// At most one huge page of a chunk is touched in vain: 6 % if it held a single small block.
constexpr size_t kChunkBytes = size_t{32} << 20;

size_t RoundUp(size_t bytes, size_t step) { return (bytes + step - 1) / step * step; }

}  // namespace

// NOLINTBEGIN(cppcoreguidelines-owning-memory): handing out raw memory is what this is for.
void* HugeMemory::Take(size_t bytes) {
  const size_t wanted = RoundUp(bytes, kPage);
  auto chunk = chunks_.find(open_);
  if (chunk == chunks_.end() || chunk->second.bytes - chunk->second.used < wanted) {
    const size_t size = RoundUp(std::max(wanted, kChunkBytes), kHugePage);
    auto* begin = static_cast<char*>(std::aligned_alloc(kHugePage, size));
    if (begin == nullptr) return nullptr;
    // Of a block that fills the chunk alone the last huge page may be nearly empty: small pages
    // there.
    madvise(begin, wanted > kChunkBytes ? wanted / kHugePage * kHugePage : size, MADV_HUGEPAGE);
    chunk = chunks_.try_emplace(begin, Chunk{size, 0, 0}).first;
    if (wanted <= kChunkBytes) open_ = begin;
  }
  char* block = chunk->first + chunk->second.used;
  chunk->second.used += wanted;
  ++chunk->second.live;
  return block;
}

void HugeMemory::Give(void* block, size_t bytes) {
  const auto chunk = std::prev(chunks_.upper_bound(static_cast<char*>(block)));
  if (--chunk->second.live > 0) {
    madvise(block, RoundUp(bytes, kPage), MADV_DONTNEED);
    return;
  }
  if (open_ == chunk->first) open_ = nullptr;
  std::free(chunk->first);
  chunks_.erase(chunk);
}
// NOLINTEND(cppcoreguidelines-owning-memory)

}  // namespace edge_lora
