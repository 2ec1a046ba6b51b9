// Whole lines of outputs where they lie, so that kernels need not copy them into tiles.
#pragma once

#include <cstdint>

#include "layout.h"
#include "tile.h"

namespace edge_lora {

/// One line for each of up to kTileInputs inputs: kLine floats from base + offset[i].
struct Lines {
  float* base = nullptr;
  uint32_t offset[kTileInputs];
};

/// Lines that follow each other at a distance of `pitch`.
Lines SpacedLines(float* base, uint64_t pitch, uint64_t inputs);

/// The lines of `part` in a block, if it holds them whole; else the lines of `tile`.
Lines LinesIn(const Layout& layout, float* block, const Rect& part, Tile& tile);

bool SameLines(const Lines& a, const Lines& b, uint64_t inputs);
void CopyLines(const Lines& from, const Lines& to, uint64_t inputs);

/// Copies the values of `part` into a block, wherever its layout puts them.
void StoreLines(const Lines& lines, const Layout& layout, const Rect& part, float* block);

}  // namespace edge_lora
