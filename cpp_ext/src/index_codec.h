// Ascending indices in about one byte each; twin of edge_lora/index_codec.py, which has the format.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace edge_lora {

/// Side of a `line16` line, in outputs.
inline constexpr uint32_t kFileLine = 16;

/// Returns `count` strictly ascending indices below `limit` (at most 2^32).
/// Throws Error(kAdapterFile) unless the stream is exactly that.
std::vector<uint32_t> RiceDecode(std::span<const std::byte> stream, uint64_t count, int64_t k,
                                 uint64_t limit);

/// Returns the flat ascending indices of all entries of ascending lines of 16 outputs x 1 input.
std::vector<uint32_t> ExpandLines(std::span<const uint32_t> lines, uint64_t in_features);

}  // namespace edge_lora
