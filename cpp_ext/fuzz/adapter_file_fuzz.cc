// Any bytes as an adapter file: it is opened or refused, and nothing else happens.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "adapter_file.h"
#include "low_rank.h"
#include "status.h"

namespace {

void DecodeAll(const edge_lora::Values& values) {
  std::vector<float> all(values.count);
  edge_lora::ToFloat(values, 0, all.size(), all.data());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const int file = memfd_create("adapter", MFD_CLOEXEC);
  static const std::string path = "/proc/self/fd/" + std::to_string(file);
  if (ftruncate(file, 0) != 0 || pwrite(file, data, size, 0) != static_cast<ssize_t>(size)) {
    return 0;
  }
  try {
    const auto adapter = edge_lora::AdapterFile::Open(path);
    edge_lora::StackedLowRank stacked;
    for (const auto& delta : adapter->deltas()) {
      StackLowRank(*adapter, delta.slot, stacked);
      for (const auto& form : delta.forms) edge_lora::ForEachValues(form.fields, DecodeAll);
    }
    const auto view = adapter->AtRank(1);
    for (const auto& delta : view->deltas()) StackLowRank(*view, delta.slot, stacked);
  } catch (const edge_lora::Error&) {
    // Refused, as it should be.
  }
  return 0;
}
