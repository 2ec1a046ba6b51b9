#include "bundle.h"

#include <algorithm>
#include <map>

#include "file.h"
#include "status.h"

namespace edge_lora {
namespace {

constexpr uint64_t kMaxManifest = uint64_t{64} << 20;
constexpr uint64_t kMaxAxis = uint64_t{1} << 31;
constexpr size_t kMaxAxes = 8;

[[noreturn]] void Refuse(const std::string& reason) { throw Error(Code::kBundle, reason); }

std::string DigestAt(const Json& object, const char* key) {
  const std::string text = TextIn(object, key);
  const bool is_hex = std::ranges::all_of(
      text, [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
  if (text.size() != 64 || !is_hex) Refuse(std::string("'") + key + "' is not a sha256 in hex");
  return text;
}

std::vector<std::string> TextsIn(const Json& object, const char* key) {
  std::vector<std::string> texts;
  const Json& value = Member(object, key);
  if (value.is_null()) return texts;
  if (!value.is_array()) Refuse(std::string("'") + key + "' is not a list");
  for (const Json& item : value) {
    if (!item.is_string()) Refuse(std::string("'") + key + "' is not a list of texts");
    texts.push_back(item.get<std::string>());
  }
  return texts;
}

uint64_t AxisOf(const Json& value) {
  const uint64_t size = Natural(value, "shape");
  if (size == 0 || size > kMaxAxis) Refuse("'shape' has an axis of " + std::to_string(size));
  return size;
}

void RequireFewAxes(const Json& shape) {
  if (shape.size() > kMaxAxes) Refuse("'shape' has over 8 axes");
}

BundleSlot ReadSlot(const Json& record) {
  BundleSlot slot;
  slot.name = TextIn(record, "name");
  const Json& shape = ArrayIn(record, "shape");
  RequireFewAxes(shape);
  if (shape.empty()) Refuse("slot " + slot.name + ": 'shape' has no axes");
  for (const Json& axis : shape) slot.axes.push_back(AxisOf(axis));
  slot.dtype = TextIn(record, "dtype");
  slot.sha256 = DigestAt(record, "sha256");
  if (record.contains("aliases")) slot.aliases = TextsIn(record, "aliases");
  return slot;
}

/// Adds where the program keeps the weight.
void ReadPlace(const Json& record, BundleSlot& slot) {
  slot.offset = Natural(Member(record, "offset"), "offset");
  const Json copy = record.value("packed_offset", Json());
  slot.packed_offset = copy.is_null() ? slot.offset : Natural(copy, "packed_offset");
  slot.key = TextIn(record, "key");
  slot.is_fp32 = TextIn(record, "dtype") == "F32" && slot.dtype == "F32";
  slot.is_read_in_place = record.value("is_read_in_place", false);
  slot.lora_inputs = TextsIn(record, "lora_inputs");
  if (slot.lora_inputs.size() % 2 != 0 || slot.lora_inputs.size() > 2) {
    Refuse("slot " + slot.name + ": 'lora_inputs' must be two names");
  }
}

BundleInput ReadInput(const Json& record) {
  BundleInput input{TextIn(record, "name"), TextIn(record, "dtype"), {}};
  RequireFewAxes(ArrayIn(record, "shape"));
  for (const Json& axis : ArrayIn(record, "shape")) {
    if (axis.is_string()) {
      input.axes.push_back({0, axis.get<std::string>()});
    } else {
      input.axes.push_back({AxisOf(axis), ""});
    }
  }
  return input;
}

void RequireInside(const std::string& path) {
  const bool is_outside =
      path.empty() || path.front() == '/' || path.find("..") != std::string::npos;
  if (is_outside || path.find('\\') != std::string::npos)
    Refuse("file '" + path + "' lies outside the bundle");
}

void ReadProgram(const Json& manifest, Bundle& bundle) {
  const Json& record = ObjectIn(manifest, "executorch");
  const std::string file = TextIn(record, "file");
  RequireInside(file);
  const Json& known = ObjectIn(ObjectIn(manifest, "files"), file.c_str());
  bundle.program = bundle.folder + "/" + file;
  bundle.size = Natural(Member(known, "size"), "size");
  bundle.sha256 = DigestAt(known, "sha256");
  for (const Json& input : ArrayIn(record, "inputs")) bundle.inputs.push_back(ReadInput(input));
  bundle.input_order = TextsIn(record, "input_order");
  bundle.cache_length = Natural(Member(record, "cache_length"), "cache_length");
  bundle.canary = ObjectIn(record, "canary");
  const Json& places = ObjectIn(record, "slots");
  for (BundleSlot& slot : bundle.slots) {
    ReadPlace(ObjectIn(places, slot.name.c_str()), slot);
    const Shape shape = slot.shape();
    if (!slot.is_fp32) continue;
    if (shape.in > bundle.size / sizeof(float) / shape.out ||
        std::max(slot.offset, slot.packed_offset) > bundle.size - shape.size() * sizeof(float)) {
      Refuse("slot " + slot.name + ": its values are outside the file");
    }
  }
}

Bundle Parse(const std::string& folder, const std::string& text) {
  const Json manifest = ParseStrict(text);
  if (!manifest.is_object()) Refuse("not an object");
  const Json version = manifest.value("edge_lora_bundle", Json());
  if (!version.is_array() || version.empty() || version[0] != 1) {
    Refuse("format version " + version.dump() + ", this reader knows 1.x. Export again");
  }
  Bundle bundle;
  bundle.folder = folder;
  const Json& base = ObjectIn(manifest, "base");
  bundle.base_id = TextIn(base, "id");
  bundle.fingerprint = DigestAt(base, "fingerprint");
  bundle.task = TextIn(manifest, "task");
  for (const Json& record : ArrayIn(manifest, "slots")) bundle.slots.push_back(ReadSlot(record));
  if (!manifest.contains("executorch")) {
    throw Error(Code::kUnsupported, "bundle '" + folder +
                                        "' has no ExecuTorch program: export the base again, for "
                                        "the engine executorch");
  }
  ReadProgram(manifest, bundle);
  return bundle;
}

std::string Text(const std::vector<uint64_t>& axes) {
  std::string text = "(";
  for (size_t i = 0; i < axes.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(axes[i]);
  return text + ")";
}

/// Adds why one delta does not fit; `is_bound`: the adapter names its base.
void AddProblems(const Bundle& bundle, const std::string& name, const Json& delta, bool is_bound,
                 std::vector<std::string>& problems) {
  for (const Json& form : ArrayIn(delta, "forms")) {
    if (TextIn(form, "form") == "bottleneck") {
      problems.push_back(name + ": is a branch beside a site, which this tool does not run");
      return;
    }
  }
  const BundleSlot* slot = bundle.Find(name);
  if (slot == nullptr) {
    problems.push_back(name + ": no such slot");
    return;
  }
  std::vector<uint64_t> axes;
  for (const Json& axis : ArrayIn(delta, "shape")) axes.push_back(Natural(axis, "shape"));
  const std::string dtype = delta.value("dtype", "F32");
  const std::string hash = delta.value("hash", "");
  if (axes != slot->axes) {
    problems.push_back(name + ": made for shape " + Text(axes) + ", slot is " + Text(slot->axes));
  }
  if (is_bound && dtype != slot->dtype) {
    problems.push_back(name + ": made for dtype " + dtype + ", slot is " + slot->dtype);
  }
  if (!is_bound && hash.empty() && !slot->aliases.empty()) {
    problems.push_back(name + ": shares its tensor with others, and the adapter names no base");
  }
  if (!hash.empty() && hash != slot->sha256.substr(0, 16)) {
    problems.push_back(name + ": trained on weight " + hash + ", slot is " +
                       slot->sha256.substr(0, 16));
  }
  if (!slot->is_fp32) {
    problems.push_back(
        name +
        ": is not fp32 in the program, so this tool cannot fuse into it. Use "
        "edge_lora.runtime.open_bundle() in Python, or export the base with fp32 weights");
  }
}

}  // namespace

Shape BundleSlot::shape() const {
  uint64_t in = 1;
  for (size_t i = 1; i < axes.size(); ++i) {
    in *= axes[i];
    if (in > kMaxAxis) Refuse("slot " + name + ": 'shape' has too many values");
  }
  return {axes.front(), in};
}

const BundleSlot* Bundle::Find(const std::string& name) const {
  const auto found = std::ranges::find_if(slots, [&](const BundleSlot& slot) {
    return slot.name == name || std::ranges::find(slot.aliases, name) != slot.aliases.end();
  });
  return found == slots.end() ? nullptr : &*found;
}

Bundle ReadBundle(const std::string& folder) {
  const std::string path = folder + "/bundle.json";
  const File file(path, Code::kBundle);
  const uint64_t size = file.size();
  if (size > kMaxManifest) Refuse("bundle '" + folder + "': bundle.json is over 64 MiB");
  std::string text(size, '\0');
  file.Read(text.data(), size, 0);
  try {
    return Parse(folder, text);
  } catch (const Json::exception& error) {
    Refuse("bundle '" + folder + "' is damaged: bundle.json: " + error.what());
  } catch (const Error& error) {
    if (error.code() == Code::kUnsupported) throw;
    Refuse("bundle '" + folder + "' is damaged: bundle.json: " + error.what());
  }
}

void RequireFit(const Bundle& bundle, const std::string& name, const std::string& header) {
  const Json adapter = Json::parse(header);  // the core has checked it
  const std::string fingerprint = TextIn(ObjectIn(adapter, "base"), "sha256");
  const bool is_bound = !fingerprint.empty();
  std::vector<std::string> problems;
  if (is_bound && fingerprint != bundle.fingerprint) {
    problems.push_back("it was trained on another base (fingerprint " + fingerprint.substr(0, 12) +
                       "…, this is " + bundle.fingerprint.substr(0, 12) + "…)");
  }
  std::map<std::string, std::string> seen;
  for (const auto& [slot, delta] : ObjectIn(adapter, "slots").items()) {
    AddProblems(bundle, slot, delta, is_bound, problems);
    const BundleSlot* found = bundle.Find(slot);
    if (found == nullptr) continue;
    const auto [first, is_new] = seen.emplace(found->name, slot);
    if (!is_new) problems.push_back(slot + ": is the same tensor as " + first->second);
  }
  if (!problems.empty()) {
    throw Error(
        Code::kAdapterMismatch,
        ListAll("adapter '" + name + "' does not fit base '" + bundle.base_id + "'", problems));
  }
}

}  // namespace edge_lora
