// An adapter as one safetensors file; twin of edge_lora/adapter_file.py, which has the format.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "forms.h"
#include "safetensors.h"

namespace edge_lora {

/// An adapter file, opened, fully validated and decoded. Immutable, so safe to share.
class AdapterFile {
 public:
  /// Throws Error(kAdapterFile) with everything that is wrong.
  static std::shared_ptr<const AdapterFile> Open(const std::string& path);

  /// The same adapter at a smaller rank, over the same bytes; see CutToRank.
  std::shared_ptr<const AdapterFile> AtRank(uint32_t rank) const;

  const std::string& header() const { return file_->metadata.at("edge_lora"); }
  double alpha() const { return alpha_; }
  const std::vector<Delta>& deltas() const { return deltas_; }
  /// Null if the adapter does not change that slot.
  const Delta* Find(const std::string& slot) const;
  /// Bytes that it keeps in memory.
  size_t bytes() const;

 private:
  AdapterFile() = default;
  void Parse();

  std::shared_ptr<const Safetensors> file_;
  double alpha_ = 1.0;
  std::vector<Delta> deltas_;  // in the order of the slots' names
};

}  // namespace edge_lora
