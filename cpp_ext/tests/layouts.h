// Packed layouts as engines make them, by their closed form.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "layout.h"

/// ONNX Runtime's fp32 panels: 256 inputs deep, 16 outputs wide, outputs padded to 16.
inline uint64_t PanelOffset(uint64_t k, uint64_t n, edge_lora::Shape shape) {
  const uint64_t padded = (shape.out + 15) / 16 * 16;
  const uint64_t rows = std::min<uint64_t>(256, shape.in - k / 256 * 256);
  return k / 256 * 256 * padded + n / 16 * 16 * rows + k % 256 * 16 + n % 16;
}

inline uint64_t PanelElements(edge_lora::Shape shape) {
  return shape.in * ((shape.out + 15) / 16 * 16);
}

inline std::shared_ptr<const edge_lora::Layout> PanelLayout(edge_lora::Shape shape) {
  std::vector<float> values(shape.size());
  edge_lora::Layout::ProbeValues(shape, edge_lora::Stored::kOutIn, values.data());
  std::vector<float> block(PanelElements(shape));
  for (uint64_t n = 0; n < shape.out; ++n) {
    for (uint64_t k = 0; k < shape.in; ++k) {
      block[PanelOffset(k, n, shape)] = values[n * shape.in + k];
    }
  }
  return edge_lora::Layout::FromProbe(block.data(), block.size(), shape);
}
