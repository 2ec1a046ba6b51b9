#include "adapter_file.h"

#include <algorithm>

#include "form_reader.h"
#include "low_rank.h"
#include "sha256.h"
#include "status.h"
#include "strict_json.h"

namespace edge_lora {
namespace {

constexpr uint64_t kFormatVersion = 1;
constexpr char kHeaderKey[] = "edge_lora";

[[noreturn]] void Refuse(const std::string& reason) { throw Error(Code::kAdapterFile, reason); }

bool IsControl(char c) { return (c >= 0 && c < 0x20) || c == 0x7f; }

void CheckIdentity(const Json& header, const Safetensors& file) {
  const Json& version = header.contains("edge_lora") ? header["edge_lora"] : Json();
  if (!version.is_number_unsigned() || version.get<uint64_t>() != kFormatVersion) {
    Refuse("format version " + version.dump() + ", this reader knows " +
           std::to_string(kFormatVersion) + "; install a newer edge-lora");
  }
  const std::byte* data = file.blob.data() + file.data_begin;
  const std::string digest = Sha256Hex(data, file.blob.size() - file.data_begin);
  if (digest != TextIn(header, "tensors_sha256")) {
    Refuse("tensor bytes do not match their sha256: the file is damaged");
  }
  TextIn(header, "name");
  TextIn(header, "method");
  const Json& base = ObjectIn(header, "base");
  TextIn(base, "sha256");
  if (base.contains("id")) TextIn(base, "id");
  if (header.contains("provenance")) ObjectIn(header, "provenance");
}

}  // namespace

void AdapterFile::Parse() {
  const auto text = file_->metadata.find(kHeaderKey);
  if (text == file_->metadata.end()) {
    Refuse(
        "a safetensors file, but not an edge_lora adapter (no 'edge_lora' header). "
        "Train one with: edge-lora train");
  }
  const Json header = ParseStrict(text->second);
  if (!header.is_object()) Refuse("its edge_lora header is not an object");
  CheckIdentity(header, *file_);
  alpha_ = NumberIn(header, "alpha");
  const Json& slots = ObjectIn(header, "slots");
  const std::vector<Codebook> books = ReadCodebooks(header);
  Tensors tensors(file_->tensors);
  std::vector<std::string> problems;
  if (slots.empty()) problems.emplace_back("no slots: an adapter changes at least one");
  for (const auto& [slot, entry] : slots.items()) {
    try {
      if (std::ranges::any_of(slot, IsControl)) Refuse("control characters in a slot's name");
      deltas_.push_back(ReadDelta(slot, entry, books, tensors, problems));
    } catch (const Error& error) {
      problems.push_back(slot + ": " + error.what());
    }
  }
  for (const std::string& name : tensors.Rest()) {
    problems.push_back("tensor '" + name + "' belongs to no form");
  }
  if (!problems.empty()) Refuse(ListAll("damaged", problems));
}

std::shared_ptr<const AdapterFile> AdapterFile::Open(const std::string& path) {
  const std::shared_ptr<AdapterFile> adapter(new AdapterFile);
  try {
    adapter->file_ = std::make_shared<const Safetensors>(ReadSafetensors(path));
    adapter->Parse();
  } catch (const Error& error) {
    throw Error(error.code(), "adapter file '" + path + "': " + error.what());
  }
  return adapter;
}

std::shared_ptr<const AdapterFile> AdapterFile::AtRank(uint32_t rank) const {
  const auto view = std::make_shared<AdapterFile>(*this);
  CutToRank(view->deltas_, rank);
  return view;
}

const Delta* AdapterFile::Find(const std::string& slot) const {
  const auto found = std::ranges::lower_bound(deltas_, slot, {}, &Delta::slot);
  return found != deltas_.end() && found->slot == slot ? &*found : nullptr;
}

size_t AdapterFile::bytes() const {
  size_t bytes = file_->blob.size();
  for (const Delta& delta : deltas_) {
    for (const Form& form : delta.forms) {
      if (std::holds_alternative<Sparse>(form.fields)) bytes += IndicesOf(form.fields).size_bytes();
    }
  }
  return bytes;
}

}  // namespace edge_lora
