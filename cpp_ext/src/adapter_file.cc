#include "adapter_file.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <span>

#include "index_codec.h"
#include "sha256.h"
#include "status.h"
#include "strict_json.h"

namespace edge_lora {
namespace {

constexpr uint64_t kFormatVersion = 1;
constexpr char kHeaderKey[] = "edge_lora";
constexpr uint64_t kMaxElements = uint64_t{1} << 32;  // an index is a uint32
constexpr size_t kMaxAxes = 8;

[[noreturn]] void Refuse(const std::string& reason) { throw Error(Code::kAdapterFile, reason); }

/// The tensors of a file; each belongs to exactly one form.
class Tensors {
 public:
  explicit Tensors(const std::map<std::string, Tensor>& all) : all_(all) {}

  const Tensor& Take(const std::string& name) {
    const auto found = all_.find(name);
    if (found == all_.end()) Refuse("tensor '" + name + "' is missing");
    taken_.insert(name);
    return found->second;
  }

  std::vector<std::string> Rest() const {
    std::vector<std::string> rest;
    for (const auto& entry : all_) {
      if (!taken_.contains(entry.first)) rest.push_back(entry.first);
    }
    return rest;
  }

 private:
  const std::map<std::string, Tensor>& all_;
  std::set<std::string> taken_;
};

Values TakeValues(Tensors& tensors, const std::string& name) {
  const Tensor& tensor = tensors.Take(name);
  if (!IsFloat(tensor.dtype)) {
    Refuse(name + " is " + NameOf(tensor.dtype) + ", must be fp32, fp16 or bf16");
  }
  if (!AllFinite(tensor.values())) Refuse(name + " holds NaN or infinity");
  return tensor.values();
}

std::string ShapeText(const std::vector<uint64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

void RequireShape(const Tensor& tensor, const std::string& name,
                  const std::vector<uint64_t>& wanted) {
  if (tensor.shape != wanted) {
    Refuse(name + " is " + ShapeText(tensor.shape) + ", must be " + ShapeText(wanted));
  }
}

LowRank DecodeLowRank(const std::string& prefix, Tensors& tensors, const Shape& shape) {
  const Tensor& a = tensors.Take(prefix + "A");
  const Tensor& bt = tensors.Take(prefix + "Bt");
  const uint64_t rank = a.shape.empty() ? 0 : a.shape[0];
  if (rank == 0 || rank > UINT32_MAX) Refuse("rank is " + std::to_string(rank));
  RequireShape(a, "A", {rank, shape.in});
  RequireShape(bt, "Bt", {rank, shape.out});
  return {static_cast<uint32_t>(rank), TakeValues(tensors, prefix + "A"),
          TakeValues(tensors, prefix + "Bt")};
}

std::vector<uint32_t> DecodeIndices(const Json& head, const Tensor& stream, uint64_t count,
                                    const Shape& shape) {
  if (stream.dtype != Dtype::kU8 || stream.shape.size() != 1) {
    Refuse(std::string("idx is ") + NameOf(stream.dtype) + " " + ShapeText(stream.shape) +
           ", must be a uint8 stream");
  }
  const std::span bytes(stream.data, stream.count);
  const std::string coding = TextIn(head, "index");
  const int64_t k = IntegerIn(head, "k");
  if (coding == "rice") return RiceDecode(bytes, count, k, shape.size());
  if (coding != "line16") Refuse("unknown index coding '" + coding + "'; known: 'rice', 'line16'");
  if (shape.out % kFileLine != 0 || count % kFileLine != 0) {
    Refuse("line16 indices need multiples of 16, found " + std::to_string(shape.out) +
           " outputs and " + std::to_string(count) + " values");
  }
  const auto lines = RiceDecode(bytes, count / kFileLine, k, shape.size() / kFileLine);
  return ExpandLines(lines, shape.in);
}

Sparse DecodeSparse(const Json& head, const std::string& prefix, Tensors& tensors,
                    const Shape& shape) {
  const Values values = TakeValues(tensors, prefix + "val");
  RequireShape(tensors.Take(prefix + "val"), "val", {values.count});
  return {DecodeIndices(head, tensors.Take(prefix + "idx"), values.count, shape), values};
}

Block DecodeBlock(const Json& head, const std::string& prefix, Tensors& tensors,
                  const Shape& shape) {
  const std::string axis = TextIn(head, "axis");
  if (axis != "row" && axis != "col") Refuse("unknown axis '" + axis + "'; known: 'row', 'col'");
  Block block;
  block.rows = axis == "row";
  const uint64_t limit = block.rows ? shape.out : shape.in;
  const Tensor& idx = tensors.Take(prefix + "idx");
  if (idx.dtype != Dtype::kU32 || idx.shape.size() != 1) {
    Refuse(std::string("idx is ") + NameOf(idx.dtype) + " " + ShapeText(idx.shape) +
           ", must be uint32 (k,)");
  }
  RequireShape(tensors.Take(prefix + "val"), "val", {idx.count, block.rows ? shape.in : shape.out});
  block.values = TakeValues(tensors, prefix + "val");
  block.indices.resize(idx.count);
  if (idx.count != 0) std::memcpy(block.indices.data(), idx.data, idx.bytes());
  for (size_t i = 0; i < block.indices.size(); ++i) {
    if (block.indices[i] >= limit) {
      Refuse("index " + std::to_string(block.indices[i]) + " is out of range, slot has " +
             std::to_string(limit) + " positions");
    }
    if (i > 0 && block.indices[i] <= block.indices[i - 1]) {
      Refuse("indices are not strictly ascending (unsorted or duplicated)");
    }
  }
  return block;
}

Dense DecodeDense(const std::string& prefix, Tensors& tensors, const Shape& shape) {
  const Values values = TakeValues(tensors, prefix + "val");
  if (values.count != shape.size()) {
    Refuse(std::to_string(values.count) + " values, slot has " + std::to_string(shape.size()));
  }
  return {values};
}

Form DecodeForm(const Json& head, const std::string& prefix, Tensors& tensors, const Shape& shape) {
  if (!head.is_object()) Refuse("is not an object");
  Form form;
  const std::string kind = TextIn(head, "form");
  form.scale = NumberIn(head, "scale");
  if (kind == "low_rank") {
    form.fields = DecodeLowRank(prefix, tensors, shape);
    return form;
  }
  if (kind != "sparse" && kind != "block" && kind != "dense") {
    Refuse("unknown form '" + kind + "'; known: 'block', 'dense', 'low_rank', 'sparse'");
  }
  const std::string mode = TextIn(head, "mode");
  if (mode != "add" && mode != "set") Refuse("unknown mode '" + mode + "'; known: 'add', 'set'");
  form.replaces = mode == "set";
  if (form.replaces && form.scale != 1.0) Refuse("scale must be 1.0 for mode 'set'");
  if (kind == "sparse") form.fields = DecodeSparse(head, prefix, tensors, shape);
  if (kind == "block") form.fields = DecodeBlock(head, prefix, tensors, shape);
  if (kind == "dense") form.fields = DecodeDense(prefix, tensors, shape);
  return form;
}

Shape DecodeShape(const Json& axes) {
  if (axes.size() > kMaxAxes) Refuse("more than 8 axes");
  Shape shape{1, 1};
  uint64_t size = 1;
  for (size_t i = 0; i < axes.size(); ++i) {
    const uint64_t axis = Natural(axes[i], "shape");
    if (axis == 0 || __builtin_mul_overflow(size, axis, &size) || size > kMaxElements) {
      Refuse("a slot has 1 to 2^32 values, its shape says otherwise");
    }
    (i == 0 ? shape.out : shape.in) *= axis;
  }
  return shape;
}

Delta DecodeDelta(const std::string& slot, const Json& entry, Tensors& tensors,
                  std::vector<std::string>& problems) {
  if (!entry.is_object()) Refuse("is not an object");
  Delta delta{slot, DecodeShape(ArrayIn(entry, "shape")), {}};
  TextIn(entry, "dtype");
  if (entry.contains("hash")) TextIn(entry, "hash");
  const Json& heads = ArrayIn(entry, "forms");
  if (heads.empty()) Refuse("no forms");
  for (size_t i = 0; i < heads.size(); ++i) {
    try {
      const std::string prefix = slot + "/" + std::to_string(i) + "/";
      delta.forms.push_back(DecodeForm(heads[i], prefix, tensors, delta.shape));
    } catch (const Error& error) {
      problems.push_back(slot + ": form " + std::to_string(i) + ": " + error.what());
    }
  }
  if (heads.size() > 1 && std::ranges::any_of(delta.forms, &Form::replaces)) {
    Refuse("a form with mode 'set' must stand alone");
  }
  return delta;
}

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
  const auto text = file_.metadata.find(kHeaderKey);
  if (text == file_.metadata.end()) {
    Refuse(
        "a safetensors file, but not an edge_lora adapter (no 'edge_lora' header). "
        "Train one with: edge-lora train");
  }
  const Json header = ParseStrict(text->second);
  if (!header.is_object()) Refuse("its edge_lora header is not an object");
  CheckIdentity(header, file_);
  alpha_ = NumberIn(header, "alpha");
  const Json& slots = ObjectIn(header, "slots");
  Tensors tensors(file_.tensors);
  std::vector<std::string> problems;
  if (slots.empty()) problems.emplace_back("no slots: an adapter changes at least one");
  for (const auto& [slot, entry] : slots.items()) {
    try {
      if (std::ranges::any_of(slot, IsControl)) Refuse("control characters in a slot's name");
      deltas_.push_back(DecodeDelta(slot, entry, tensors, problems));
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
    adapter->file_ = ReadSafetensors(path);
    adapter->Parse();
  } catch (const Error& error) {
    throw Error(error.code(), "adapter file '" + path + "': " + error.what());
  }
  return adapter;
}

const Delta* AdapterFile::Find(const std::string& slot) const {
  const auto found = std::ranges::lower_bound(deltas_, slot, {}, &Delta::slot);
  return found != deltas_.end() && found->slot == slot ? &*found : nullptr;
}

size_t AdapterFile::bytes() const {
  size_t bytes = file_.blob.size();
  for (const Delta& delta : deltas_) {
    for (const Form& form : delta.forms) {
      if (const auto* sparse = std::get_if<Sparse>(&form.fields)) {
        bytes += sparse->indices.size() * sizeof(uint32_t);
      }
    }
  }
  return bytes;
}

bool StackLowRank(const AdapterFile& adapter, const std::string& slot, StackedLowRank& stacked) {
  const Delta* delta = adapter.Find(slot);
  if (delta == nullptr) {
    throw Error(Code::kAdapterMismatch, "the adapter has no delta for slot '" + slot + "'");
  }
  stacked = {};
  for (const Form& form : delta->forms) {
    const auto* low_rank = std::get_if<LowRank>(&form.fields);
    if (low_rank == nullptr) return false;
    stacked.rank += low_rank->rank;
  }
  const auto [out, in] = delta->shape;
  stacked.a.resize(in * stacked.rank);
  stacked.b.resize(out * stacked.rank);
  std::vector<float> row(in);
  uint32_t first = 0;
  for (const Form& form : delta->forms) {
    const auto& low_rank = std::get<LowRank>(form.fields);
    const auto factor = static_cast<float>(adapter.alpha() * form.scale);
    for (uint32_t r = 0; r < low_rank.rank; ++r) {
      ToFloat(low_rank.a, r * in, in, row.data());
      for (uint64_t k = 0; k < in; ++k) stacked.a[k * stacked.rank + first + r] = row[k];
    }
    float* b = stacked.b.data() + first * out;
    ToFloat(low_rank.bt, 0, low_rank.rank * out, b);
    for (uint64_t i = 0; i < low_rank.rank * out; ++i) b[i] *= factor;
    first += low_rank.rank;
  }
  return true;
}

}  // namespace edge_lora
