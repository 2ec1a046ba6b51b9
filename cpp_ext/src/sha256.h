// SHA-256 (FIPS 180-4), with the CPU's own instructions where it has them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace edge_lora {

class Sha256 {
 public:
  void Update(const void* data, size_t bytes);
  /// The digest in hex; the object is spent afterwards.
  std::string Finish();

 private:
  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> pending_ = {};
  uint64_t total_ = 0;
};

std::string Sha256Hex(const void* data, size_t bytes);

}  // namespace edge_lora
