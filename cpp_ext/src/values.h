// Numbers as an adapter file stores them, and their fp32 meaning.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codebook.h"

namespace edge_lora {

enum class Dtype : uint8_t { kF32 = 0, kF16 = 1, kBF16 = 2, kU8 = 3, kU32 = 4 };

size_t SizeOf(Dtype dtype);
const char* NameOf(Dtype dtype);
inline bool IsFloat(Dtype dtype) { return dtype <= Dtype::kBF16; }

/// A run of fp32, fp16 or bf16 numbers, or of codes (kU8), in memory that someone else owns; need
/// not be aligned.
struct Values {
  Dtype dtype = Dtype::kF32;
  const std::byte* data = nullptr;
  size_t count = 0;
  Coding coding = {};

  bool is_coded() const { return coding.book != nullptr; }
  size_t data_bytes() const {
    return is_coded() ? coding.code_bytes(count) : count * SizeOf(dtype);
  }
  size_t stats_bytes() const { return is_coded() ? coding.stats_bytes(count) : 0; }
  size_t bytes() const { return data_bytes() + stats_bytes(); }
  /// The first `n` of them.
  Values First(size_t n) const { return {dtype, data, n, coding}; }
};

/// Writes values [first, first + count) as fp32, exactly. The range must lie inside.
void ToFloat(const Values& values, size_t first, size_t count, float* out);

/// Whether no value is NaN or infinite, nor any that other codes would stand for.
bool AllFinite(const Values& values);

/// A magnitude that no value exceeds; zero means that all are zero.
double LargestOf(const Values& values);

}  // namespace edge_lora
