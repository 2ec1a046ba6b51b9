#include "probe.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "status.h"

namespace edge_lora {
namespace {

/// Keeps the bytes of a weight while it holds probe values.
class Disguise {
 public:
  Disguise(std::span<uint8_t> weight, Shape shape)
      : weight_(weight), real_(weight.begin(), weight.end()) {
    std::vector<float> probe(shape.size());
    Layout::ProbeValues(shape, Stored::kOutIn, probe.data());
    std::memcpy(weight_.data(), probe.data(), weight_.size());
  }
  ~Disguise() { std::ranges::copy(real_, weight_.begin()); }
  Disguise(const Disguise&) = delete;
  Disguise& operator=(const Disguise&) = delete;

  const uint8_t* real() const { return real_.data(); }

 private:
  std::span<uint8_t> weight_;
  std::vector<uint8_t> real_;
};

std::span<uint8_t> WeightAt(std::span<uint8_t> pte, const ProbeSlot& slot) {
  const Shape shape = slot.shape;
  if (slot.key.empty() || shape.in == 0 || shape.out == 0 ||
      shape.in > pte.size() / sizeof(float) / shape.out ||
      slot.offset > pte.size() - shape.size() * sizeof(float)) {
    throw Error(Code::kInvalidArgument,
                "slot '" + slot.key + "': a weight of (" + std::to_string(shape.out) + ", " +
                    std::to_string(shape.in) + ") at " + std::to_string(slot.offset) +
                    " does not lie in a program of " + std::to_string(pte.size()) + " bytes");
  }
  return pte.subspan(slot.offset, shape.size() * sizeof(float));
}

/// Writes the real values to wherever probe values lie in a block, padding included.
void Undisguise(const ProbeSlot& slot, const uint8_t* real, std::span<uint8_t> block) {
  float value = 0;
  Layout::ProbeValues({1, 1}, Stored::kOutIn, &value);
  const auto first = std::bit_cast<uint32_t>(value);
  for (size_t at = 0; at + sizeof(float) <= block.size(); at += sizeof(float)) {
    uint32_t name = 0;
    std::memcpy(&name, block.data() + at, sizeof name);
    if (name - first >= slot.shape.size()) continue;
    std::memcpy(block.data() + at, real + (name - first) * sizeof(float), sizeof(float));
  }
}

/// The entries of a weight: one, or one for each bias that it is packed with.
std::vector<PackedEntry> EntriesOf(const PackedIndex& index, const std::string& key) {
  constexpr size_t kWeightName = 64;  // sha256 in hex; the bias's follows
  const std::string weight = key.substr(0, kWeightName);
  std::vector<PackedEntry> entries;
  for (auto it = index.lower_bound(weight); it != index.end() && it->first.starts_with(weight);
       ++it) {
    entries.push_back(it->second);
  }
  return entries;
}

}  // namespace

ProbedProgram OpenProbed(std::span<uint8_t> pte, const std::shared_ptr<const PackedFile>& packed,
                         int threads, const std::vector<ProbeSlot>& slots) {
  if (packed->bytes() != 0) {
    throw Error(
        Code::kInvalidArgument,
        "the packed file holds weights already: layouts can be probed in an empty one only");
  }
  ProbedProgram probed;
  std::vector<std::unique_ptr<Disguise>> disguises;
  disguises.reserve(slots.size());
  for (const ProbeSlot& slot : slots) {
    disguises.push_back(std::make_unique<Disguise>(WeightAt(pte, slot), slot.shape));
  }
  probed.program = std::make_unique<Program>(pte, packed, threads);
  const std::shared_ptr<const Mapping> file = packed->Map();
  const PackedIndex index = ReadPackedIndex(file->data(), file->bytes());
  for (size_t i = 0; i < slots.size(); ++i) {
    const std::vector<PackedEntry> entries = EntriesOf(index, slots[i].key);
    if (entries.empty()) {
      throw Error(Code::kUnsupported, "ExecuTorch did not pack the weight '" + slots[i].key + "'");
    }
    for (const PackedEntry& entry : entries) {
      uint8_t* block = file->data() + entry.offset;
      const auto layout = Layout::FromProbe(reinterpret_cast<const float*>(block),
                                            entry.bytes / sizeof(float), slots[i].shape);
      Undisguise(slots[i], disguises[i]->real(), {block, entry.bytes});
      if (&entry == entries.data()) probed.layouts.push_back(layout);
    }
  }
  return probed;
}

}  // namespace edge_lora
