// A plain file, opened for reading.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "status.h"

namespace edge_lora {

/// Owns a descriptor. Safe to use from many threads at once.
class File {
 public:
  /// Opens a regular file (a link to one too). Errors here and later carry `code`.
  File(const std::string& path, Code code);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  const std::string& path() const { return path_; }
  /// Bytes now: a file may have been cut since it was opened.
  uint64_t size() const;
  /// Reads exactly `bytes` from `offset`; throws if there are fewer.
  void Read(void* out, size_t bytes, uint64_t offset) const;

 private:
  std::string path_;
  Code code_;
  int descriptor_;
};

/// Writes a file so that a reader sees the old one or the whole new one.
/// Throws Error(kInputOutput).
void WriteAtomically(const std::string& path, const void* data, size_t bytes);

}  // namespace edge_lora
