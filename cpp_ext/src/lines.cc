#include "lines.h"

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
    Store(line, to.base + to.offset[i]);
  }
}

bool HoldsWholeLines(const Layout& layout, const Rect& part) {
  return part.n1 - part.n0 == kLine && layout.keeps_lines();
}

}  // namespace

Lines SpacedLines(float* base, uint64_t pitch, uint64_t inputs) {
  Lines lines;
  lines.base = base;
  for (uint64_t i = 0; i < inputs; ++i) lines.offset[i] = static_cast<uint32_t>(i * pitch);
  return lines;
}

Lines LinesIn(const Layout& layout, float* block, const Rect& part, Tile& tile) {
  if (!HoldsWholeLines(layout, part)) {
    return SpacedLines(tile.value[0], kLine, part.k1 - part.k0);
  }
  Lines lines;
  lines.base = block;
  for (uint64_t k = part.k0; k < part.k1; ++k) {
    lines.offset[k - part.k0] = layout.Offset(k, part.n0);
  }
  return lines;
}

bool SameLines(const Lines& a, const Lines& b, uint64_t inputs) { return Same(a, b, inputs); }

void CopyLines(const Lines& from, const Lines& to, uint64_t inputs) { Copy(from, to, inputs); }

void StoreLines(const Lines& lines, const Layout& layout, const Rect& part, float* block) {
  Tile tile;
  const Lines to = LinesIn(layout, block, part, tile);
  if (to.base == lines.base && to.base == block) return;  // they lie there already
  CopyLines(lines, to, part.k1 - part.k0);
  if (to.base != block) StoreTile(layout, tile, part, block);
}

}  // namespace edge_lora
