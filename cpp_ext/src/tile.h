// Rectangles of a weight, handled as tiles of one line of outputs by a few inputs.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "file.h"
#include "forms.h"
#include "layout.h"
#include "simd.h"

namespace edge_lora {

/// Inputs [k0, k1) x outputs [n0, n1) of a weight.
struct Rect {
  uint64_t k0 = 0;
  uint64_t k1 = 0;
  uint64_t n0 = 0;
  uint64_t n1 = 0;
};

/// Inputs of a tile: one tile of fp32 is 4 KiB, so that all that a kernel touches stays in L1.
inline constexpr int kTileInputs = 64;

/// Values of (kTileInputs inputs) x (one line of outputs), the outputs side by side.
struct alignas(64) Tile {
  float value[kTileInputs][kLine];
};

/// A slot's unpatched weight on disk. Read with pread: it adds nothing to resident memory.
class Pristine {
 public:
  Pristine(std::shared_ptr<const File> file, uint64_t offset, Shape shape, Stored stored)
      : file_(std::move(file)), offset_(offset), shape_(shape), stored_(stored) {}

  Shape shape() const { return shape_; }
  Stored stored() const { return stored_; }
  const std::string& path() const { return file_->path(); }
  /// Throws Error(kBundle) if the file is too short to hold the weight.
  void RequireWhole() const;
  /// Cuts the weight into rectangles that are long in the direction in which the file runs.
  std::vector<Rect> Cut() const;
  /// Cuts it into larger ones, for work that reads nothing from the file.
  std::vector<Rect> CutInPlace() const;
  /// Reads one rectangle, in the order of the file.
  void Read(const Rect& rect, std::vector<float>& values) const;
  /// Takes one tile (outputs n0 … n0 + width) out of what Read gave for `rect`.
  void TakeTile(const std::vector<float>& values, const Rect& rect, const Rect& part,
                Tile& tile) const;
  /// Whether `block`, laid out as the file, has the same bits in `rect` as Read gave.
  bool SameRows(const std::vector<float>& values, const Rect& rect, const float* block) const;
  /// The first row of the file: enough to tell most blocks that hold something else.
  Rect FirstRow() const;
  float ReadOne(uint64_t k, uint64_t n) const;

 private:
  /// `count` runs of `length` values, the first at `first`, `pitch` values from one to the next.
  struct Runs {
    uint64_t first;
    uint64_t count;
    uint64_t length;
    uint64_t pitch;
  };
  Runs RunsOf(const Rect& rect) const;

  std::shared_ptr<const File> file_;
  uint64_t offset_;  // bytes
  Shape shape_;
  Stored stored_;
};

/// Calls work(part) for each tile of `rect`: at most kTileInputs inputs by one line of outputs.
template <typename Work>
void ForEachTile(const Rect& rect, const Work& work) {
  for (uint64_t n = rect.n0; n < rect.n1; n += kLine) {
    for (uint64_t k = rect.k0; k < rect.k1; k += kTileInputs) {
      work(Rect{k, std::min<uint64_t>(k + kTileInputs, rect.k1), n,
                std::min<uint64_t>(n + kLine, rect.n1)});
    }
  }
}

}  // namespace edge_lora
