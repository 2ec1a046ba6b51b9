// Writes adapter files for tests, sound ones unless told otherwise.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "sha256.h"

/// A file of this process for tests, in memory where possible.
inline std::string TestPath(const std::string& name) {
  static const std::string folder = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
  return folder + "/edge_lora_test_" + std::to_string(getpid()) + "_" + name;
}

template <typename T>
std::string BytesOf(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

class AdapterWriter {
 public:
  void Add(const std::string& name, const std::string& dtype, const std::string& shape,
           const std::string& bytes) {
    entries_ += (entries_.empty() ? "" : ",") + Quote(name) + ":{\"dtype\":" + Quote(dtype) +
                ",\"shape\":[" + shape + "],\"data_offsets\":[" + std::to_string(data_.size()) +
                "," + std::to_string(data_.size() + bytes.size()) + "]}";
    data_ += bytes;
  }

  /// `slots` and `codebooks` are JSON of the header's members.
  std::string Finish(const std::string& slots, double alpha = 1.0,
                     const std::string& codebooks = "[]") const {
    const std::string header =
        R"({"edge_lora":1,"name":"t","method":"m","base":{"id":"b","sha256":"0"},"alpha":)" +
        std::to_string(alpha) + ",\"slots\":" + slots + ",\"codebooks\":" + codebooks +
        ",\"tensors_sha256\":" + Quote(edge_lora::Sha256Hex(data_.data(), data_.size())) + "}";
    const std::string text = "{\"__metadata__\":{\"edge_lora\":" + Quote(header) + "}" +
                             (entries_.empty() ? "" : ",") + entries_ + "}";
    const uint64_t size = text.size();
    return std::string(reinterpret_cast<const char*>(&size), sizeof size) + text + data_;
  }

 private:
  static std::string Quote(const std::string& text) {
    std::string quoted = "\"";
    for (const char c : text) {
      if (c == '"' || c == '\\') quoted += '\\';
      quoted += c;
    }
    return quoted + "\"";
  }

  std::string entries_;
  std::string data_;
};

inline std::string WriteTo(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
  return path;
}
