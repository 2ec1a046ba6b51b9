// An adapter as one safetensors file; twin of edge_lora/adapter_file.py, which has the format.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "safetensors.h"
#include "values.h"

namespace edge_lora {

/// (out_features, in_features) of a slot; a convolution has the rest of its axes flattened into in.
struct Shape {
  uint64_t out = 0;
  uint64_t in = 0;

  bool operator==(const Shape&) const = default;
  uint64_t size() const { return out * in; }
};

/// Delta scale * (b @ a). The file holds b transposed.
struct LowRank {
  uint32_t rank = 0;
  Values a;   // (rank, in)
  Values bt;  // (rank, out)
};

/// Few entries, at flat row-major positions in (out, in), strictly ascending.
struct Sparse {
  std::vector<uint32_t> indices;  // (nnz)
  Values values;                  // (nnz)
};

/// Whole rows (outputs) or whole columns (inputs), strictly ascending.
struct Block {
  bool rows = false;
  std::vector<uint32_t> indices;  // (k)
  Values values;                  // (k, in) for rows, (k, out) for columns
};

/// Every entry.
struct Dense {
  Values values;  // (out, in)
};

using Fields = std::variant<LowRank, Sparse, Block, Dense>;

struct Form {
  Fields fields;
  double scale = 1.0;
  bool replaces = false;  ///< Mode "set".
};

/// The forms that the adapter has for one slot; they add up.
struct Delta {
  std::string slot;
  Shape shape;
  std::vector<Form> forms;
};

/// An adapter file, opened, fully validated and decoded. Immutable, so safe to share.
class AdapterFile {
 public:
  /// Throws Error(kAdapterFile) with everything that is wrong.
  static std::shared_ptr<const AdapterFile> Open(const std::string& path);

  const std::string& header() const { return file_.metadata.at("edge_lora"); }
  double alpha() const { return alpha_; }
  const std::vector<Delta>& deltas() const { return deltas_; }
  /// Null if the adapter does not change that slot.
  const Delta* Find(const std::string& slot) const;
  /// Bytes that it keeps in memory.
  size_t bytes() const;

 private:
  AdapterFile() = default;
  void Parse();

  Safetensors file_;
  double alpha_ = 1.0;
  std::vector<Delta> deltas_;  // in the order of the slots' names
};

/// All low-rank forms of a slot side by side, for an unfused run.
struct StackedLowRank {
  uint32_t rank = 0;
  std::vector<float> a;  // (in, rank)
  std::vector<float> b;  // (rank, out), with each form's scale and the adapter's alpha in it
};

/// Returns false if the slot has other forms too. Throws Error(kAdapterMismatch) for no such slot.
bool StackLowRank(const AdapterFile& adapter, const std::string& slot, StackedLowRank& stacked);

}  // namespace edge_lora
