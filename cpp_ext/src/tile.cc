#include "tile.h"

#include <algorithm>
#include <cstring>

namespace edge_lora {
namespace {

// Rows of the file in a rectangle: few enough that they stay in L2 between reading and packing (64
// or 128 undo a patch a quarter faster than 256), enough to make converting the factors cheap.
constexpr uint64_t kShortSide = 128;
// Bounds the buffer of a thread to 256 * 4096 fp32, 4 MiB.
constexpr uint64_t kLongSide = 4096;
// Inputs of a rectangle that is changed where it lies: the factors of rank 16 for them fit L1, and
// converting the factors for the outputs is little beside so many inputs.
constexpr uint64_t kInputsInPlace = 256;

std::vector<Rect> CutBy(Shape shape, uint64_t k_step, uint64_t n_step) {
  std::vector<Rect> rects;
  for (uint64_t k = 0; k < shape.in; k += k_step) {
    for (uint64_t n = 0; n < shape.out; n += n_step) {
      rects.push_back({k, std::min(k + k_step, shape.in), n, std::min(n + n_step, shape.out)});
    }
  }
  return rects;
}

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
  return CutBy(shape_, along_outputs ? kShortSide : kLongSide,
               along_outputs ? kLongSide : kShortSide);
}

std::vector<Rect> Pristine::CutInPlace() const { return CutBy(shape_, kInputsInPlace, kLongSide); }

Pristine::Runs Pristine::RunsOf(const Rect& rect) const {
  const uint64_t height = rect.k1 - rect.k0;
  const uint64_t width = rect.n1 - rect.n0;
  const bool along_outputs = stored_ == Stored::kInOut;
  const uint64_t rows = along_outputs ? height : width;
  const uint64_t length = along_outputs ? width : height;
  const uint64_t pitch = along_outputs ? shape_.out : shape_.in;
  const uint64_t first = along_outputs ? rect.k0 * pitch + rect.n0 : rect.n0 * pitch + rect.k0;
  if (length == pitch) return {first, 1, length * rows, pitch};  // whole rows are one piece
  return {first, rows, length, pitch};
}

void Pristine::Read(const Rect& rect, std::vector<float>& values) const {
  const Runs runs = RunsOf(rect);
  values.resize(runs.count * runs.length);
  for (uint64_t i = 0; i < runs.count; ++i) {
    file_->Read(values.data() + i * runs.length, runs.length * sizeof(float),
                offset_ + (runs.first + i * runs.pitch) * sizeof(float));
  }
}

bool Pristine::SameRows(const std::vector<float>& values, const Rect& rect,
                        const float* block) const {
  const Runs runs = RunsOf(rect);
  bool same = true;
  for (uint64_t i = 0; same && i < runs.count; ++i) {
    same = std::memcmp(values.data() + i * runs.length, block + runs.first + i * runs.pitch,
                       runs.length * sizeof(float)) == 0;
  }
  return same;
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

}  // namespace edge_lora
