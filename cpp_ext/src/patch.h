// An adapter, or a weighted sum of them, compiled against one image.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "forms.h"

namespace edge_lora {

/// New values for single elements of one place; holds the old ones while the patch is in.
///
/// Runs of `run` elements side by side share one offset: a mask made of cache lines needs one
/// offset for 16 values, and the swap moves whole lines.
struct ExchangePart {
  uint32_t slot = 0;
  uint32_t place = 0;
  uint32_t run = 1;
  std::vector<uint32_t> offsets;  // (runs), ascending, runs do not overlap
  std::vector<float> values;      // (runs, run)
};

/// factor * delta of one form.
struct Term {
  Fields fields;
  float factor = 1.0F;
  /// What `fields` points into: the adapter may be gone by the time of the swap.
  std::vector<std::shared_ptr<const std::byte[]>> owned;
};

/// A delta that changes every value of a slot: it is computed when it is put in.
struct DensePart {
  uint32_t slot = 0;
  std::vector<Term> terms;  // they add up in this order
};

/// Made by Image::Compile or ReadPatch, swapped by that image alone.
struct Patch {
  std::string signature;  ///< Of the image that it was compiled against.
  uint64_t image = 0;     ///< The number of that image, unique in this process.
  std::vector<std::string> slots;
  uint64_t changed = 0;  ///< Values whose bits differ from the base; all of a slot if dense.
  std::vector<ExchangePart> exchanges;
  std::vector<DensePart> denses;
  bool is_in = false;  ///< Guarded, as the values of `exchanges`, by `mutex`.
  std::mutex mutex;

  /// Bytes that it keeps in memory.
  size_t bytes() const;
};

/// Swaps the values of one part with those in `block`, runs [begin, end). Twice is the identity.
void Exchange(ExchangePart& part, size_t begin, size_t end, float* block);

/// Makes a part of the given elements. `offsets` are ascending and distinct.
ExchangePart MakeExchange(uint32_t slot, uint32_t place, std::vector<uint32_t> offsets,
                          std::vector<float> values);

/// A copy of `fields` that owns its values.
Term MakeTerm(const Fields& fields, float factor);

/// Writes a patch to a cache file, atomically.
/// Throws Error(kUnsupported) while the patch is in: it then holds the base's values.
void SavePatch(Patch& patch, const std::string& path);

}  // namespace edge_lora
