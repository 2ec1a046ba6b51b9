#include "lines.h"

#include <algorithm>

namespace edge_lora {
namespace {

EL_CLONES bool Same(const Lines& a, const Lines& b, uint64_t inputs) {
  LineBits differing = {};
  for (uint64_t i = 0; i < inputs; ++i) {
    LineBits left;
    LineBits right;
    std::memcpy(&left, a.base + a.offset[i], sizeof left);
    std::memcpy(&right, b.base + b.offset[i], sizeof right);
    differing |= left ^ right;
  }
  int any = 0;
  for (int j = 0; j < kLine; ++j) any |= differing[j];
  return any == 0;
}

EL_CLONES void Copy(const Lines& from, const Lines& to, uint64_t inputs) {
  for (uint64_t i = 0; i < inputs; ++i) {
    Line line;
    Load(from.base + from.offset[i], line);
    Stream(line, to.base + to.offset[i]);
  }
}

bool AreWhole(const Layout& layout, const Rect& part) {
  return part.n1 - part.n0 == kLine && layout.keeps_lines();
}

}  // namespace

Lines SpacedLines(float* base, uint64_t pitch, uint64_t inputs) {
  Lines lines;
  lines.base = base;
  for (uint64_t i = 0; i < inputs; ++i) lines.offset[i] = static_cast<uint32_t>(i * pitch);
  return lines;
}

Lines LoadLines(const Layout& layout, float* block, const Rect& part, Tile& tile) {
  if (AreWhole(layout, part)) {
    Lines lines;
    lines.base = block;
    layout.Offsets(part.k0, part.k1, part.n0, lines.offset);
    return lines;
  }
  for (uint64_t k = part.k0; k < part.k1; ++k) {
    float* line = tile.value[k - part.k0];
    std::fill_n(line, kLine, 0.0F);
    for (uint64_t n = part.n0; n < part.n1; ++n) line[n - part.n0] = block[layout.Offset(k, n)];
  }
  return SpacedLines(tile.value[0], kLine, part.k1 - part.k0);
}

void StoreLines(const Lines& lines, const Layout& layout, const Rect& part, float* block) {
  if (AreWhole(layout, part)) {
    if (lines.base == block) return;
    Tile unused;
    CopyLines(lines, LoadLines(layout, block, part, unused), part.k1 - part.k0);
    return;
  }
  for (uint64_t k = part.k0; k < part.k1; ++k) {
    const float* line = lines.base + lines.offset[k - part.k0];
    for (uint64_t n = part.n0; n < part.n1; ++n) block[layout.Offset(k, n)] = line[n - part.n0];
  }
}

Lines PristineLines(const Pristine& pristine, std::vector<float>& values, const Rect& rect,
                    const Rect& part, Tile& tile) {
  const uint64_t inputs = part.k1 - part.k0;
  if (pristine.stored() == Stored::kInOut && part.n1 - part.n0 == kLine) {
    const uint64_t pitch = rect.n1 - rect.n0;
    return SpacedLines(values.data() + (part.k0 - rect.k0) * pitch + part.n0 - rect.n0, pitch,
                       inputs);
  }
  pristine.TakeTile(values, rect, part, tile);
  return SpacedLines(tile.value[0], kLine, inputs);
}

bool SameLines(const Lines& a, const Lines& b, uint64_t inputs) { return Same(a, b, inputs); }

void CopyLines(const Lines& from, const Lines& to, uint64_t inputs) { Copy(from, to, inputs); }

void FinishCopies() { FinishStreams(); }

}  // namespace edge_lora
