// The forms of a slot out of a file's header and tensors; twin of edge_lora/form_codec.py.
#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "forms.h"
#include "safetensors.h"
#include "strict_json.h"

namespace edge_lora {

/// The tensors of a file; each belongs to exactly one form.
class Tensors {
 public:
  explicit Tensors(const std::map<std::string, Tensor>& all) : all_(all) {}

  bool Has(const std::string& name) const { return all_.contains(name); }
  /// Throws Error(kAdapterFile) if there is none of that name.
  const Tensor& Take(const std::string& name);
  /// Names that nobody took.
  std::vector<std::string> Rest() const;

 private:
  const std::map<std::string, Tensor>& all_;
  std::set<std::string> taken_;
};

/// A book of a file, and how many consecutive values share their statistics.
struct Codebook {
  enum class Group : uint8_t { kTensor, kRow, kCount };

  Book book;
  Group group = Group::kTensor;
  uint64_t count = 0;  ///< For kCount.
};

/// Reads the codebooks of a header; tensors name them by number.
/// Throws Error(kAdapterFile) unless each is sound.
std::vector<Codebook> ReadCodebooks(const Json& header);

/// Reads the delta of one slot. What is wrong with a form goes to `problems`; throws
/// Error(kAdapterFile) for what is wrong with the slot.
Delta ReadDelta(const std::string& slot, const Json& entry, const std::vector<Codebook>& books,
                Tensors& tensors, std::vector<std::string>& problems);

}  // namespace edge_lora
