// A plain driver for a libFuzzer target: mutates the files of a corpus for some seconds.
//
// Tensor bytes are guarded by a hash, so most random changes stop there: half of the mutants get
// their hash mended, for the code behind it.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "sha256.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Random = std::mt19937_64;

const std::vector<std::string> kTokens = {
    "0",    "-1",     "1e9",      "4294967296", "18446744073709551615",
    "1.5",  "null",   "true",     "[]",         "{}",
    "\"\"", "F16",    "BF16",     "F32",        "U8",
    "U32",  "I64",    "rice",     "line16",     "set",
    "row",  "col",    "dense",    "block",      "row_scale",
    "enc",  "tensor", "parallel", "low_rank",   "bottleneck"};

void Mutate(std::string& bytes, Random& random) {
  for (uint64_t steps = 1 + random() % 4; steps > 0 && !bytes.empty(); --steps) {
    const size_t at = random() % bytes.size();
    switch (random() % 5) {
      case 0:
        bytes[at] = static_cast<char>(random());
        break;
      case 1:
        bytes.erase(at, 1 + random() % 8);
        break;
      case 2:
        bytes.insert(at, kTokens[random() % kTokens.size()]);
        break;
      case 3: {  // replaces a number or a word of the header
        const std::string& token = kTokens[random() % kTokens.size()];
        bytes.replace(at, std::min<size_t>(1 + random() % 6, bytes.size() - at), token);
        break;
      }
      default:
        bytes.resize(at);
    }
  }
}

/// Makes header size and hash fit again, where the bytes still look like a file.
void Mend(std::string& bytes) {
  const size_t end = bytes.find("}}}");
  const std::string key = "tensors_sha256\\\":\\\"";
  const size_t hash = bytes.find(key);
  const size_t last = bytes.rfind('}');
  if (bytes.size() < 8 || end == std::string::npos || last == std::string::npos) return;
  uint64_t header = 0;
  std::memcpy(&header, bytes.data(), 8);
  if (header > bytes.size() - 8) {
    header = last + 1 - std::min<size_t>(last + 1, 8);
    std::memcpy(bytes.data(), &header, 8);
  }
  if (hash == std::string::npos || hash + key.size() + 64 > bytes.size()) return;
  const std::string digest =
      edge_lora::Sha256Hex(bytes.data() + 8 + header, bytes.size() - 8 - header);
  bytes.replace(hash + key.size(), 64, digest);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s SECONDS FILE_OR_FOLDER...\n", argv[0]);
    return 2;
  }
  std::vector<std::string> corpus;
  for (int i = 2; i < argc; ++i) {
    std::vector<std::filesystem::path> paths = {argv[i]};
    if (std::filesystem::is_directory(argv[i])) {
      paths.clear();
      for (const auto& entry : std::filesystem::directory_iterator(argv[i])) {
        if (entry.is_regular_file()) paths.push_back(entry.path());
      }
    }
    for (const auto& path : paths) {
      std::ifstream file(path, std::ios::binary);
      corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    }
  }
  if (corpus.empty()) {
    std::fprintf(stderr, "the corpus is empty\n");
    return 2;
  }
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(argv[1]));
  Random random(1);
  uint64_t runs = 0;
  for (; std::chrono::steady_clock::now() < end; ++runs) {
    std::string bytes = corpus[random() % corpus.size()];
    Mutate(bytes, random);
    if (random() % 2 == 0) Mend(bytes);
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
  }
  std::printf("%llu inputs, no crash\n", static_cast<unsigned long long>(runs));
}
