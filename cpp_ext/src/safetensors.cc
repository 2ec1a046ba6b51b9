#include "safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>
#include <string_view>

#include "file.h"
#include "status.h"
#include "strict_json.h"

namespace edge_lora {
namespace {

constexpr uint64_t kMinFileBytes = 10;
constexpr uint64_t kMaxFileBytes = uint64_t{4} << 30;
constexpr uint64_t kMaxHeaderBytes = uint64_t{64} << 20;
constexpr size_t kMaxAxes = 8;
constexpr char kMetadataKey[] = "__metadata__";

[[noreturn]] void Refuse(const std::string& reason) { throw Error(Code::kAdapterFile, reason); }

std::vector<std::byte> ReadWhole(const std::string& path) {
  const File file(path, Code::kAdapterFile);
  if (file.size() < kMinFileBytes || file.size() > kMaxFileBytes) {
    Refuse(std::to_string(file.size()) + " bytes, an adapter has " + std::to_string(kMinFileBytes) +
           " to " + std::to_string(kMaxFileBytes));
  }
  std::vector<std::byte> blob(file.size());
  file.Read(blob.data(), blob.size(), 0);
  return blob;
}

std::optional<Dtype> DtypeOf(const std::string& name) {
  for (const Dtype dtype : {Dtype::kF32, Dtype::kF16, Dtype::kBF16, Dtype::kU8, Dtype::kU32}) {
    if (name == NameOf(dtype)) return dtype;
  }
  return std::nullopt;
}

struct Extent {
  uint64_t begin;
  uint64_t end;
  const std::string* name;
};

/// Reads one entry of the header; offsets are checked against the file later, all together.
Tensor ParseEntry(const std::string& name, const Json& entry, Extent& extent) {
  if (!entry.is_object()) Refuse("tensor '" + name + "' is not an object");
  Tensor tensor;
  const std::string dtype = TextIn(entry, "dtype");
  const auto known = DtypeOf(dtype);
  if (!known) Refuse("tensor '" + name + "' has dtype " + dtype + ", not one of ours");
  tensor.dtype = *known;
  uint64_t bytes = SizeOf(tensor.dtype);
  const Json& shape = ArrayIn(entry, "shape");
  if (shape.size() > kMaxAxes) Refuse("tensor '" + name + "' has more than 8 axes");
  for (const Json& axis : shape) {
    tensor.shape.push_back(Natural(axis, "shape of " + name));
    if (__builtin_mul_overflow(bytes, tensor.shape.back(), &bytes)) {
      Refuse("tensor '" + name + "': its shape overflows");
    }
  }
  const Json& offsets = ArrayIn(entry, "data_offsets");
  if (offsets.size() != 2) Refuse("tensor '" + name + "' needs two data_offsets");
  extent = {Natural(offsets[0], "data_offsets"), Natural(offsets[1], "data_offsets"), &name};
  if (extent.end < extent.begin || extent.end - extent.begin != bytes) {
    Refuse("tensor '" + name + "': dtype and shape need " + std::to_string(bytes) +
           " bytes, its data_offsets do not");
  }
  tensor.count = bytes / SizeOf(tensor.dtype);
  return tensor;
}

void ParseMetadata(const Json& metadata, Safetensors& file) {
  if (!metadata.is_object()) Refuse("__metadata__ is not an object");
  for (const auto& [key, value] : metadata.items()) {
    if (!value.is_string()) Refuse("__metadata__ value of '" + key + "' is not a string");
    file.metadata[key] = value.get<std::string>();
  }
}

/// Every byte of the data section belongs to exactly one tensor: no holes, overlaps or rest.
void RequireTight(std::vector<Extent>& extents, uint64_t data_bytes) {
  std::ranges::sort(extents, [](const Extent& a, const Extent& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  uint64_t next = 0;
  for (const Extent& extent : extents) {
    if (extent.begin != next) {
      Refuse("tensor '" + *extent.name + "' leaves a hole or overlaps its neighbour");
    }
    next = extent.end;
  }
  if (next != data_bytes) {
    Refuse("tensors claim " + std::to_string(next) + " bytes, the file holds " +
           std::to_string(data_bytes) + " (truncated, or trailing bytes)");
  }
}

}  // namespace

Safetensors ReadSafetensors(const std::string& path) {
  Safetensors file;
  file.blob = ReadWhole(path);
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file.blob.data(), sizeof header_bytes);
  const uint64_t rest = file.blob.size() - sizeof header_bytes;
  if (header_bytes > std::min(kMaxHeaderBytes, rest)) {
    Refuse("truncated or not safetensors: header claims " + std::to_string(header_bytes) +
           " bytes");
  }
  const auto* text = reinterpret_cast<const char*>(file.blob.data()) + sizeof header_bytes;
  const Json header = ParseStrict(std::string_view(text, header_bytes));
  if (!header.is_object()) Refuse("not a safetensors file: its header is not an object");
  file.data_begin = sizeof header_bytes + header_bytes;
  std::vector<Extent> extents;
  for (const auto& [name, entry] : header.items()) {
    if (name == kMetadataKey) {
      ParseMetadata(entry, file);
      continue;
    }
    Extent extent{};
    const auto place = file.tensors.emplace(name, ParseEntry(name, entry, extent)).first;
    extent.name = &place->first;
    extents.push_back(extent);
  }
  RequireTight(extents, rest - header_bytes);
  for (const Extent& extent : extents) {
    file.tensors.at(*extent.name).data = file.blob.data() + file.data_begin + extent.begin;
  }
  return file;
}

}  // namespace edge_lora
