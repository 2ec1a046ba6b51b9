// Any bytes as an adapter file: it is opened or refused, and nothing else happens.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "adapter_file.h"
#include "low_rank.h"
#include "status.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const int file = memfd_create("adapter", MFD_CLOEXEC);
  static const std::string path = "/proc/self/fd/" + std::to_string(file);
  if (ftruncate(file, 0) != 0 || pwrite(file, data, size, 0) != static_cast<ssize_t>(size)) {
    return 0;
  }
  try {
    const auto adapter = edge_lora::AdapterFile::Open(path);
    edge_lora::StackedLowRank stacked;
    for (const auto& delta : adapter->deltas()) StackLowRank(*adapter, delta.slot, stacked);
  } catch (const edge_lora::Error&) {
    // Refused, as it should be.
  }
  return 0;
}
