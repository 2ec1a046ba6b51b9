#include "tile.h"

#include <algorithm>

namespace edge_lora {
namespace {

// Rows of the file in a rectangle: few enough that they stay in L2 between reading and packing (64
// or 128 undo a patch a quarter faster than 256), enough to make converting the factors cheap.
constexpr uint64_t kShortSide = 128;
// Bounds the buffer of a thread to 256 * 4096 fp32, 4 MiB.
constexpr uint64_t kLongSide = 4096;

}  // namespace

void Pristine::RequireWhole() const {
  const uint64_t end = offset_ + shape_.size() * sizeof(float);
  const uint64_t size = file_->size();
  if (end > size) {
    throw Error(Code::kBundle, "'" + path() + "' has " + std::to_string(size) +
                                   " bytes, a weight ends at " + std::to_string(end) +
                                   "; the file changed after export");
  }
}

std::vector<Rect> Pristine::Cut() const {
  const bool along_outputs = stored_ == Stored::kInOut;
  const uint64_t k_step = along_outputs ? kShortSide : kLongSide;
  const uint64_t n_step = along_outputs ? kLongSide : kShortSide;
  std::vector<Rect> rects;
  for (uint64_t k = 0; k < shape_.in; k += k_step) {
    for (uint64_t n = 0; n < shape_.out; n += n_step) {
      rects.push_back({k, std::min(k + k_step, shape_.in), n, std::min(n + n_step, shape_.out)});
    }
  }
  return rects;
}

void Pristine::Read(const Rect& rect, std::vector<float>& values) const {
  const uint64_t height = rect.k1 - rect.k0;
  const uint64_t width = rect.n1 - rect.n0;
  values.resize(height * width);
  const bool along_outputs = stored_ == Stored::kInOut;
  uint64_t rows = along_outputs ? height : width;
  uint64_t run = along_outputs ? width : height;
  const uint64_t pitch = along_outputs ? shape_.out : shape_.in;
  const uint64_t first = along_outputs ? rect.k0 * pitch + rect.n0 : rect.n0 * pitch + rect.k0;
  if (run == pitch) {  // whole rows are one piece
    run *= rows;
    rows = 1;
  }
  for (uint64_t row = 0; row < rows; ++row) {
    file_->Read(values.data() + row * run, run * sizeof(float),
                offset_ + (first + row * pitch) * sizeof(float));
  }
}

void Pristine::TakeTile(const std::vector<float>& values, const Rect& rect, const Rect& part,
                        Tile& tile) const {
  const uint64_t width = part.n1 - part.n0;
  const uint64_t inputs = part.k1 - part.k0;
  if (stored_ == Stored::kInOut) {
    const uint64_t pitch = rect.n1 - rect.n0;
    const float* from = values.data() + (part.k0 - rect.k0) * pitch + part.n0 - rect.n0;
    for (uint64_t k = 0; k < inputs; ++k, from += pitch) {
      std::fill_n(tile.value[k], kLine, 0.0F);
      std::copy_n(from, width, tile.value[k]);
    }
    return;
  }
  const uint64_t pitch = rect.k1 - rect.k0;
  const float* from = values.data() + (part.n0 - rect.n0) * pitch + part.k0 - rect.k0;
  if (width < kLine) std::fill_n(tile.value[0], inputs * kLine, 0.0F);
  for (uint64_t n = 0; n < width; ++n, from += pitch) {
    for (uint64_t k = 0; k < inputs; ++k) tile.value[k][n] = from[k];
  }
}

Rect Pristine::FirstRow() const {
  if (stored_ == Stored::kInOut) return {0, 1, 0, std::min(kLongSide, shape_.out)};
  return {0, std::min(kLongSide, shape_.in), 0, 1};
}

float Pristine::ReadOne(uint64_t k, uint64_t n) const {
  float value = 0;
  const uint64_t index = stored_ == Stored::kInOut ? k * shape_.out + n : n * shape_.in + k;
  file_->Read(&value, sizeof value, offset_ + index * sizeof(float));
  return value;
}

void LoadTile(const Layout& layout, const float* block, const Rect& part, Tile& tile) {
  const uint64_t width = part.n1 - part.n0;
  for (uint64_t k = part.k0; k < part.k1; ++k) {
    float* line = tile.value[k - part.k0];
    const uint32_t* outputs = layout.OutputsOf(k);
    const uint32_t first = layout.input(k);
    if (width == kLine && layout.keeps_lines()) {
      std::copy_n(block + static_cast<uint32_t>(first + outputs[part.n0]), kLine, line);
      continue;
    }
    std::fill_n(line, kLine, 0.0F);
    for (uint64_t j = 0; j < width; ++j) {
      line[j] = block[static_cast<uint32_t>(first + outputs[part.n0 + j])];
    }
  }
}

void StoreTile(const Layout& layout, const Tile& tile, const Rect& part, float* block) {
  const uint64_t width = part.n1 - part.n0;
  for (uint64_t k = part.k0; k < part.k1; ++k) {
    const float* line = tile.value[k - part.k0];
    const uint32_t* outputs = layout.OutputsOf(k);
    const uint32_t first = layout.input(k);
    if (width == kLine && layout.keeps_lines()) {
      std::copy_n(line, kLine, block + static_cast<uint32_t>(first + outputs[part.n0]));
      continue;
    }
    for (uint64_t j = 0; j < width; ++j) {
      block[static_cast<uint32_t>(first + outputs[part.n0 + j])] = line[j];
    }
  }
}

}  // namespace edge_lora
