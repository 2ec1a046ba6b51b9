// A bundle's program, loaded, with its weights in reach.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "bundle.h"
#include "image.h"
#include "program.h"

namespace edge_lora {

/// A private, writable mapping of a file: writing to it leaves the file as it is.
class PrivateMapping {
 public:
  /// Throws Error(kBundle).
  PrivateMapping(const std::string& path, uint64_t bytes);
  ~PrivateMapping();
  PrivateMapping(const PrivateMapping&) = delete;
  PrivateMapping& operator=(const PrivateMapping&) = delete;

  std::span<uint8_t> bytes() const { return {data_, bytes_}; }

 private:
  uint8_t* data_ = nullptr;
  uint64_t bytes_;
};

class OpenedBundle {
 public:
  /// Checks the file against the manifest, loads it and binds every fp32 slot to its weight.
  OpenedBundle(const Bundle& bundle, int threads);

  Program& program() { return *program_; }
  Image& image() { return image_; }
  uint64_t packed_bytes() const { return packed_->bytes(); }
  double check_ms() const { return check_ms_; }
  double load_ms() const { return load_ms_; }
  double bind_ms() const { return bind_ms_; }

 private:
  void Load(const Bundle& bundle, int threads);
  void Bind(const Bundle& bundle);

  PrivateMapping pte_;
  std::unique_ptr<Program> program_;
  std::vector<std::pair<Shape, std::shared_ptr<const Layout>>> layouts_;
  std::shared_ptr<const Mapping> packed_;
  Image image_;
  double check_ms_ = 0;
  double load_ms_ = 0;
  double bind_ms_ = 0;
};

/// Milliseconds that `work` takes.
double Timed(const std::function<void()>& work);

}  // namespace edge_lora
