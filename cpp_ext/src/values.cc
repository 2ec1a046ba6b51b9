#include "values.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "simd.h"

namespace edge_lora {
namespace {

template <typename T>
T Load(const std::byte* data, size_t i) {
  T value;
  std::memcpy(&value, data + i * sizeof(T), sizeof(T));
  return value;
}

EL_CLONES void FromHalf(const std::byte* data, size_t count, float* out) {
  for (size_t i = 0; i < count; ++i) {
    const uint32_t half = Load<uint16_t>(data, i);
    // Moves exponent and mantissa into place and lets one exact multiplication mend the bias,
    // subnormals included. Infinity and NaN get their exponent back by hand.
    const float magnitude = std::bit_cast<float>((half & 0x7fffU) << 13) * 0x1p112F;
    const uint32_t special = (half & 0x7c00U) == 0x7c00U ? 0x7f800000U : 0U;
    out[i] =
        std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | special | (half & 0x8000U) << 16);
  }
}

EL_CLONES void FromBfloat(const std::byte* data, size_t count, float* out) {
  for (size_t i = 0; i < count; ++i) {
    out[i] = std::bit_cast<float>(static_cast<uint32_t>(Load<uint16_t>(data, i)) << 16);
  }
}

template <typename T, T kExponent>
bool AnySpecial(const std::byte* data, size_t count) {
  int special = 0;
  for (size_t i = 0; i < count; ++i) special |= (Load<T>(data, i) & kExponent) == kExponent;
  return special != 0;
}

}  // namespace

size_t SizeOf(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF16:
    case Dtype::kBF16:
      return 2;
    case Dtype::kU8:
      return 1;
    default:
      return 4;
  }
}

const char* NameOf(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
      return "F32";
    case Dtype::kF16:
      return "F16";
    case Dtype::kBF16:
      return "BF16";
    case Dtype::kU8:
      return "U8";
    default:
      return "U32";
  }
}

void ToFloat(const Values& values, size_t first, size_t count, float* out) {
  if (values.is_coded()) return Decode(values.coding, values.data, first, count, out);
  const std::byte* data = values.data + first * SizeOf(values.dtype);
  switch (values.dtype) {
    case Dtype::kF16:
      return FromHalf(data, count, out);
    case Dtype::kBF16:
      return FromBfloat(data, count, out);
    default:
      if (count != 0) std::memcpy(out, data, count * sizeof(float));
  }
}

bool AllFinite(const Values& values) {
  if (values.is_coded()) return HasSoundStats(values.coding, values.count);
  switch (values.dtype) {
    case Dtype::kF16:
      return !AnySpecial<uint16_t, 0x7c00>(values.data, values.count);
    case Dtype::kBF16:
      return !AnySpecial<uint16_t, 0x7f80>(values.data, values.count);
    default:
      return !AnySpecial<uint32_t, 0x7f800000>(values.data, values.count);
  }
}

double LargestOf(const Values& values) {
  if (values.is_coded()) return LargestLevel(values.coding, values.count);
  double largest = 0;
  std::vector<float> chunk(std::min<size_t>(values.count, 4096));
  for (size_t first = 0; first < values.count; first += chunk.size()) {
    const size_t count = std::min(chunk.size(), values.count - first);
    ToFloat(values, first, count, chunk.data());
    for (size_t i = 0; i < count; ++i) largest = std::max<double>(largest, std::fabs(chunk[i]));
  }
  return largest;
}

}  // namespace edge_lora
