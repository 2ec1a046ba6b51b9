#include "sha256.h"

#include "check.h"

using edge_lora::Sha256;
using edge_lora::Sha256Hex;

int main() {
  // FIPS 180-4's own examples.
  CHECK(Sha256Hex("", 0) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(Sha256Hex("abc", 3) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  const std::string million(1000000, 'a');
  const std::string wanted = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0";
  CHECK(Sha256Hex(million.data(), million.size()) == wanted);
  // In pieces of every length around a block.
  for (size_t piece : {1U, 55U, 56U, 63U, 64U, 65U, 127U, 4096U}) {
    Sha256 digest;
    for (size_t at = 0; at < million.size(); at += piece) {
      digest.Update(million.data() + at, std::min(piece, million.size() - at));
    }
    CHECK(digest.Finish() == wanted);
  }
}
