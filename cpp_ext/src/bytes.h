// Little-endian records in memory; the reader trusts nothing.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "status.h"

namespace edge_lora {

class ByteWriter {
 public:
  template <typename T>
  void Put(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }

  /// A count, then the values.
  template <typename Range>
  void PutAll(const Range& values) {
    Put<uint64_t>(values.size());
    if (values.empty()) return;
    bytes_.append(reinterpret_cast<const char*>(values.data()),
                  values.size() * sizeof *values.data());
  }

  std::string Take() { return std::move(bytes_); }

 private:
  std::string bytes_;
};

/// Throws Error(kInvalidArgument) that names `what` as soon as something does not add up.
class ByteReader {
 public:
  ByteReader(const std::string& bytes, std::string what) : bytes_(bytes), what_(std::move(what)) {}

  template <typename T>
  T Get() {
    T value;
    std::memcpy(&value, Step(1, sizeof value), sizeof value);
    return value;
  }

  template <typename T>
  std::vector<T> GetAll() {
    const auto count = Get<uint64_t>();
    const char* from = Step(count, sizeof(T));
    std::vector<T> values(count);
    if (count != 0) std::memcpy(values.data(), from, count * sizeof(T));
    return values;
  }

  uint64_t left() const { return bytes_.size() - at_; }
  void RequireEnd() const {
    if (left() != 0) Refuse();
  }

  [[noreturn]] void Refuse() const {
    throw Error(Code::kInvalidArgument, what_ + " is damaged: delete it, it will be made again");
  }

 private:
  const char* Step(uint64_t count, size_t size) {
    if (count > left() / size) Refuse();
    const char* from = bytes_.data() + at_;
    at_ += count * size;
    return from;
  }

  const std::string& bytes_;
  std::string what_;
  size_t at_ = 0;
};

}  // namespace edge_lora
