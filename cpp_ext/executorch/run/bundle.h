// A bundle's manifest, as far as an ExecuTorch program needs it; twin of edge_lora/bundle.py and
// edge_lora/bundle_program.py.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "forms.h"
#include "strict_json.h"

namespace edge_lora {

/// One weight of the base, and where the program keeps it.
struct BundleSlot {
  std::string name;
  std::vector<uint64_t> axes;
  std::string dtype;
  std::string sha256;
  std::vector<std::string> aliases;
  std::string key;  ///< Of its packed entry; "" if it is not packed.
  uint64_t offset = 0;
  uint64_t packed_offset = 0;  ///< Of what is packed: of a tied weight a copy, else ``offset``.
  bool is_read_in_place = false;
  bool is_fp32 = false;                  ///< In the program too, so that adapters can be fused.
  std::vector<std::string> lora_inputs;  ///< Two names, or none.

  /// (out, in), later axes flattened.
  Shape shape() const;
};

/// An axis of an input: a size, or a name if it varies.
struct Axis {
  uint64_t size = 0;
  std::string name;
};

struct BundleInput {
  std::string name;
  std::string dtype;
  std::vector<Axis> axes;
};

struct Bundle {
  std::string folder;
  std::string base_id;
  std::string fingerprint;
  std::string task;
  std::vector<BundleSlot> slots;
  std::string program;  ///< Path of the .pte.
  uint64_t size = 0;    ///< Of that file.
  std::string sha256;   ///< Of that file, in hex.
  std::vector<BundleInput> inputs;
  std::vector<std::string> input_order;
  uint64_t cache_length = 0;
  Json canary;

  /// The slot of that name or alias, or null.
  const BundleSlot* Find(const std::string& name) const;
};

/// Reads DIR/bundle.json as a stranger may have made it. Throws Error(kBundle).
Bundle ReadBundle(const std::string& folder);

/// Throws Error(kAdapterMismatch) that lists every reason why an adapter, whose file has this
/// header, cannot be fused into the bundle's program. Twin of SlotTable.check.
void RequireFit(const Bundle& bundle, const std::string& name, const std::string& header);

}  // namespace edge_lora
