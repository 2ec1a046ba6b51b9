// Values of 1, 2, 4 or 8 bits; twin of edge_lora/codebook.py, which has the definition.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace edge_lora {

/// 2, 4, 16 or 256 levels, strictly ascending; shared by all that is coded with it.
using Book = std::shared_ptr<const std::vector<float>>;

/// What codes mean: value i is book[code i] * spread + mean, of group i / group, each operation
/// rounded.
struct Coding {
  Book book;                         // null: not coded
  uint64_t group = 1;                // consecutive values that share their statistics
  const std::byte* stats = nullptr;  // (groups, 2) fp32: mean, spread; need not be aligned

  uint32_t bits() const { return static_cast<uint32_t>(std::countr_zero(book->size())); }
  uint64_t groups(uint64_t count) const { return count / group + (count % group != 0 ? 1 : 0); }
  uint64_t stats_bytes(uint64_t count) const { return groups(count) * 2 * sizeof(float); }
  uint64_t code_bytes(uint64_t count) const { return (count * bits() + 7) / 8; }
};

/// Whether it has as many levels as some codes have values, finite and strictly ascending.
bool IsSoundBook(const std::vector<float>& levels);

/// Whether all means, spreads and what they make of the book are finite, and no spread negative.
bool HasSoundStats(const Coding& coding, uint64_t count);

/// Whether the bits behind the last code are zero.
bool HasCleanPadding(const Coding& coding, const std::byte* codes, uint64_t count);

/// Writes values [first, first + count) as fp32; codes are packed low bits first.
void Decode(const Coding& coding, const std::byte* codes, uint64_t first, uint64_t count,
            float* out);

/// A magnitude that none of `count` values exceeds; zero if all are zero whatever their codes.
double LargestLevel(const Coding& coding, uint64_t count);

}  // namespace edge_lora
