// The memory file in which XNNPACK keeps the weights that it packed, seen from outside.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>

namespace edge_lora {

/// Where an entry lies in a packed file.
struct PackedEntry {
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

/// Entries by name: the names of the weight's and, if there is one, the bias's raw data, joined.
using PackedIndex = std::map<std::string, PackedEntry>;

/// A shared mapping of a whole file: what is written here, the engine reads.
class Mapping {
 public:
  Mapping(int descriptor, uint64_t bytes);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  uint8_t* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;
  uint64_t bytes_;
};

/// A memory file (memfd) and the path under which the engine opens it.
///
/// The engine keeps one store of packed weights per path and process, as long as a program uses
/// it (measured: two files are never linked, and a second program over one file opens in less than
/// a hundredth of the time, for nothing is packed again). Programs over the same file must thus be
/// given the same path, or the later ones could not lock the file and would quietly pack on the
/// heap; programs over different files must never be given the same path, or they would share
/// weights. So there is one PackedFile per file in the process, which holds a descriptor, and with
/// it the path, for itself.
class PackedFile {
 public:
  /// The packed file behind a caller's descriptor, which may be closed afterwards.
  /// Throws Error(kInvalidArgument) unless it is a readable and writable plain file.
  static std::shared_ptr<const PackedFile> At(int descriptor);

  explicit PackedFile(int descriptor) : descriptor_(descriptor) {}
  ~PackedFile();
  PackedFile(const PackedFile&) = delete;
  PackedFile& operator=(const PackedFile&) = delete;

  std::string path() const;
  uint64_t bytes() const;
  std::shared_ptr<const Mapping> Map() const;

 private:
  int descriptor_;
};

/// Reads the index at the end of a packed file; empty if nothing was packed.
/// Throws Error(kUnsupported) if it is not as this version of the engine writes it.
PackedIndex ReadPackedIndex(const uint8_t* file, uint64_t bytes);

}  // namespace edge_lora
