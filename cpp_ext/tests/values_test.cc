#include "values.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"

using namespace edge_lora;

namespace {

/// IEEE 754 binary16 by the book.
float HalfByTheBook(uint16_t half) {
  const int exponent = half >> 10 & 31;
  const int mantissa = half & 1023;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return static_cast<float>(half & 0x8000 ? -magnitude : magnitude);
}

}  // namespace

int main() {
  std::vector<uint16_t> all(65536);
  for (uint32_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  std::vector<float> out(all.size());
  const Values halves{Dtype::kF16, reinterpret_cast<const std::byte*>(all.data()), all.size()};
  ToFloat(halves, 0, all.size(), out.data());
  for (const uint16_t half : all) {
    const bool special = (half & 0x7c00) == 0x7c00;
    CHECK(special != std::isfinite(out[half]));
    if (!special) {
      CHECK(std::bit_cast<uint32_t>(out[half]) == std::bit_cast<uint32_t>(HalfByTheBook(half)));
    }
    const Values one{Dtype::kF16, halves.data + 2 * half, 1};
    CHECK(AllFinite(one) != special);
  }
  const Values bfloats{Dtype::kBF16, halves.data, all.size()};
  ToFloat(bfloats, 3, 100, out.data());
  for (uint32_t i = 0; i < 100; ++i) CHECK(std::bit_cast<uint32_t>(out[i]) == (i + 3) << 16);
  CHECK(!AllFinite(bfloats));
  // Values need not be aligned.
  std::vector<std::byte> bytes(9);
  const float pi = 3.14159F;
  std::memcpy(bytes.data() + 1, &pi, 4);
  ToFloat({Dtype::kF32, bytes.data() + 1, 2}, 0, 1, out.data());
  CHECK(out[0] == pi);
}
