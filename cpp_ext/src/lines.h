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

/// Lines at a distance of `pitch` from each other.
Lines SpacedLines(float* base, uint64_t pitch, uint64_t inputs);

/// The lines of `part` in a block that is packed as `layout`. If it does not keep them whole: a
/// copy in `tile`, zero past the last output.
Lines LoadLines(const Layout& layout, float* block, const Rect& part, Tile& tile);
/// Copies lines to where `layout` puts the values of `part`, unless LoadLines gave them from there.
void StoreLines(const Lines& lines, const Layout& layout, const Rect& part, float* block);

/// The lines of `part` in what Pristine::Read gave for `rect`, there or as a copy in `tile`.
Lines PristineLines(const Pristine& pristine, std::vector<float>& values, const Rect& rect,
                    const Rect& part, Tile& tile);

/// Whether they agree to the bit.
bool SameLines(const Lines& a, const Lines& b, uint64_t inputs);
/// Copies past the caches, which a whole image would flush. Other threads may not see the copies
/// before FinishCopies.
void CopyLines(const Lines& from, const Lines& to, uint64_t inputs);
void FinishCopies();

}  // namespace edge_lora
